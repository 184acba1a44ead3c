"""Networks of several matrices that share one core: a factor of their inputs, of their outputs, or a base.

All three are fitted to the sum of the matrices' weighted errors `1/2 tr(R_e E_e C_e E_e^T)`, each with
moments of its own, as the experts of a mixture have:

- `inputs`: `W_e = A_e B`, one projection `B` of the inputs for all;
- `outputs`: `W_e = A B_e`, one basis `A` of the outputs for all;
- `base`: `W_e = W_0 + A_e B_e`, one dense matrix for all and a low rank for each.

The shared factor comes from one SVD of all matrices under pooled moments, which is exact where the moments
are equal; each private factor is then the least-squares optimum under the moments of its own matrix. Shared
factors of all ranks are nested, so that `form_curve` predicts the losses of all ranks at once.

Reference:
    Gu et al. 2025, "Delta Decompression for MoE-based LLMs Compression" (the base). Shared factors under
    moments of two sides are our extension.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tensornet.linalg.svd import working_dtype
from tensornet.linalg.weighted_svd import (
    WeightedSVD,
    Weighting,
    leading_costs,
    other_tail_costs,
    root,
    tail_costs,
    weighted_svd,
)
from tensornet.network import TensorNetwork
from tensornet.nn.storage import PLAIN, Storage
from tensornet.topologies import low_rank
from tensornet.topologies.residual_family import BASE, residual
from tensornet.topology import Topology

#: Factor between the ranks at which a base is fitted, from 1 on. Starting from the base of the rank before,
#: one round at each comes closer than three from the mean.
_GROWTH = 4
#: Directions below this share of the strongest are rounding, and no ranks are planned for them.
_LEAST_DIRECTION = 1e-7

#: Matrix, and factors whose leading ranks approximate it: `(out, in)`, `(out, k)`, `(k, in)`.
Factors = tuple[Tensor, Tensor, Tensor]
#: Factors, or the whitened SVD of a matrix, whose losses take fewer products of moments.
Terms = Factors | WeightedSVD
#: Cores of each matrix, in the order of the topology; the shared one is the same tensor for all.
Cores = list[tuple[Tensor, ...]]


@dataclass(frozen=True)
class SharedForm:
    """One way in which several matrices of one shape may share a core.

    Args:
        core: name of the shared core.
        build: topology of one matrix, of `(out_features, in_features, rank)`.
        numbers: stored numbers of all matrices, of `(count, out_features, in_features, rank)`.
        fits: cores of all matrices at each rank, of `(matrices, weightings, ranks)`.
        terms: approximations of each matrix at all ranks, of `(matrices, weightings)`; once for each shared
            factor from which the best is taken at each rank.
    """

    core: str
    build: Callable[[int, int, int], Topology]
    numbers: Callable[[int, int, int, int], int]
    fits: Callable[[Sequence[Tensor], Sequence[Weighting], Sequence[int]], Iterator[Cores]]
    terms: Callable[[Sequence[Tensor], Sequence[Weighting]], Iterator[Terms]]


@dataclass(frozen=True)
class FormCurve:
    """Sizes and predicted losses of one shared form in one encoding, at the ranks `1 ... k`.

    Args:
        name: a key of `SHARED_FORMS`.
        numbers: stored numbers of all matrices together, shape `(k,)`.
        num_bytes: their bytes, likewise.
        costs: predicted loss increases that decide, of each matrix, shape `(count, k)`.
        forecasts: predicted loss increases that are reported, likewise.
        errors: relative Frobenius errors, likewise.
        storage: encoding of the cores.
    """

    name: str
    numbers: Tensor
    num_bytes: Tensor
    costs: Tensor
    forecasts: Tensor
    errors: Tensor
    storage: Storage = PLAIN


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
    topology = form.build(rows, columns, rank)
    shapes = topology.core_shapes.values()
    made: dict[int, Tensor] = {}  # one view of each shared tensor
    networks = []
    for cores in next(form.fits(working(matrices), weightings, [rank])):
        views = [
            made.setdefault(id(core), core.reshape(shape)) for core, shape in zip(cores, shapes, strict=True)
        ]
        networks.append(TensorNetwork(topology, views))
    return networks


def form_curve(
    name: str,
    matrices: Sequence[Tensor],
    weightings: Sequence[Weighting],
    forecasts: Sequence[Weighting],
) -> FormCurve:
    """Predict the losses of one form at all ranks with fewer numbers than the matrices have.

    The losses are those of what `fit_form` makes.

    Args:
        name: a key of `SHARED_FORMS`.
        matrices: each `(out, in)`.
        weightings: sensitivities that the form is fitted under.
        forecasts: sensitivities that the loss is predicted with.

    Example:
        >>> import torch
        >>> from tensornet.linalg.weighted_svd import Weighting
        >>> matrices = [torch.randn(6, 2) @ torch.randn(2, 8) for _ in range(3)]
        >>> curve = form_curve("inputs", matrices, [Weighting()] * 3, [Weighting()] * 3)
        >>> curve.numbers.int().tolist(), curve.costs.shape
        ([26, 52, 78, 104, 130], torch.Size([3, 5]))
    """
    form, count = SHARED_FORMS[name], len(matrices)
    rows, columns = matrices[0].shape
    whole = count * rows * columns
    sizes = [form.numbers(count, rows, columns, rank) for rank in range(1, min(rows, columns) + 1)]
    known = sum(size < whole for size in sizes)
    nothing = torch.zeros(3, count, known, dtype=torch.float64)
    best = nothing + torch.inf  # shape: (values, matrices, ranks)
    found: list[Tensor] = []
    for place, terms in enumerate(form.terms(working(matrices), weightings) if known else ()):
        k = place % count
        found.append(_values(terms, matrices[k], weightings[k], forecasts[k], known))
        if k == count - 1:
            values = torch.stack(found[-count:], dim=1)
            better = values[0].sum(0) < best[0].sum(0)
            best, found = torch.where(better, values, best), []
    known = int(best[0].sum(0).isfinite().sum())
    numbers = torch.tensor(sizes[:known], dtype=torch.float64)
    return FormCurve(name, numbers, numbers * matrices[0].element_size(), *best[:, :, :known])


def _values(terms: Terms, matrix: Tensor, weighting: Weighting, forecast: Weighting, known: int) -> Tensor:
    """Compute cost, forecast and relative error of one matrix at all ranks, shape `(3, known)`."""
    found = rank_costs(terms, weighting, forecast, known)
    found[2] = relative_errors(found[2], matrix)
    return found


def rank_costs(terms: Terms, weighting: Weighting, forecast: Weighting, known: int) -> Tensor:
    """Compute the losses of one matrix at the ranks `1 ... known`: cost, forecast, and without weighting.

    Returns:
        Shape `(3, known)`; infinite at ranks for which there are no terms.
    """
    if isinstance(terms, WeightedSVD):
        predicted = other_tail_costs(terms, weighting, forecast)
        found = torch.stack([terms.error, predicted, tail_costs(terms, Weighting())])
    else:
        costs = leading_costs(*terms, weighting)
        predicted = costs if forecast is weighting else leading_costs(*terms, forecast)
        found = torch.stack([costs, predicted, leading_costs(*terms, Weighting())])
    found = found[:, 1 : known + 1].cpu()
    return torch.nn.functional.pad(found, (0, known - found.shape[1]), value=torch.inf)


def relative_errors(costs: Tensor, matrix: Tensor) -> Tensor:
    """Convert losses without weighting, half the squared errors, to relative Frobenius errors."""
    norm = torch.linalg.vector_norm(matrix, dtype=torch.float64).clamp_min(1e-300).cpu()
    return (2 * costs).sqrt() / norm


def form_of(topology: Topology, core: str) -> str | None:
    """Find the shared form to which a topology and its shared core belong, or None."""
    rank = max(topology.bond_dims.values(), default=0)
    for name, form in SHARED_FORMS.items():
        if form.core == core and rank and _sorted(form.build(*topology.shape, rank)) == _sorted(topology):
            return name
    return None


def _sorted(topology: Topology) -> Topology:
    """Sort the sizes of labels, whose order is lost in files."""
    return replace(topology, sizes=tuple(sorted(topology.sizes)))


def working(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Convert matrices to double precision."""
    return [matrix.detach().to(working_dtype(matrix.dtype)) for matrix in matrices]


