"""Low-rank networks of several matrices that share one core: fitted under the moments of each, and rounded.

Three patterns, each fitted to the sum of the matrices' weighted errors `1/2 tr(R_e E_e C_e E_e^T)`, where the
matrices have moments of their own, as the experts of a mixture do:

- `inputs`: `W_e = A_e B`, one projection `B` of the inputs for all;
- `outputs`: `W_e = A B_e`, one basis `A` of the outputs for all;
- `base`: `W_e = W_0 + A_e B_e`, one dense matrix for all and a low rank for each.

The shared factor comes from one SVD of all matrices under pooled moments, which is exact where the moments
are equal. Each private factor is then the least-squares optimum under the moments of its own matrix. The
shared factors of all ranks are nested, so the losses of all ranks are predicted at once.

In number formats the shared core is rounded once, under moments pooled over the matrices: an error `E` of the
shared `B` in `W_e = A_e B` costs `1/2 sum_e tr(A_e^T R_e A_e E C_e E^T)`. The private factors are then fitted
again, so that they make up for a part of that rounding error, and are rounded under their own moments.

Reference:
    Gu et al. 2025, "Delta Decompression for MoE-based LLMs Compression" (the base). Shared factors under
    moments of two sides are our extension.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from tensornet._util import outside_autocast
from tensornet.linalg.svd import working_dtype
from tensornet.linalg.weighted_svd import WeightedSVD, Weighting, root, times, weighted_svd
from tensornet.nn.storage import PLAIN, PackedCore, Storage, stored_core
from tensornet.quantization import NumberFormat, RoundedWeight, round_product
from tensornet.quantization.low_rank import round_factor
from tensornet.topologies import low_rank
from tensornet.topologies.dense import round_dense
from tensornet.topologies.residual import BASE, residual
from tensornet.topology import Topology

#: Factor between the ranks at which a base is fitted, from 1 on. Starting from the base of the previous rank,
#: one round at each rank comes closer than three rounds from the mean.
_GROWTH = 4
#: Directions below this share of the strongest one are rounding errors; no ranks are planned for them.
_LEAST_DIRECTION = 1e-7

#: Matrix, and factors whose leading ranks approximate it: `(out, in)`, `(out, k)`, `(k, in)`.
Factors = tuple[Tensor, Tensor, Tensor]
#: Factors, or the whitened SVD of a matrix, whose losses take fewer products of moments.
Terms = Factors | WeightedSVD
#: Cores of each matrix, in the order of the topology; the shared one is the same tensor for all.
Cores = list[tuple[Tensor, ...]]
#: Core of a network: codes, or values in floating point.
Core = RoundedWeight | Tensor
_Formats = Mapping[str, NumberFormat | None]


@dataclass(frozen=True)
class Pattern:
    """One way in which several matrices of one shape may share a core.

    Args:
        core: name of the shared core.
        build: topology of one matrix, of `(out_features, in_features, rank)`.
        params: stored numbers of all matrices, of `(count, out_features, in_features, rank)`.
        fits: cores of all matrices at each rank, of `(matrices, weightings, ranks)`.
        terms: approximations of each matrix at all ranks, of `(matrices, weightings)`; one iterable for each
            shared factor from which the best is taken at each rank.
        rounded: cores by name in number formats, of `(matrices, weightings, cores, formats)`.
    """

    core: str
    build: Callable[[int, int, int], Topology]
    params: Callable[[int, int, int, int], int]
    fits: Callable[[Sequence[Tensor], Sequence[Weighting], Sequence[int]], Iterator[Cores]]
    terms: Callable[[Sequence[Tensor], Sequence[Weighting]], Iterator[Iterable[Terms]]]
    rounded: Callable[[Sequence[Tensor], Sequence[Weighting], Cores, _Formats], list[dict[str, Core]]]


@torch.no_grad()
@outside_autocast
def fit_low_rank(
    pattern: str,
    matrices: Sequence[Tensor],
    weightings: Sequence[Weighting],
    rank: int,
    storage: Storage = PLAIN,
) -> list[dict[str, Core]]:
    """Fit low-rank networks that share one core, in double precision, and round them to number formats.

    Args:
        pattern: a key of `PATTERNS`.
        matrices: each `(out, in)`.
        weightings: sensitivity of the loss to errors in each.
        rank: of the factors.
        storage: number formats of the cores.

    Returns:
        The cores of each network by name, as matrices: codes where the format is an integer one, else values.
        The shared core is the same object in all of them.

    Example:
        >>> from tensornet.linalg.weighted_svd import Weighting
        >>> common = torch.randn(2, 8)
        >>> matrices = [torch.randn(6, 2) @ common for _ in range(3)]
        >>> first, *others = fit_low_rank("inputs", matrices, [Weighting()] * 3, 2)
        >>> made = (first["0"] @ first["1"]).float()
        >>> torch.allclose(made, matrices[0], atol=1e-4), others[0]["1"] is first["1"]
        (True, True)
    """
    found, work = PATTERNS[pattern], in_double(matrices)
    topology = found.build(work[0].shape[0], work[0].shape[1], rank)
    cores = next(found.fits(work, weightings, [rank]))
    if storage.own_dtypes:
        kinds = {core: storage.format_of(core) for core in topology.core_names}
        integers = {core: kind if kind.is_integer else None for core, kind in kinds.items()}
        return found.rounded(work, weightings, cores, integers)
    return [dict(zip(topology.core_names, each, strict=True)) for each in cores]


@torch.no_grad()
def fit_stored(
    pattern: str,
    matrices: Sequence[Tensor],
    weightings: Sequence[Weighting],
    rank: int,
    storage: Storage = PLAIN,
) -> list[dict[str, Tensor | PackedCore]]:
    """Fit low-rank networks that share one core and store them, in the dtype of the matrices.

    Args:
        pattern, matrices, weightings, rank, storage: see `fit_low_rank`.

    Returns:
        Stored cores of each network, by the names of `tensornet.nn.storage.encode`. The shared core is the
        same object for all: a parameter where it has the dtype of the matrices.

    Example:
        >>> from tensornet.linalg.weighted_svd import Weighting
        >>> matrices = [torch.randn(6, 2) @ torch.randn(2, 64) for _ in range(3)]
        >>> storage = Storage(number_format="int8")
        >>> first, *others = fit_stored("inputs", matrices, [Weighting()] * 3, 2, storage)
        >>> sorted(first), others[0]["core_1"] is first["core_1"]
        (['core_0', 'core_1'], True)
    """
    shared, dtype = PATTERNS[pattern].core, matrices[0].dtype
    topology = PATTERNS[pattern].build(matrices[0].shape[0], matrices[0].shape[1], rank)
    made = fit_low_rank(pattern, matrices, weightings, rank, storage)
    once = stored_core(topology, storage, shared, made[0][shared], dtype)
    once = nn.Parameter(once) if isinstance(once, Tensor) else once
    found: list[dict[str, Tensor | PackedCore]] = []
    for cores in made:
        own = {f"core_{x}": stored_core(topology, storage, x, cores[x], dtype) for x in topology.core_names}
        found.append({**own, f"core_{shared}": once})
    return found


def pattern_of(topology: Topology, core: str) -> str | None:
    """Find the pattern to which a topology and its shared core belong, or None."""

    def ordered(other: Topology) -> Topology:  # files do not keep the order of sizes
        return replace(other, sizes=tuple(sorted(other.sizes)))

    rank = max(topology.bond_dims.values(), default=0)
    for name, pattern in PATTERNS.items():
        if (
            pattern.core == core
            and rank
            and ordered(pattern.build(*topology.shape, rank)) == ordered(topology)
        ):
            return name
    return None


def largest_rank(pattern: str, count: int, rows: int, columns: int, params: int) -> int:
    """Find the largest rank of a pattern with at most so many parameters; 0 if none fits."""
    first, second = (PATTERNS[pattern].params(count, rows, columns, rank) for rank in (0, 1))
    return max(0, min((params - first) // (second - first), rows, columns))


def in_double(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Convert matrices to double precision."""
    return [matrix.detach().to(working_dtype(matrix.dtype)) for matrix in matrices]


