"""Networks of several matrices that share one core: a factor of their inputs, of their outputs, or a base.

All three are fitted to the sum of the matrices' weighted errors `1/2 tr(R_e E_e C_e E_e^T)`, each with
moments of its own, as the experts of a mixture have:

- `inputs`: `W_e = A_e B`, one projection `B` of the inputs for all;
- `outputs`: `W_e = A B_e`, one basis `A` of the outputs for all;
- `base`: `W_e = W_0 + A_e B_e`, one dense matrix for all and a low rank for each.

The shared factor comes from one SVD of all matrices under pooled moments, which is exact where the moments
are equal; each private factor is then the least-squares optimum under the moments of its own matrix.

Reference:
    Gu et al. 2025, "Delta Decompression for MoE-based LLMs Compression" (the base). Shared factors under
    moments of two sides are our extension.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tensornet.linalg.svd import working_dtype
from tensornet.linalg.weighted_svd import Weighting, root, weighted_svd
from tensornet.network import TensorNetwork
from tensornet.topologies import low_rank
from tensornet.topologies.residual_family import BASE, residual
from tensornet.topology import Topology

#: How often the base and the low ranks are fitted in turn.
_ALTERNATIONS = 3


@dataclass(frozen=True)
class SharedForm:
    """One way in which several matrices of one shape may share a core.

    Args:
        core: name of the shared core.
        build: topology of one matrix, of `(out_features, in_features, rank)`.
        rank: largest rank with at most so many numbers, of `(count, out_features, in_features, numbers)`;
            0 if none fits.
        fit: networks of all matrices, of `(matrices, weightings, rank)`.
    """

    core: str
    build: Callable[[int, int, int], Topology]
    rank: Callable[[int, int, int, int], int]
    fit: Callable[[Sequence[Tensor], Sequence[Weighting], int], list[tuple[Tensor, ...]]]


def fit_form(
    name: str, matrices: Sequence[Tensor], weightings: Sequence[Weighting], rank: int
) -> list[TensorNetwork]:
    """Fit networks with one shared core, which is the same tensor in every network.

    Args:
        name: a key of `SHARED_FORMS`.
        matrices: each `(out, in)`.
        weightings: sensitivity of the loss to errors in each.
        rank: of the factors.

    Example:
        >>> import torch
        >>> from tensornet.linalg.weighted_svd import Weighting
        >>> common = torch.randn(2, 8)
        >>> matrices = [torch.randn(6, 2) @ common for _ in range(3)]
        >>> first, *others = fit_form("inputs", matrices, [Weighting()] * 3, 2)
        >>> torch.allclose(first.to_matrix().float(), matrices[0], atol=1e-4)
        True
        >>> others[0].cores[1] is first.cores[1]
        True
    """
    form = SHARED_FORMS[name]
    rows, columns = matrices[0].shape
    work = [matrix.detach().to(working_dtype(matrix.dtype)) for matrix in matrices]
    topology = form.build(rows, columns, rank)
    shapes = topology.core_shapes.values()
    made: dict[int, Tensor] = {}  # one view of each shared tensor
    networks = []
    for cores in form.fit(work, weightings, rank):
        views = [
            made.setdefault(id(core), core.reshape(shape)) for core, shape in zip(cores, shapes, strict=True)
        ]
        networks.append(TensorNetwork(topology, views))
    return networks


def _fit_inputs(
    matrices: Sequence[Tensor], weightings: Sequence[Weighting], rank: int
) -> list[tuple[Tensor, ...]]:
    shared = _shared_rows(matrices, weightings, rank)
    return [(_left_factor(w, shared, x.columns), shared) for w, x in zip(matrices, weightings, strict=True)]


def _fit_outputs(
    matrices: Sequence[Tensor], weightings: Sequence[Weighting], rank: int
) -> list[tuple[Tensor, ...]]:
    turned = [Weighting(x.columns, x.rows) for x in weightings]
    made = _fit_inputs([matrix.T for matrix in matrices], turned, rank)
    shared = made[0][1].T.contiguous()
    return [(shared, right.T.contiguous()) for right, _ in made]


def _fit_base(
    matrices: Sequence[Tensor], weightings: Sequence[Weighting], rank: int
) -> list[tuple[Tensor, ...]]:
    sizes = [
        _trace(x.rows, w.shape[0]) * _trace(x.columns, w.shape[1])
        for w, x in zip(matrices, weightings, strict=True)
    ]
    rest, best, least = list(matrices), [], float("inf")
    for _ in range(_ALTERNATIONS):
        base = sum((s * w for s, w in zip(sizes, rest, strict=True)), start=torch.zeros_like(rest[0]))
        base = base / sum(sizes)
        pairs = [weighted_svd(w - base, x).factors(rank) for w, x in zip(matrices, weightings, strict=True)]
        rest = [w - left @ right for w, (left, right) in zip(matrices, pairs, strict=True)]
        cost = sum(x.cost(w - base) for x, w in zip(weightings, rest, strict=True))
        if cost >= least:
            break
        least, best = cost, [(base, left.contiguous(), right.contiguous()) for left, right in pairs]
    return best  # type: ignore[return-value]


def _shared_rows(matrices: Sequence[Tensor], weightings: Sequence[Weighting], rank: int) -> Tensor:
    """Return the rows `(rank, in)` that span all matrices best under pooled moments of the inputs."""
    pooled: Tensor | None = None
    if any(x.columns is not None for x in weightings):
        pooled = torch.zeros(2 * matrices[0].shape[1:], dtype=matrices[0].dtype, device=matrices[0].device)
        for w, x in zip(matrices, weightings, strict=True):
            pooled += _trace(x.rows, w.shape[0]) * _full(x.columns, w.shape[1], pooled)
    stacked = torch.cat([_whitened(w, x.rows) for w, x in zip(matrices, weightings, strict=True)])
    _, shared = weighted_svd(stacked, Weighting(None, pooled)).factors(rank)
    return shared.contiguous()


def _left_factor(matrix: Tensor, right: Tensor, columns: Tensor | None) -> Tensor:
    """Return the best `A` of `W ~ A B` under a moment of the inputs: `W C B^T (B C B^T)^-1`."""
    moved = right.T if columns is None else _full(columns, len(right.T), matrix) @ right.T
    gram = right @ moved
    return torch.linalg.lstsq(gram, (matrix @ moved).T).solution.T.contiguous()


def _whitened(matrix: Tensor, rows: Tensor | None) -> Tensor:
    if rows is None:
        return matrix
    factor, _ = root(rows.to(matrix))
    return factor[:, None] * matrix if factor.ndim == 1 else factor.T @ matrix


def _trace(moment: Tensor | None, size: int) -> float:
    if moment is None:
        return float(size)
    return float(moment.sum() if moment.ndim == 1 else moment.diagonal().sum())


def _full(moment: Tensor | None, size: int, like: Tensor) -> Tensor:
    if moment is None:
        return torch.eye(size, dtype=like.dtype, device=like.device)
    return torch.diag(moment.to(like)) if moment.ndim == 1 else moment.to(like)


def _low_rank(out_features: int, in_features: int, rank: int) -> Topology:
    return low_rank(out_features=out_features, in_features=in_features, rank=rank)


def _residual(out_features: int, in_features: int, rank: int) -> Topology:
    return residual(out_features=out_features, in_features=in_features, rank=rank)


def _within(rank: int, rows: int, columns: int) -> int:
    return max(0, min(rank, rows, columns))


#: All forms, by name.
SHARED_FORMS = {
    "inputs": SharedForm(
        "1", _low_rank, lambda n, o, i, size: _within(size // (i + n * o), o, i), _fit_inputs
    ),
    "outputs": SharedForm(
        "0", _low_rank, lambda n, o, i, size: _within(size // (o + n * i), o, i), _fit_outputs
    ),
    "base": SharedForm(
        BASE, _residual, lambda n, o, i, size: _within((size - o * i) // (n * (o + i)), o, i), _fit_base
    ),
}