def _input_fits(
    matrices: Sequence[Tensor], weightings: Sequence[Weighting], ranks: Sequence[int]
) -> Iterator[Cores]:
    known = _shared_rows(matrices, weightings)
    for rank in ranks:
        shared = known[:rank].contiguous()
        if len(shared) < rank:  # the matrices span no more directions
            shared = torch.cat([shared, shared.new_zeros(rank - len(shared), shared.shape[1])])
        yield [
            (_left_factor(w, shared, x.columns), shared) for w, x in zip(matrices, weightings, strict=True)
        ]


def _output_fits(
    matrices: Sequence[Tensor], weightings: Sequence[Weighting], ranks: Sequence[int]
) -> Iterator[Cores]:
    for made in _input_fits(*_turned(matrices, weightings), ranks):
        shared = made[0][1].T.contiguous()
        yield [(shared, right.T.contiguous()) for right, _ in made]


def _base_fits(
    matrices: Sequence[Tensor], weightings: Sequence[Weighting], ranks: Sequence[int]
) -> Iterator[Cores]:
    for rank in ranks:
        bases = _bases(matrices, weightings)
        base, found = min(bases, key=lambda x: sum(float(y.error[rank]) for y in x[1]))
        yield [(base, *(factor.contiguous() for factor in each.factors(rank))) for each in found]


