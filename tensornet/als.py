"""Alternating least squares: fit the cores of any network to a matrix under a two-sided weighting.

The weighted error is quadratic in each core. It is minimized over one core after another by conjugate
gradients. They need only the contraction and its adjoint, so cores can have any size. Few steps are enough,
because they are preconditioned by the Gram matrix of the core's environment (the network without that core).
Without a weighting, one step solves for the core exactly, in any gauge and any topology.

With a weighting, `fit_weighted` starts from a decomposition in transformed coordinates: in these, the moment
of every leg (row digit or column digit) is the identity.

Reference:
    Holtz, Rohwedder, Schneider 2012, "The alternating linear scheme for tensor optimization in the tensor
    train format"; Bjorck 1996, "Numerical Methods for Least Squares Problems", section 7.4.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from tensornet.contraction.plan import ContractionPlan, plan_contraction, plan_matrix, run
from tensornet.damping import FIT_DAMPING
from tensornet.linalg.svd import result_dtype, working_dtype
from tensornet.linalg.tt_svd import pad_matrix
from tensornet.linalg.weighted_svd import Weighting, check_weighting, damped, root, times, transposed
from tensornet.network import TensorNetwork, random_cores
from tensornet.topology import Topology

#: Fitting stops after a sweep that lowers the error by less than this fraction.
TOLERANCE = 1e-3
#: Largest product of a core's bond sizes for which the whole Gram matrix is inverted. For larger cores, the
#: Gram matrix of each bond is inverted. In a network without loops, the whole matrix is the Kronecker product
#: of these.
_WHOLE = 256
#: Number of random starts, and number of sweeps after which only the best start is continued.
_STARTS, _TRIAL_SWEEPS = 3, 5
#: Largest number of sweeps over all cores from the best start.
_MAX_SWEEPS = 200
#: Conjugate gradient steps for each core after a random start; for small bonds, the first step is exact.
_STEPS = 2
#: Eigenvalues of a Gram matrix below this fraction of the largest count as zero.
_CUTOFF = {torch.float32: 1e-9, torch.complex64: 1e-9, torch.float64: 1e-12, torch.complex128: 1e-12}
#: Conjugate gradient steps for each core in each sweep, in leg-whitened coordinates.
_LEG_STEPS = 6

#: Function that decomposes a matrix into a network of a given topology.
Decompose = Callable[[Tensor, Topology], TensorNetwork]


@dataclass(frozen=True)
class Fit:
    """Result of `fit_network`.

    Args:
        network: the fitted network, in the dtype of the original cores.
        cost: weighted error `1/2 tr(R E C E^T)` after fitting.
        start: weighted error before fitting.
        sweeps: number of sweeps over all cores.
        converged: whether the last sweep lowered the error by less than the tolerance.
    """

    network: TensorNetwork
    cost: float
    start: float
    sweeps: int
    converged: bool


@torch.no_grad()
def fit_network(
    matrix: Tensor,
    network: TensorNetwork,
    weighting: Weighting,
    *,
    sweeps: int = 2,
    steps: int = 8,
    tolerance: float = TOLERANCE,
    only: Sequence[int] | None = None,
) -> Fit:
    """Reduce the weighted error of a network by alternating least squares; the error never increases.

    Args:
        matrix: the matrix to approximate, shape `(out, in)`.
        network: initial network of any topology, real or complex. All arithmetic uses the dtype of its cores.
        weighting: sensitivity of the loss to errors; `Weighting()` gives the Frobenius norm.
        sweeps: largest number of sweeps over all cores.
        steps: number of conjugate gradient steps for each core in each sweep.
        tolerance: fitting stops after a sweep that lowers the error by less than this fraction.
        only: positions of the cores to fit; None fits all cores.

    Raises:
        ShapeError: the shape of a moment does not fit the matrix.
    """
    check_weighting(matrix, weighting)
    cores = list(network.cores)
    target = matrix.detach().to(cores[0])
    rows, columns = (None if x is None else x.to(target) for x in (weighting.rows, weighting.columns))
    cast = Weighting(rows, columns)
    error = target - _matrix(network.topology, cores)
    start = cost = _inner(error, _weigh(cast, error)) / 2
    done, converged = 0, False
    while done < sweeps and not converged:
        before = cost
        for index in range(len(cores)) if only is None else only:
            cost = _improve(target, cast, network.topology, cores, index, steps, cost)
        done += 1
        converged = before - cost <= tolerance * before
    fitted = TensorNetwork(network.topology, cores)
    return Fit(fitted, weighting.cost(matrix - fitted.to_matrix()), start, done, converged)


@torch.no_grad()
def fit_from_random(matrix: Tensor, topology: Topology) -> Fit:
    """Fit a network of any topology to a matrix by alternating least squares from several random starts.

    After a few sweeps, only the best start is continued, until a sweep lowers the error by less than `1e-5`.

    Args:
        matrix: the matrix, shape `(out, in)`. Its elements must be finite and of moderate size.
        topology: topology of the network, for a matrix of this shape.

    Returns:
        The fit, in double precision.
    """
    target = matrix.detach().to(working_dtype(matrix.dtype))
    generator = torch.Generator().manual_seed(0)

    def fit(network: TensorNetwork, sweeps: int, settled: float) -> Fit:
        return fit_network(target, network, Weighting(), sweeps=sweeps, steps=_STEPS, tolerance=settled)

    trials = []
    for _ in range(_STARTS):
        cores = random_cores(topology, generator=generator, dtype=torch.float64)
        trials.append(fit(TensorNetwork(topology, [core.to(target) for core in cores]), _TRIAL_SWEEPS, 0.0))
    best = min(trials, key=lambda trial: trial.cost)
    rest = fit(best.network, _MAX_SWEEPS - best.sweeps, 2e-5)  # of the squared error
    return replace(rest, start=best.start, sweeps=best.sweeps + rest.sweeps)


def _matrix(topology: Topology, cores: Sequence[Tensor]) -> Tensor:
    """Contract the cores to the matrix `(out, in)` and remove padding."""
    dense = run(plan_matrix(topology), cores).reshape(topology.padded_shape)
    return dense[: topology.out_features, : topology.in_features]


def _weigh(weighting: Weighting, error: Tensor) -> Tensor:
    return times(weighting.columns, times(weighting.rows, error).T).T


def _inner(a: Tensor, b: Tensor) -> float:
    return float((a.conj() * b).sum().real)


def _improve(
    target: Tensor,
    weighting: Weighting,
    topology: Topology,
    cores: list[Tensor],
    index: int,
    steps: int,
    cost: float,
) -> float:
    """Fit one core by preconditioned conjugate gradients, replace it in `cores`, and return the new error.

    `cost` is the weighted error before the fit.
    """
    if topology.terms:  # for a sum, fit the core's term to the target minus the other terms
        positions, part = next(x for x in topology.parts if index in x[0])
        own = [cores[k] for k in positions]
        rest = target - (_matrix(topology, cores) - _matrix(part, own))
        place = positions.index(index)
        cost = _improve(rest, weighting, part, own, place, steps, cost)
        cores[index] = own[place]
        return cost

    def operator(core: Tensor) -> Tensor:
        return _matrix(topology, [*cores[:index], core, *cores[index + 1 :]])

    core = cores[index]
    linear: Any = torch.func.vjp(operator, core)
    made, adjoint = linear  # `operator` is linear, so its adjoint is the same at every point
    precondition = preconditioner(topology, cores, index)
    error = target - made
    weighed = _weigh(weighting, error)
    (residual,) = adjoint(weighed)
    direction = precondition(residual)
    norm = _inner(residual, direction)
    floor = torch.finfo(core.dtype).eps * norm  # smaller gradients are rounding errors
    for remaining in range(steps - 1, -1, -1):
        if not norm > floor:
            break
        moved = operator(direction)
        pushed = _weigh(weighting, moved)
        curvature = _inner(moved, pushed)
        if not curvature > 0:
            break
        step = _inner(pushed, error) / curvature  # the exact minimum along this direction
        candidate, error, weighed = core + step * direction, error - step * moved, weighed - step * pushed
        value = _inner(error, weighed) / 2
        if not value < cost:
            break
        core, cost = candidate, value
        if not remaining:
            break
        (residual,) = adjoint(weighed)
        solved = precondition(residual)
        new = _inner(residual, solved)
        direction, norm = solved + (new / norm) * direction, new
    cores[index] = core
    return cost


def preconditioner(topology: Topology, cores: Sequence[Tensor], index: int) -> Callable[[Tensor], Tensor]:
    """Build the function that applies the inverse Gram matrix of the environment of the core at `index`.

    The function maps a tensor with the shape of the core to one of the same shape; it is linear and positive
    semi-definite. For large cores, one Gram matrix for each bond is inverted instead, as an approximation.
    """
    grams = plan_grams(topology, index)
    others = [core.to(working_dtype(core.dtype)) for k, core in enumerate(cores) if k != index]
    inverses = []
    for gram in grams:
        found = run(gram.plan, [*(x.conj() for x in others), *others]).reshape(
            gram.batch, gram.size, gram.size
        )
        values, vectors = torch.linalg.eigh(found)
        floor = _CUTOFF[cores[index].dtype] * values[:, -1:].clamp_min(0)
        inverse = torch.where((values > floor) & (values > 0), 1 / values, 0)
        inverses.append(((vectors * inverse[:, None, :]) @ vectors.mH).to(cores[index].dtype))

    def solve(tensor: Tensor) -> Tensor:
        for gram, inverse in zip(grams, inverses, strict=True):
            moved = tensor.permute(gram.order)
            shape = moved.shape
            solved = inverse @ moved.reshape(gram.batch, gram.size, -1)
            tensor = solved.reshape(shape).permute(gram.back)
        return tensor

    return solve


@dataclass(frozen=True)
class GramPlan:
    """Plan for the Gram matrix of a core's environment, and the axes of the core on which this matrix acts.

    Args:
        plan: contraction whose operands are the conjugates of the other cores, then the other cores. Its
            result can be reshaped to `(batch, size, size)`.
        batch: product of the sizes of the legs that the core shares with other cores.
        size: product of the sizes of the bonds that the matrix acts on.
        order: permutation of the core's axes: shared legs first, then these bonds, then all other axes.
        back: inverse of the permutation `order`.
    """

    plan: ContractionPlan
    batch: int
    size: int
    order: tuple[int, ...]
    back: tuple[int, ...]


@lru_cache(maxsize=4096)
def plan_grams(topology: Topology, index: int) -> tuple[GramPlan, ...]:
    """Plan the Gram matrix of a core's environment or, if it is too large, one Gram matrix for each bond."""
    legs, sizes = {*topology.out_labels, *topology.in_labels}, topology.size_of
    own = topology.cores[index].labels
    others = [core.labels for k, core in enumerate(topology.cores) if k != index]
    elsewhere = {x for labels in others for x in labels}
    batch = [x for x in own if x in legs and x in elsewhere]
    bonds = [x for x in own if x not in legs and x in elsewhere]
    whole = math.prod(sizes[x] for x in bonds) <= _WHOLE
    doubled = {**sizes, **{f"{x}'": size for x, size in sizes.items()}}
    found = []
    for group in ([bonds] if whole else [[x] for x in bonds]) if bonds else []:
        # In the conjugate of the environment, legs and the core's bonds outside of `group` keep their labels.
        # The bonds in `group`, and those inside the environment, get primed labels.
        common = legs | {x for x in own if x not in group}
        plain = [tuple(x if x in common else f"{x}'" for x in labels) for labels in others]
        primed = tuple(f"{x}'" for x in group)
        plan = plan_contraction([*others, *plain], (*batch, *group, *primed), doubled)
        front = [own.index(x) for x in (*batch, *group)]
        order = (*front, *(axis for axis in range(len(own)) if axis not in front))
        back = tuple(order.index(axis) for axis in range(len(own)))
        batches, size = (math.prod(sizes[x] for x in labels) for labels in (batch, group))
        found.append(GramPlan(plan, batches, size, order, back))
    return tuple(found)