# --- a shared projection of the inputs, and by transposition a shared basis of the outputs --------


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
    for made in _input_fits(*_transposed(matrices, weightings), ranks):
        shared = made[0][1].T.contiguous()
        yield [(shared, right.T.contiguous()) for right, _ in made]


def _input_terms(matrices: Sequence[Tensor], weightings: Sequence[Weighting]) -> Iterator[Iterable[Factors]]:
    """Yield the least-squares factors of every rank: the shared rows, made orthonormal under each moment."""
    shared = _shared_rows(matrices, weightings)[: min(matrices[0].shape)]

    def terms_of_each() -> Iterator[Factors]:
        for w, x in zip(matrices, weightings, strict=True):
            moved = shared.T if x.columns is None else full_moment(x.columns, w.shape[1], w) @ shared.T
            lower, info = torch.linalg.cholesky_ex(shared @ moved)
            if int(info):  # the moment is singular in the span of the rows: fewer ranks
                lower = lower[: int(info) - 1, : int(info) - 1]
            rows = torch.linalg.solve_triangular(lower, shared[: len(lower)], upper=False)
            half = torch.linalg.solve_triangular(lower, (w @ moved[:, : len(lower)]).T, upper=False)
            yield w, half.T, rows

    yield terms_of_each()


def _output_terms(matrices: Sequence[Tensor], weightings: Sequence[Weighting]) -> Iterator[Iterable[Factors]]:
    for terms in _input_terms(*_transposed(matrices, weightings)):
        yield ((w.T, right.T, left.T) for w, left, right in terms)