def _input_terms(matrices: Sequence[Tensor], weightings: Sequence[Weighting]) -> Iterator[Factors]:
    """Yield the least-squares factors of every rank: the shared rows, made orthonormal under each moment."""
    shared = _shared_rows(matrices, weightings)[: min(matrices[0].shape)]
    for w, x in zip(matrices, weightings, strict=True):
        moved = shared.T if x.columns is None else full_moment(x.columns, w.shape[1], w) @ shared.T
        lower, info = torch.linalg.cholesky_ex(shared @ moved)
        if int(info):  # the moment sees fewer directions
            lower = lower[: int(info) - 1, : int(info) - 1]
        rows = torch.linalg.solve_triangular(lower, shared[: len(lower)], upper=False)
        half = torch.linalg.solve_triangular(lower, (w @ moved[:, : len(lower)]).T, upper=False)
        yield w, half.T, rows


def _output_terms(matrices: Sequence[Tensor], weightings: Sequence[Weighting]) -> Iterator[Factors]:
    for w, left, right in _input_terms(*_turned(matrices, weightings)):
        yield w.T, right.T, left.T


def _base_terms(matrices: Sequence[Tensor], weightings: Sequence[Weighting]) -> Iterator[Terms]:
    for base, found in _bases(matrices, weightings):
        for w, each in zip(matrices, found, strict=True):
            yield terms_of(w - base, each)


def terms_of(rest: Tensor, found: WeightedSVD) -> Terms:
    """Return the whitened SVD of a matrix, or its terms where a singular moment leaves out a part of it."""
    return found if len(found.values) == min(rest.shape) else (rest, found.left, found.right)


def _bases(
    matrices: Sequence[Tensor], weightings: Sequence[Weighting]
) -> Iterator[tuple[Tensor, list[WeightedSVD]]]:
    """Yield bases, from the mean of the matrices on, each with the SVDs of what it leaves of them.

    The next base is fitted to the low ranks of the one before, whose rank grows.
    """
    count, (rows, columns) = len(matrices), matrices[0].shape
    largest = largest_rank("base", count, rows, columns, count * rows * columns - 1)
    ranks = [1, *(_GROWTH**k for k in range(rows) if _GROWTH**k <= largest)]
    base = mean_matrix(matrices, weightings)
    for rank in (*ranks, None):
        found = [weighted_svd(w - base, x) for w, x in zip(matrices, weightings, strict=True)]
        yield base, found
        if rank is not None:
            pairs = [each.factors(rank) for each in found]
            rest = [w - left @ right for w, (left, right) in zip(matrices, pairs, strict=True)]
            base = mean_matrix(rest, weightings)