# --- leg-whitened coordinates, in which the moment of every leg is the identity ---------------------


@torch.no_grad()
def fit_weighted(
    decompose: Decompose, matrix: Tensor, topology: Topology, weighting: Weighting, *, sweeps: int
) -> TensorNetwork:
    """Fit a network to a matrix under a weighting, starting from the better of two decompositions.

    The first start is the result of `decompose` in leg-whitened coordinates (see `Legs`). It is refined by
    alternating least squares in these coordinates. There a few steps do as much as hundreds of steps in the
    coordinates of the matrix. If decomposing the matrix itself gives a smaller weighted error, that result is
    refined and returned instead.

    Args:
        decompose: function that decomposes a matrix into a network of a given topology.
        matrix: the matrix, shape `(out, in)`.
        topology: topology of the network.
        weighting: sensitivity of the loss to errors.
        sweeps: number of sweeps of alternating least squares; 0 returns the start.
    """
    legs = legs_of(topology, weighting)
    plain = decompose(matrix, topology)
    made = legs.decompose(decompose, matrix, topology) if legs.roots else plain
    if sweeps > 0 and legs.roots:
        whitened = legs.whitened(matrix, made, weighting)
        fit = fit_network(*whitened, sweeps=sweeps, steps=_LEG_STEPS)
        made = legs.undone(fit.network, topology, result_dtype(matrix.dtype))
    if legs.roots and weighting.cost(matrix - plain.to_matrix()) <= weighting.cost(matrix - made.to_matrix()):
        made = plain
    if sweeps > 0 and made is plain:
        made = fit_network(matrix, plain, weighting, sweeps=sweeps).network
    return made