def _transposed(
    matrices: Sequence[Tensor], weightings: Sequence[Weighting]
) -> tuple[list[Tensor], list[Weighting]]:
    """Exchange the sides of matrices and moments."""
    return [matrix.T for matrix in matrices], [Weighting(x.columns, x.rows) for x in weightings]


def _shared_rows(matrices: Sequence[Tensor], weightings: Sequence[Weighting]) -> Tensor:
    """Return unit rows `(k, in)` whose leading ones span all matrices best under pooled input moments."""
    pooled_inputs: Tensor | None = None
    if any(x.columns is not None for x in weightings):
        size = matrices[0].shape[1]
        pooled_inputs = matrices[0].new_zeros(size, size)
        for w, x in zip(matrices, weightings, strict=True):
            pooled_inputs += trace(x.rows, w.shape[0]) * full_moment(x.columns, size, w)
    whitened = []
    for w, x in zip(matrices, weightings, strict=True):
        if x.rows is None:
            whitened.append(w)
        else:
            factor, _ = root(x.rows.to(w))
            whitened.append(factor[:, None] * w if factor.ndim == 1 else factor.T @ w)
    found = weighted_svd(torch.cat(whitened), Weighting(None, pooled_inputs))
    known = int((found.values > _LEAST_DIRECTION * found.values.max()).sum())
    rows = found.right[:known]
    return rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True)


def _left_factor(matrix: Tensor, right: Tensor, columns: Tensor | None) -> Tensor:
    """Return the best `A` of `W ~ A B` under a moment of the inputs: `W C B^T (B C B^T)^-1`."""
    moved = right.T if columns is None else full_moment(columns, len(right.T), matrix) @ right.T
    gram = right @ moved
    return torch.linalg.lstsq(gram, (matrix @ moved).T).solution.T.contiguous()


