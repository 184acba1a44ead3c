"""Slow reference implementations in NumPy and double precision, for small operators.

Most functions are a single `numpy.einsum` over all indices, or a dense SVD.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tensornet.topology import Topology

Array = NDArray[Any]


def to_numpy(tensor: Tensor) -> Array:
    """Convert a tensor to a NumPy array in double precision.

    Example:
        >>> from tensornet.testing import reference
        >>> reference.to_numpy(torch.ones(2)).dtype
        dtype('float64')
    """
    double = tensor.detach().cpu().to(torch.complex128 if tensor.is_complex() else torch.float64)
    return double.resolve_conj().resolve_neg().numpy()


def network_matrix(topology: Topology, cores: Sequence[Tensor]) -> Array:
    """Compute the dense matrix of a network by one sum over all bonds, shape `(out_features, in_features)`.

    Example:
        >>> from tensornet.testing import reference
        >>> network = tn.decompose(torch.randn(6, 4), "tucker").network
        >>> reference.network_matrix(network.topology, network.cores).shape
        (6, 4)
    """
    if topology.terms:
        terms = [network_matrix(part, [cores[k] for k in places]) for places, part in topology.parts]
        return np.stack(terms).sum(0)
    number = {label: k for k, label in enumerate(topology.size_of)}
    operands: list[Any] = []
    for spec, core in zip(topology.cores, cores, strict=True):
        operands += [to_numpy(core), [number[label] for label in spec.labels]]
    legs = [number[label] for label in (*topology.out_labels, *topology.in_labels)]
    dense = np.einsum(*operands, legs).reshape(topology.padded_shape)
    return dense[: topology.out_features, : topology.in_features]


def chain_matrix(cores: Sequence[Tensor]) -> Array:
    """Compute the dense matrix of a chain of cores `(left, out, in, right)`, one element at a time.

    Example:
        >>> from tensornet.testing import reference
        >>> matrix = torch.randn(6, 4).double()
        >>> dense = reference.chain_matrix(tn.MPO.from_matrix(matrix, sites=2).cores)
        >>> reference.relative_error(matrix, dense) < 1e-12
        True
    """
    arrays = [to_numpy(core) for core in cores]
    out_dims, in_dims = [a.shape[1] for a in arrays], [a.shape[2] for a in arrays]
    dense = np.zeros((int(np.prod(out_dims)), int(np.prod(in_dims))), dtype=arrays[0].dtype)
    for row, outs in enumerate(np.ndindex(*out_dims)):
        for column, ins in enumerate(np.ndindex(*in_dims)):
            product = np.eye(1)
            for core, o, i in zip(arrays, outs, ins, strict=True):
                product = product @ core[:, o, i, :]
            dense[row, column] = product[0, 0]
    return dense


def network_gradients(topology: Topology, cores: Sequence[Tensor], dense_gradient: Tensor) -> list[Array]:
    """Compute the gradient of each core from the gradient of the dense matrix, for real-valued networks.

    The derivative of the matrix with respect to a core is the network without this core. So the gradient of
    the core is the rest of the network contracted with the gradient of the matrix. In a sum of networks,
    terms without this core are constants.

    Example:
        >>> from tensornet.testing import reference
        >>> network = tn.decompose(torch.randn(6, 4), "low_rank", max_bond=2).network
        >>> [g.shape for g in reference.network_gradients(network.topology, network.cores, torch.ones(6, 4))]
        [(1, 6, 1, 2), (2, 1, 4, 1)]
    """
    if topology.terms:
        parts = [([cores[k] for k in places], part) for places, part in topology.parts]
        return [x for own, part in parts for x in network_gradients(part, own, dense_gradient)]
    number = {label: k for k, label in enumerate(topology.size_of)}
    padded = np.zeros(topology.padded_shape)
    padded[: topology.out_features, : topology.in_features] = to_numpy(dense_gradient)
    legs = [number[label] for label in (*topology.out_labels, *topology.in_labels)]
    gradients = []
    for left_out in topology.cores:
        operands: list[Any] = [padded.reshape(*topology.out_dims, *topology.in_dims), legs]
        shape = [topology.size_of[label] for label in left_out.labels]
        # A bond of size 1 may belong to this core alone. A tensor of ones adds the label of such a bond.
        operands += [np.ones(shape), [number[label] for label in left_out.labels]]
        for spec, core in zip(topology.cores, cores, strict=True):
            if spec is not left_out:
                operands += [to_numpy(core), [number[label] for label in spec.labels]]
        gradients.append(np.einsum(*operands, [number[label] for label in left_out.labels]))
    return gradients


def unfolding(matrix: Tensor, out_dims: Sequence[int], in_dims: Sequence[int], bond: int) -> Array:
    """Reshape an unpadded matrix so that rows are the legs up to a bond, and columns are the legs after it.

    Example:
        >>> from tensornet.testing import reference
        >>> reference.unfolding(torch.randn(6, 4), out_dims=(2, 3), in_dims=(2, 2), bond=0).shape
        (4, 6)
    """
    sites = len(out_dims)
    order = [axis for k in range(sites) for axis in (k, sites + k)]
    tensor = to_numpy(matrix).reshape(*out_dims, *in_dims).transpose(order)
    rows = int(np.prod([out_dims[k] * in_dims[k] for k in range(bond + 1)]))
    return tensor.reshape(rows, -1)


def best_error(matrix: Tensor | Array, rank: int) -> float:
    """Compute the relative Frobenius error of the best approximation of a matrix by one of a given rank.

    Example:
        >>> from tensornet.testing import reference
        >>> reference.best_error(torch.diag(torch.tensor([3.0, 4.0])), rank=1)
        0.6
    """
    array = to_numpy(matrix) if isinstance(matrix, Tensor) else matrix
    values = np.linalg.svd(array, compute_uv=False)
    total = float(np.sum(values**2))
    return float(np.sqrt(np.sum(values[rank:] ** 2) / total)) if total > 0 else 0.0


def error_bound(matrix: Tensor | Array, topology: Topology) -> float | None:
    """Compute the largest relative error that a good decomposition with given bonds may have.

    A cut is a bond whose removal splits the network in two. If the matrix is reshaped to `(legs on one side,
    legs on the other side)`, the network approximates it with rank `r`, the size of the bond. So the error of
    the network is at least `e`, the norm of the discarded singular values. Truncating one cut after another
    gives an error of at most `sqrt(sum of e^2)`. This is the bound; it is at most `sqrt(number of cuts)`
    times the best error.

    If all truncated bonds separate rows from columns, the bound is the error of the truncated SVD. A leg on
    both sides of a cut splits the reshaped matrix into blocks that are truncated one by one. The bound of a
    sum of networks is the smallest bound of its terms.

    Args:
        matrix: matrix, shape `(out_features, in_features)`.
        topology: topology of the decomposition, including its bonds.

    Returns:
        The bound, relative to the norm of the matrix; None if bonds form a loop.

    Reference:
        Oseledets 2011, "Tensor-Train Decomposition", theorem 2.2 and corollary 2.4; Grasedyck 2010,
        "Hierarchical Singular Value Decomposition of Tensors", theorem 3.11.

    Example:
        >>> from tensornet.testing import reference
        >>> topology = tn.topologies.low_rank(out_features=2, in_features=2, rank=1)
        >>> reference.error_bound(torch.diag(torch.tensor([3.0, 4.0])), topology)
        0.6
    """
    array = to_numpy(matrix) if isinstance(matrix, Tensor) else matrix
    if topology.terms:
        bounds = [error_bound(array, part) for _, part in topology.parts]
        return min((bound for bound in bounds if bound is not None), default=None)
    edges = _tree(topology)
    if edges is None:
        return None
    padded = np.zeros(topology.padded_shape, dtype=array.dtype)
    padded[: array.shape[0], : array.shape[1]] = array
    legs = (*topology.out_labels, *topology.in_labels)
    tensor = padded.reshape(*topology.out_dims, *topology.in_dims)
    tails, separates = [], True
    for a, b, rank in edges:
        left = _reachable(a, [edge for edge in edges if edge != (a, b, rank)])
        sides = [
            {x for k, core in enumerate(topology.cores) if (k in left) == own for x in core.labels}
            for own in (True, False)
        ]
        both = [x for x in legs if x in sides[0] and x in sides[1]]
        rows, columns = ([x for x in legs if x in side and x not in both] for side in sides)
        moved = tensor.transpose([legs.index(x) for x in (*both, *rows, *columns)])
        shape = [int(np.prod([topology.size_of[x] for x in group])) for group in (both, rows, columns)]
        values = np.linalg.svd(moved.reshape(shape), compute_uv=False)
        if rank < values.shape[-1]:
            tails.append(float(np.sqrt(np.sum(values[..., rank:] ** 2))))
            long = {x for x in legs if topology.size_of[x] > 1}
            ends = [long & set(topology.out_labels), long & set(topology.in_labels)]
            separates &= [long & set(rows), long & set(columns)] in (ends, ends[::-1])
    size = float(np.linalg.norm(array)) or 1.0
    return (max(tails, default=0.0) if separates else float(np.linalg.norm(tails))) / size


def _tree(topology: Topology) -> list[tuple[int, int, int]] | None:
    """List the edges `(core, core, rank)` of a tree of all cores; None if the bonds form a loop.

    If two parts of the network are not joined by bonds, the tree joins them by an edge of rank 1.
    """
    sizes: dict[tuple[int, ...], int] = {}
    for label, size in topology.bond_dims.items():
        ends = tuple(k for k, core in enumerate(topology.cores) if label in core.labels)
        sizes[ends] = sizes.get(ends, 1) * size  # all bonds between the same two cores count as one
    edges: list[tuple[int, int, int]] = []
    for ends, size in sizes.items():
        if len(ends) > 2 or (len(ends) == 2 and ends[1] in _reachable(ends[0], edges)):
            return None
        if len(ends) == 2:
            edges.append((ends[0], ends[1], size))
    for core in range(1, len(topology.cores)):
        if core not in _reachable(0, edges):
            edges.append((core - 1, core, 1))
    return edges


def _reachable(start: int, edges: Sequence[tuple[int, int, int]]) -> set[int]:
    found, before = {start}, 0
    while len(found) > before:
        before = len(found)
        found |= {x for a, b, _ in edges if a in found or b in found for x in (a, b)}
    return found


def relative_error(matrix: Tensor | Array, approximation: Tensor | Array) -> float:
    """Compute `|W - W'|_F / |W|_F`, or `|W'|_F` if W is zero.

    Example:
        >>> from tensornet.testing import reference
        >>> reference.relative_error(torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 0.0]]))
        0.8
    """
    true, other = (to_numpy(x) if isinstance(x, Tensor) else x for x in (matrix, approximation))
    size = float(np.linalg.norm(true))
    return float(np.linalg.norm(true - other)) / (size or 1.0)