def leading(network: TensorNetwork, topology: Topology) -> TensorNetwork:
    """Truncate each bond of a network to its size in `topology` by keeping the first values of its index.

    The values must be sorted by importance, as after TT-SVD.
    """
    sizes = topology.core_shapes.values()
    cut = [core[tuple(slice(n) for n in shape)] for core, shape in zip(network.cores, sizes, strict=True)]
    return TensorNetwork(topology, [core.contiguous() for core in cut])


@dataclass(frozen=True)
class Legs:
    """Leg-whitened coordinates, in which the moment of every leg is the identity.

    For this purpose, each moment of the matrix is approximated by a Kronecker product of moments of the legs.

    Args:
        roots: for each leg label, a matrix `L` with `L L^T` equal to the moment of the leg, and the inverse
            of `L`. Both are vectors if the moment is diagonal. Legs without a moment are absent.
        sides: labels of the out-legs, and of the in-legs.
        dims: sizes of the out-legs, and of the in-legs.
    """

    roots: Mapping[str, tuple[Tensor, Tensor]]
    sides: tuple[tuple[str, ...], tuple[str, ...]]
    dims: tuple[tuple[int, ...], tuple[int, ...]]

    def decompose(self, decompose: Decompose, matrix: Tensor, topology: Topology) -> TensorNetwork:
        """Decompose a matrix in leg-whitened coordinates, and transform the cores back."""
        found = decompose(self.whitened_matrix(matrix), _unpadded(topology))
        return self.undone(found, topology, matrix.dtype)

    def whitened(
        self, matrix: Tensor, network: TensorNetwork, weighting: Weighting
    ) -> tuple[Tensor, TensorNetwork, Weighting]:
        """Transform a matrix, a network and a weighting to whitened coordinates.

        The weighted error of the network is unchanged.
        """
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
        """Compute `Lr^T W Lc`, the padded matrix in leg-whitened coordinates.

        `Lr` and `Lc` are the Kronecker products of the roots of the out-legs and of the in-legs.
        """
        shape = tuple(math.prod(dims) for dims in self.dims)
        work = pad_matrix(matrix.double(), shape[0], shape[1]).reshape(*self.dims[0], *self.dims[1])
        for axis, label in enumerate((*self.sides[0], *self.sides[1])):
            if label in self.roots:
                work = _on_axis(work, axis, transposed(self.roots[label][0]))
        return work.reshape(shape)

    def _moment(
        self, labels: Sequence[str], dims: Sequence[int], features: int, moment: Tensor | None
    ) -> Tensor | None:
        """Transform a moment `M` to leg-whitened coordinates, `L^-1 M L^-T`; padding gets zero weight."""
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
        """Multiply every leg of every core by `L^T` or, if `inverse`, by the inverse of `L^T`."""
        moved = []
        for spec, core in zip(topology.cores, cores, strict=True):
            work = core.double()
            for position, label in enumerate(spec.labels):
                if label in self.roots:
                    work = _on_axis(work, position, transposed(self.roots[label][int(inverse)]))
            moved.append(work)
        return moved


