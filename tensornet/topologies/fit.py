"""Fit of a network of any family under a two-sided weighting: structured start, then least squares."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tensornet.als import fit_network
from tensornet.linalg.svd import result_dtype
from tensornet.linalg.tt_svd import pad_matrix
from tensornet.linalg.weighted_svd import Weighting, damped, root, transposed
from tensornet.network import TensorNetwork
from tensornet.topology import Topology

#: Function that decomposes a matrix into a network of a given topology.
Decompose = Callable[[Tensor, Topology], TensorNetwork]

#: Conjugate gradient steps for each core in each sweep, in leg-whitened coordinates.
_STEPS = 6
#: Damping of the factors of a moment, since partial traces of a singular moment may be singular.
_FACTOR_DAMPING = 1e-4


@torch.no_grad()
def fit_weighted(
    decompose: Decompose, matrix: Tensor, topology: Topology, weighting: Weighting, *, sweeps: int
) -> TensorNetwork:
    """Fit cores of a given topology; the weighted error is at most that of the plain decomposition.

    The start is the family's decomposition in coordinates in which the moments, approximated by Kronecker
    products over the legs, are identities. It is fitted to the full weighting in these coordinates, where a
    few steps do as much as hundreds in the coordinates of the matrix. If the plain decomposition has a
    smaller weighted error, it is the start instead.

    Args:
        decompose: decomposes a matrix into a network of the family.
        matrix: shape `(out, in)`.
        topology: topology of that family.
        weighting: sensitivity of the loss to errors.
        sweeps: number of sweeps of alternating least squares; 0 returns the start.
    """
    legs = legs_of(topology, weighting)
    plain = decompose(matrix, topology)
    made = legs.decompose(decompose, matrix, topology) if legs.roots else plain
    if sweeps > 0 and legs.roots:
        whitened = legs.whitened(matrix, made, weighting)
        fit = fit_network(*whitened, sweeps=sweeps, steps=_STEPS)
        made = legs.undone(fit.network, topology, result_dtype(matrix.dtype))
    if legs.roots and weighting.cost(matrix - plain.to_matrix()) <= weighting.cost(matrix - made.to_matrix()):
        made = plain
    if sweeps > 0 and (made is plain or not legs.roots):
        made = fit_network(matrix, plain, weighting, sweeps=sweeps).network
    return made


def structured_start(
    decompose: Decompose, matrix: Tensor, topology: Topology, weighting: Weighting
) -> TensorNetwork:
    """Choose the better of the plain and the leg-whitened decomposition by the full weighting."""
    plain = decompose(matrix, topology)
    legs = legs_of(topology, weighting)
    if not legs.roots:
        return plain
    whitened = legs.decompose(decompose, matrix, topology)
    costs = [weighting.cost(matrix - network.to_matrix()) for network in (plain, whitened)]
    return plain if costs[0] <= costs[1] else whitened


def leading(network: TensorNetwork, topology: Topology) -> TensorNetwork:
    """Slice a network to smaller bonds; the bonds must be sorted by importance, as after TT-SVD."""
    sizes = topology.core_shapes.values()
    cut = [core[tuple(slice(n) for n in shape)] for core, shape in zip(network.cores, sizes, strict=True)]
    return TensorNetwork(topology, [core.contiguous() for core in cut])


@dataclass(frozen=True)
class Legs:
    """Leg-whitened coordinates, in which the moment of every leg is the identity.

    Args:
        roots: by label, `L` and its inverse, with `L L^T` the moment of the leg; vectors for a diagonal
            moment. Legs of a side without a moment are absent.
        sides: labels of the out-legs and of the in-legs.
        dims: their sizes.
    """

    roots: Mapping[str, tuple[Tensor, Tensor]]
    sides: tuple[tuple[str, ...], tuple[str, ...]]
    dims: tuple[tuple[int, ...], tuple[int, ...]]

    def decompose(self, decompose: Decompose, matrix: Tensor, topology: Topology) -> TensorNetwork:
        """Decompose in leg-whitened coordinates and transform the cores back; bonds stay the same."""
        found = decompose(self.whitened_matrix(matrix), _unpadded(topology))
        return self.undone(found, topology, matrix.dtype)

    def whitened(
        self, matrix: Tensor, network: TensorNetwork, weighting: Weighting
    ) -> tuple[Tensor, TensorNetwork, Weighting]:
        """Transform a matrix, its network and the weighting to whitened coordinates, with the same loss."""
        topology = network.topology
        cores = self._on_cores(topology, network.cores, inverse=False)
        moments = zip(matrix.shape, (weighting.rows, weighting.columns), strict=True)
        sides = zip(self.sides, self.dims, moments, strict=True)
        rows, columns = (self._moment(labels, dims, *moment) for labels, dims, moment in sides)
        made = TensorNetwork(_unpadded(topology), [core.float() for core in cores])
        return self.whitened_matrix(matrix).float(), made, Weighting(rows, columns)

    def undone(
        self, network: TensorNetwork, topology: Topology, dtype: torch.dtype | None = None
    ) -> TensorNetwork:
        """Transform a network from whitened coordinates back to those of the matrix."""
        cores = self._on_cores(topology, network.cores, inverse=True)
        kept = [
            core.to(dtype or old.dtype).contiguous() for core, old in zip(cores, network.cores, strict=True)
        ]
        return TensorNetwork(topology, kept)

    def whitened_matrix(self, matrix: Tensor) -> Tensor:
        """Compute `Lr^T W Lc` without padding: the whitened matrix fills the legs."""
        shape = tuple(math.prod(dims) for dims in self.dims)
        work = pad_matrix(matrix.double(), shape[0], shape[1]).reshape(*self.dims[0], *self.dims[1])
        for axis, label in enumerate((*self.sides[0], *self.sides[1])):
            if label in self.roots:
                work = _on_axis(work, axis, transposed(self.roots[label][0]))
        return work.reshape(shape)

    def _moment(
        self, labels: Sequence[str], dims: Sequence[int], features: int, moment: Tensor | None
    ) -> Tensor | None:
        """Compute `L^-1 M L^-T`, with zero weight on padding."""
        size, count = math.prod(dims), len(dims)
        if moment is None:
            return None if size == features else pad_vector(torch.ones(features, dtype=torch.float64), size)
        if moment.ndim == 1:
            work = pad_vector(moment.double(), size).reshape(tuple(dims))
            for axis, label in enumerate(labels):
                work = _on_axis(work, axis, self.roots[label][1].square())
            return work.reshape(size)
        work = pad_matrix(moment.double(), size, size).reshape(*dims, *dims)
        for axis, label in enumerate(labels):
            inverse = self.roots[label][1]
            work = _on_axis(_on_axis(work, axis, inverse), axis + count, inverse)
        return work.reshape(size, size)

    def _on_cores(self, topology: Topology, cores: Sequence[Tensor], *, inverse: bool) -> list[Tensor]:
        """Multiply every leg of every core by `L^T`, or by its inverse."""
        moved = []
        for spec, core in zip(topology.cores, cores, strict=True):
            work = core.double()
            for position, label in enumerate(spec.labels):
                if label in self.roots:
                    work = _on_axis(work, position, transposed(self.roots[label][int(inverse)]))
            moved.append(work)
        return moved


def legs_of(topology: Topology, weighting: Weighting) -> Legs:
    """Compute whitening roots for a topology; none if there is no weighting, or if cores share a leg."""
    roots: dict[str, tuple[Tensor, Tensor]] = {}
    sides, sizes = (topology.out_labels, topology.in_labels), (topology.out_dims, topology.in_dims)
    labels_of = [core.labels for core in topology.cores]
    if all(sum(leg in labels for labels in labels_of) == 1 for leg in (*sides[0], *sides[1])):
        for labels, dims, moment in zip(sides, sizes, (weighting.rows, weighting.columns), strict=True):
            factors = [] if moment is None else leg_moments(moment, dims)
            roots |= {x: root(damped(f, _FACTOR_DAMPING)) for x, f in zip(labels, factors, strict=False)}
    return Legs(roots, sides, sizes)


def _unpadded(topology: Topology) -> Topology:
    """Return the topology without padding, whose features are the products of its legs."""
    rows, columns = topology.padded_shape
    return replace(topology, out_features=rows, in_features=columns)


def _on_axis(tensor: Tensor, axis: int, factor: Tensor) -> Tensor:
    """Multiply one axis by a matrix, or by a diagonal given as a vector."""
    if factor.ndim == 1:
        return tensor * factor.reshape([-1 if k == axis else 1 for k in range(tensor.ndim)])
    return torch.movedim(torch.tensordot(factor, tensor, ([1], [axis])), 0, axis)


def leg_moments(moment: Tensor, dims: Sequence[int]) -> list[Tensor]:
    """Split a moment `(n, n)` or `(n,)` into one for each leg by partial traces, with mean diagonal 1.

    If the moment is a Kronecker product, it is proportional to that of the results. The product of the leg
    sizes may exceed `n`; padding has no weight.
    """
    size = math.prod(dims)
    count = len(dims)
    found = []
    if moment.ndim == 1:
        whole = pad_vector(moment, size).reshape(tuple(dims))
        for leg in range(count):
            trace = torch.einsum(whole, [*range(count)], [leg])
            found.append(trace / trace.mean().clamp_min(1e-300))
        return found
    full = pad_matrix(moment, size, size).reshape(*dims, *dims)
    for leg in range(count):
        labels = [*range(count), *(count if k == leg else k for k in range(count))]
        trace = torch.einsum(full, labels, [leg, count])
        found.append(trace / trace.diagonal().mean().clamp_min(1e-300))
    return found


def pad_vector(vector: Tensor, size: int) -> Tensor:
    """Pad a vector with zeros to a given size."""
    return torch.nn.functional.pad(vector, (0, size - vector.shape[0]))