def _round_inputs(
    matrices: Sequence[Tensor], weightings: Sequence[Weighting], cores: Cores, formats: _Formats
) -> list[dict[str, Core]]:
    lefts, right = equal_columns(cores)
    seen = [moments_of_right(left, x) for left, x in zip(lefts, weightings, strict=True)]
    shared = round_shared(right, formats["1"], pooled(seen, (right.shape[0], right.shape[1])))
    kept = value_of(shared)
    return [
        {"0": round_factor(w, left, kept, "left", formats["0"], x), "1": shared}
        for w, left, x in zip(matrices, lefts, weightings, strict=True)
    ]


def _round_outputs(
    matrices: Sequence[Tensor], weightings: Sequence[Weighting], cores: Cores, formats: _Formats
) -> list[dict[str, Core]]:
    left, rights = cores[0][0], [right for _, right in cores]
    seen = [moments_of_left(right, x) for right, x in zip(rights, weightings, strict=True)]
    shared = round_shared(left, formats["0"], pooled(seen, (left.shape[0], left.shape[1])))
    kept = value_of(shared)
    return [
        {"0": shared, "1": round_factor(w, kept, right, "right", formats["1"], x)}
        for w, right, x in zip(matrices, rights, weightings, strict=True)
    ]


# --- a shared base --------------------------------------------------------------------------------


def _bases(
    matrices: Sequence[Tensor], weightings: Sequence[Weighting]
) -> Iterator[tuple[Tensor, list[WeightedSVD]]]:
    """Yield bases, starting with the mean of the matrices, each with the SVDs of the remainders.

    The next base is fitted to what the low ranks of the previous one leave; their rank grows.
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


def _base_fits(
    matrices: Sequence[Tensor], weightings: Sequence[Weighting], ranks: Sequence[int]
) -> Iterator[Cores]:
    for rank in ranks:
        bases = _bases(matrices, weightings)
        base, found = min(bases, key=lambda x: sum(float(y.error[rank]) for y in x[1]))
        yield [(base, *(factor.contiguous() for factor in each.factors(rank))) for each in found]


def _base_terms(matrices: Sequence[Tensor], weightings: Sequence[Weighting]) -> Iterator[Iterable[Terms]]:
    for base, found in _bases(matrices, weightings):
        yield [terms_of(w - base, each) for w, each in zip(matrices, found, strict=True)]


def terms_of(rest: Tensor, found: WeightedSVD) -> Terms:
    """Return the whitened SVD of a matrix, or its factors where a singular moment leaves out a part of it."""
    return found if len(found.values) == min(rest.shape) else (rest, found.left, found.right)


def _round_base(
    matrices: Sequence[Tensor], weightings: Sequence[Weighting], cores: Cores, formats: _Formats
) -> list[dict[str, Core]]:
    base, rank = cores[0][0], cores[0][1].shape[1]
    shared = round_shared(base, formats[BASE], pooled(weightings, (base.shape[0], base.shape[1])))
    pairs: list[tuple[Core, Core]] = []
    for w, x in zip(matrices, weightings, strict=True):
        rest = w - value_of(shared)
        left, right = balanced(*weighted_svd(rest, x).factors(rank))
        if formats["0"] is None:
            pairs.append((left, right))
        else:
            made = round_product(left, right, formats["0"], formats["1"], x, target=rest)
            pairs.append((made.left, made.right))
    if formats[BASE] is None:  # it makes up for a part of the rounding errors of the factors
        rests = [w - value_of(a) @ value_of(b) for w, (a, b) in zip(matrices, pairs, strict=True)]
        shared = mean_matrix(rests, weightings)
    return [{BASE: shared, "0": a, "1": b} for a, b in pairs]


# --- moments and factors --------------------------------------------------------------------------


def mean_matrix(matrices: Sequence[Tensor], weightings: Sequence[Weighting]) -> Tensor:
    """Average matrices, each weighted by the traces of its moments."""
    sizes = [
        trace(x.rows, w.shape[0]) * trace(x.columns, w.shape[1])
        for w, x in zip(matrices, weightings, strict=True)
    ]
    total = sum((s * w for s, w in zip(sizes, matrices, strict=True)), start=torch.zeros_like(matrices[0]))
    return total / sum(sizes)


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


def pooled(weightings: Sequence[Weighting], shape: tuple[int, int]) -> Weighting:
    """Approximate the sum of several weightings by a single one with the same trace.

    Each moment is the sum of those of its side, weighted by the traces of the other side.
    """
    rows, columns = shape
    sizes = [(trace(x.rows, rows), trace(x.columns, columns)) for x in weightings]

    def total(moments: Sequence[Tensor | None], factors: Sequence[float], size: int) -> Tensor | None:
        like = next((x.double() for x in moments if x is not None), None)
        if like is None:
            return None
        return sum(
            (f * full_moment(x, size, like) for x, f in zip(moments, factors, strict=True)),
            start=like.new_zeros(size, size),
        )

    left = total([x.rows for x in weightings], [b for _, b in sizes], rows)
    right = total([x.columns for x in weightings], [a for a, _ in sizes], columns)
    if left is None or right is None:  # the identity on the other side has a trace of its own
        return Weighting(None if left is None else left / columns, None if right is None else right / rows)
    return Weighting(left / max(sum(a * b for a, b in sizes), 1e-300), right)


def equal_columns(cores: Cores) -> tuple[list[Tensor], Tensor]:
    """Move the sizes of the columns of private left factors into the rows of the shared right one.

    Groups of integers lie along the rows of a left factor, where small columns would be lost next to large
    ones; each row of the right one has scales of its own.
    """
    lefts = [left for left, _ in cores]
    size = torch.stack([left.square().sum(0) for left in lefts]).mean(0).sqrt()
    size = torch.where(size > 0, size, torch.ones_like(size))
    return [left / size for left in lefts], size[:, None] * cores[0][1]


def balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Scale the columns of the left factor and the rows of the right one to equal norms."""
    size = (right.norm(dim=1) / left.norm(dim=0).clamp_min(1e-300)).sqrt()
    size = torch.where(size > 0, size, torch.ones_like(size))
    return left * size, right / size[:, None]