def legs_of(topology: Topology, weighting: Weighting) -> Legs:
    """Compute leg-whitened coordinates; without a weighting, or if cores share a leg, no leg is whitened."""
    roots: dict[str, tuple[Tensor, Tensor]] = {}
    sides, sizes = (topology.out_labels, topology.in_labels), (topology.out_dims, topology.in_dims)
    labels_of = [core.labels for core in topology.cores]
    if all(sum(leg in labels for labels in labels_of) == 1 for leg in (*sides[0], *sides[1])):
        for labels, dims, moment in zip(sides, sizes, (weighting.rows, weighting.columns), strict=True):
            factors = [] if moment is None else leg_moments(moment, dims)
            roots |= {x: root(damped(f, FIT_DAMPING)) for x, f in zip(labels, factors, strict=False)}
    return Legs(roots, sides, sizes)


def _unpadded(topology: Topology) -> Topology:
    rows, columns = topology.padded_shape
    return replace(topology, out_features=rows, in_features=columns)


def _on_axis(tensor: Tensor, axis: int, factor: Tensor) -> Tensor:
    """Multiply one axis of a tensor by a matrix, or by a diagonal matrix given as a vector."""
    if factor.ndim == 1:
        return tensor * factor.reshape([-1 if k == axis else 1 for k in range(tensor.ndim)])
    return torch.movedim(torch.tensordot(factor, tensor, ([1], [axis])), 0, axis)


def leg_moments(moment: Tensor, dims: Sequence[int]) -> list[Tensor]:
    """Approximate a moment `(n, n)` or `(n,)` by a Kronecker product of one moment for each leg.

    The moment of a leg is the partial trace over the other legs, scaled so that its diagonal has mean 1. The
    product of `dims` may exceed `n`; padding has zero weight.
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