def mean_matrix(matrices: Sequence[Tensor], weightings: Sequence[Weighting]) -> Tensor:
    """Average matrices, each weighed by the traces of its moments."""
    sizes = [
        trace(x.rows, w.shape[0]) * trace(x.columns, w.shape[1])
        for w, x in zip(matrices, weightings, strict=True)
    ]
    total = sum((s * w for s, w in zip(sizes, matrices, strict=True)), start=torch.zeros_like(matrices[0]))
    return total / sum(sizes)


def _turned(
    matrices: Sequence[Tensor], weightings: Sequence[Weighting]
) -> tuple[list[Tensor], list[Weighting]]:
    """Exchange the sides of matrices and moments."""
    return [matrix.T for matrix in matrices], [Weighting(x.columns, x.rows) for x in weightings]


def _shared_rows(matrices: Sequence[Tensor], weightings: Sequence[Weighting]) -> Tensor:
    """Return unit rows `(k, in)` whose leading ones span all matrices best under pooled input moments."""
    pooled: Tensor | None = None
    if any(x.columns is not None for x in weightings):
        pooled = torch.zeros(2 * matrices[0].shape[1:], dtype=matrices[0].dtype, device=matrices[0].device)
        for w, x in zip(matrices, weightings, strict=True):
            pooled += trace(x.rows, w.shape[0]) * full_moment(x.columns, w.shape[1], pooled)
    stacked = torch.cat([_whitened(w, x.rows) for w, x in zip(matrices, weightings, strict=True)])
    found = weighted_svd(stacked, Weighting(None, pooled))
    known = int((found.values > _LEAST_DIRECTION * found.values.max()).sum())
    rows = found.right[:known]
    return rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True)


def _left_factor(matrix: Tensor, right: Tensor, columns: Tensor | None) -> Tensor:
    """Return the best `A` of `W ~ A B` under a moment of the inputs: `W C B^T (B C B^T)^-1`."""
    moved = right.T if columns is None else full_moment(columns, len(right.T), matrix) @ right.T
    gram = right @ moved
    return torch.linalg.lstsq(gram, (matrix @ moved).T).solution.T.contiguous()


def _whitened(matrix: Tensor, rows: Tensor | None) -> Tensor:
    if rows is None:
        return matrix
    factor, _ = root(rows.to(matrix))
    return factor[:, None] * matrix if factor.ndim == 1 else factor.T @ matrix


def trace(moment: Tensor | None, size: int) -> float:
    """Compute the trace of a moment: full, diagonal as a vector, or None for the identity."""
    if moment is None:
        return float(size)
    return float(moment.sum() if moment.ndim == 1 else moment.diagonal().sum())


def full_moment(moment: Tensor | None, size: int, like: Tensor) -> Tensor:
    """Convert a moment to a full matrix in the dtype and on the device of a tensor."""
    if moment is None:
        return torch.eye(size, dtype=like.dtype, device=like.device)
    return torch.diag(moment.to(like)) if moment.ndim == 1 else moment.to(like)


def _low_rank(out_features: int, in_features: int, rank: int) -> Topology:
    return low_rank(out_features=out_features, in_features=in_features, rank=rank)


def _residual(out_features: int, in_features: int, rank: int) -> Topology:
    return residual(out_features=out_features, in_features=in_features, rank=rank)


def largest_rank(name: str, count: int, rows: int, columns: int, numbers: int) -> int:
    """Find the largest rank of a form with at most so many numbers; 0 if none fits."""
    first, second = (SHARED_FORMS[name].numbers(count, rows, columns, rank) for rank in (0, 1))
    return max(0, min((numbers - first) // (second - first), rows, columns))


#: All forms, by name.
SHARED_FORMS = {
    "inputs": SharedForm("1", _low_rank, lambda n, o, i, r: r * (i + n * o), _input_fits, _input_terms),
    "outputs": SharedForm("0", _low_rank, lambda n, o, i, r: r * (o + n * i), _output_fits, _output_terms),
    "base": SharedForm(BASE, _residual, lambda n, o, i, r: o * i + n * r * (o + i), _base_fits, _base_terms),
}