def moments_of_right(left: Tensor, weighting: Weighting) -> Weighting:
    """Return the moments that weigh errors of the right factor of a product."""
    return Weighting(left.mT @ times(weighting.rows, left), weighting.columns)


def moments_of_left(right: Tensor, weighting: Weighting) -> Weighting:
    """Return the moments that weigh errors of the left factor of a product."""
    return Weighting(weighting.rows, right @ times(weighting.columns, right.mT))


def round_shared(matrix: Tensor, number_format: NumberFormat | None, weighting: Weighting) -> Core:
    """Round a shared core under pooled moments; without an integer format it stays as it is."""
    return matrix if number_format is None else round_dense(matrix, number_format, weighting)


def value_of(core: Core) -> Tensor:
    """Return the values of a core, in double precision."""
    return core.dequantize(torch.float64) if isinstance(core, RoundedWeight) else core


def _low_rank(out_features: int, in_features: int, rank: int) -> Topology:
    return low_rank(out_features=out_features, in_features=in_features, rank=rank)


def _residual(out_features: int, in_features: int, rank: int) -> Topology:
    return residual(out_features=out_features, in_features=in_features, rank=rank)


#: The patterns by name.
PATTERNS = {
    "inputs": Pattern(
        "1", _low_rank, lambda n, o, i, r: r * (i + n * o), _input_fits, _input_terms, _round_inputs
    ),
    "outputs": Pattern(
        "0", _low_rank, lambda n, o, i, r: r * (o + n * i), _output_fits, _output_terms, _round_outputs
    ),
    "base": Pattern(
        BASE, _residual, lambda n, o, i, r: o * i + n * r * (o + i), _base_fits, _base_terms, _round_base
    ),
}
