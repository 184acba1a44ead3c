"""Low-rank approximations of several matrices that share one core: fits, rounding and predicted losses.

There are three sharing patterns. Each minimizes the sum of the weighted errors `1/2 tr(R_e E_e C_e E_e^T)`
over all matrices `e`, such as the experts of a mixture. `E_e` is the error of a matrix, and `R_e` and `C_e`
are its own moments of rows and columns. The patterns are:

- `in`: `W_e = A_e B`, one projection `B` of the inputs for all;
- `out`: `W_e = A B_e`, one basis `A` of the outputs for all: the same as `in` for the transposed
  matrices;
- `base`: `W_e = W_0 + A_e B_e`, one dense matrix for all and a low-rank product for each.

The shared factor comes from one SVD of all matrices, weighted by pooled moments. It is optimal if all
matrices have the same moments. Each private factor is then the least-squares optimum under the moments of its
matrix. The shared factor of each rank is a part of that of the next rank, so the losses of all ranks are
predicted together.

Cores of the patterns `in` and `out` may be stored in number formats. The shared core is then rounded
once, with moments pooled over the matrices: an error `E` of the shared `B` in `W_e = A_e B` increases the
loss by `1/2 sum_e tr(A_e^T R_e A_e E C_e E^T)`. The private factors are then fitted again, which reduces the
effect of this rounding error, and rounded with their own moments. The loss increase due to rounding is
predicted at a few ranks, without rounding anything, and interpolated to the other ranks. All cores of the
pattern `base` keep the dtype of the model.

Reference:
    Gu et al. 2025, "Delta Decompression for MoE-based LLMs Compression" (the base). Shared factors under
    two-sided moments are our extension.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from tensornet._util import outside_autocast, remembering
from tensornet.compression.allocate import Candidate
from tensornet.compression.sensitivity import Sensitivity
from tensornet.damping import DENSE_ROW_DAMPING, LEAST_DAMPING
from tensornet.linalg.svd import working_dtype
from tensornet.linalg.weighted_svd import (
    WeightedSVD,
    Weighting,
    leading_costs,
    other_tail_costs,
    root,
    times,
    weighted_svd,
)
from tensornet.nn.storage import PLAIN, PackedCore, Storage, stored_core
from tensornet.quantization import NumberFormat, RoundedWeight
from tensornet.quantization.low_rank import round_factor
from tensornet.quantization.predict import predict_losses, spaced_rows
from tensornet.topologies import low_rank, topology_family
from tensornet.topologies.dense import round_dense
from tensornet.topologies.residual import BASE, residual
from tensornet.topology import Topology

#: Maps the sharing patterns, which are words of `tensornet_moe.sharing`, to the names of their shared cores.
PATTERNS = {"in": "1", "out": "0", "base": BASE}
#: A base is fitted at rank 1, then at ranks that grow by this factor. Each fit starts from the base of the
#: previous rank. One such fit per rank is better than three fits that start from the mean of the matrices.
_GROWTH = 4
#: Singular values below this fraction of the largest are treated as zero, which limits the ranks.
_LEAST_DIRECTION = 1e-7
#: Ranks at which loss increases due to rounding are predicted, as fractions of the largest rank.
_TRIED = (0.0, 0.06, 0.12, 0.25, 0.5, 1.0)
#: A shared core has the format of the private cores, or a format of at least this many bits (`encodings`).
_ACCURATE_BITS = 8
#: Number of rows of a factor that are sampled to estimate the loss of rounding it.
_SAMPLED_ROWS = 128
#: Format of cores that keep the dtype of the model.
_FLOAT = NumberFormat()

#: A matrix, shape `(out, in)`, and two factors, `(out, k)` and `(k, in)`. For each `r <= k`, the first `r`
#: columns of the left factor times the first `r` rows of the right factor approximate the matrix.
FactoredMatrix = tuple[Tensor, Tensor, Tensor]
#: The cores of each matrix, in the order of the topology. All matrices refer to the same shared core.
Cores = list[tuple[Tensor, ...]]
#: Core of a network: integer codes, or floating-point values.
Core = RoundedWeight | Tensor


def pattern_topology(pattern: str, rows: int, columns: int, rank: int) -> Topology:
    """Build the topology of one matrix for a sharing pattern."""
    build = residual if pattern == "base" else low_rank
    return build(out_features=rows, in_features=columns, rank=rank)


def pattern_params(pattern: str, count: int, rows: int, columns: int, rank: int) -> int:
    """Count the parameters of `count` networks for a sharing pattern; the shared core counts once."""
    if pattern == "base":
        return rows * columns + count * rank * (rows + columns)
    shared, private = (columns, rows) if pattern == "in" else (rows, columns)
    return rank * (shared + count * private)


def pattern_of(topology: Topology, core: str) -> str | None:
    """Return the name of the sharing pattern that has this topology and shared core, or None."""

    def ordered(other: Topology) -> Topology:  # files do not keep the order of the sizes
        return replace(other, sizes=tuple(sorted(other.sizes)))

    rank = max(topology.bond_dims.values(), default=0)
    for pattern, shared in PATTERNS.items():
        if not rank or shared != core:
            continue
        if ordered(pattern_topology(pattern, *topology.shape, rank)) == ordered(topology):
            return pattern
    return None


@torch.no_grad()
@outside_autocast
def fit_low_rank(
    pattern: str,
    matrices: Sequence[Tensor],
    weightings: Sequence[Weighting],
    rank: int,
    storage: Storage = PLAIN,
) -> list[dict[str, Core]]:
    """Fit low-rank networks that share one core, in double precision, and round their cores.

    Args:
        pattern: a key of `PATTERNS`.
        matrices: each `(out, in)`.
        weightings: sensitivity of the loss to errors in each matrix.
        rank: rank of the factors.
        storage: number formats of the cores; cores of the pattern `base` keep their dtype.

    Returns:
        The cores of each network by name, as matrices: integer codes for integer formats, otherwise values.
        The shared core is the same object in all networks.
    """
    work = _in_double(matrices)
    topology = pattern_topology(pattern, work[0].shape[0], work[0].shape[1], rank)
    cores = next(_fits(pattern, work, weightings, [rank]))
    if not storage.own_dtypes:
        return [dict(zip(topology.core_names, each, strict=True)) for each in cores]
    kinds = {core: storage.format_of(core) for core in topology.core_names}
    integers = {core: kind if kind.is_integer else None for core, kind in kinds.items()}
    return _round_factors(pattern, work, weightings, cores, integers)


@torch.no_grad()
def fit_stored(
    pattern: str,
    matrices: Sequence[Tensor],
    weightings: Sequence[Weighting],
    rank: int,
    storage: Storage = PLAIN,
) -> list[dict[str, Tensor | PackedCore]]:
    """Fit low-rank networks that share one core; store them in number formats or the dtype of the matrices.

    Args:
        pattern, matrices, weightings, rank, storage: see `fit_low_rank`.

    Returns:
        Stored cores of each network, named as by `tensornet.nn.storage.encode`. The shared core is the same
        object in all networks; it is a parameter if it has the dtype of the matrices.
    """
    shared, dtype = PATTERNS[pattern], matrices[0].dtype
    topology = pattern_topology(pattern, matrices[0].shape[0], matrices[0].shape[1], rank)
    made = fit_low_rank(pattern, matrices, weightings, rank, storage)
    once = stored_core(topology, storage, shared, made[0][shared], dtype)
    once = nn.Parameter(once) if isinstance(once, Tensor) else once
    found: list[dict[str, Tensor | PackedCore]] = []
    for cores in made:
        own = {f"core_{x}": stored_core(topology, storage, x, cores[x], dtype) for x in topology.core_names}
        found.append({**own, f"core_{shared}": once})
    return found


def _in_double(matrices: Sequence[Tensor]) -> list[Tensor]:
    return [matrix.detach().to(working_dtype(matrix.dtype)) for matrix in matrices]


def _transposed(
    matrices: Sequence[Tensor], weightings: Sequence[Weighting]
) -> tuple[list[Tensor], list[Weighting]]:
    return [matrix.T for matrix in matrices], [Weighting(x.columns, x.rows) for x in weightings]


# --- fits -----------------------------------------------------------------------------------------


def _fits(
    pattern: str, matrices: Sequence[Tensor], weightings: Sequence[Weighting], ranks: Sequence[int]
) -> Iterator[Cores]:
    """Yield the cores of all matrices at each rank."""
    if pattern == "base":
        for rank in ranks:
            bases = _bases(matrices, weightings)
            base, svds = min(bases, key=lambda x: sum(float(y.error[rank]) for y in x[1]))
            yield [(base, *(factor.contiguous() for factor in each.factors(rank))) for each in svds]
        return
    if pattern == "out":
        for cores in _fits("in", *_transposed(matrices, weightings), ranks):
            shared = cores[0][1].T.contiguous()
            yield [(shared, private.T.contiguous()) for private, _ in cores]
        return
    known = _shared_rows(matrices, weightings)
    for rank in ranks:
        shared = known[:rank].contiguous()
        if len(shared) < rank:  # the matrices together have a lower rank
            shared = torch.cat([shared, shared.new_zeros(rank - len(shared), shared.shape[1])])
        cores = []
        for w, x in zip(matrices, weightings, strict=True):
            # The best A of W ~ A B under a moment C of the inputs is W C B^T (B C B^T)^-1.
            moved = shared.T if x.columns is None else _full(x.columns, w.shape[1], w) @ shared.T
            left = torch.linalg.lstsq(shared @ moved, (w @ moved).T).solution.T.contiguous()
            cores.append((left, shared))
        yield cores


def _factors_of_all_ranks(
    pattern: str, matrices: Sequence[Tensor], weightings: Sequence[Weighting]
) -> Iterator[FactoredMatrix]:
    """Yield each matrix and two factors; their first `r` components are its least-squares fit of rank `r`."""
    if pattern == "out":
        for w, left, right in _factors_of_all_ranks("in", *_transposed(matrices, weightings)):
            yield w.T, right.T, left.T
        return
    shared = _shared_rows(matrices, weightings)[: min(matrices[0].shape)]
    for w, x in zip(matrices, weightings, strict=True):
        moved = shared.T if x.columns is None else _full(x.columns, w.shape[1], w) @ shared.T
        lower, info = torch.linalg.cholesky_ex(shared @ moved)
        if int(info):  # the moment is singular on these rows: keep those before the first dependent row
            lower = lower[: int(info) - 1, : int(info) - 1]
        rows = torch.linalg.solve_triangular(lower, shared[: len(lower)], upper=False)
        half = torch.linalg.solve_triangular(lower, (w @ moved[:, : len(lower)]).T, upper=False)
        yield w, half.T, rows


def _shared_rows(matrices: Sequence[Tensor], weightings: Sequence[Weighting]) -> Tensor:
    """Compute the best right factor that all matrices can share, with errors weighted by pooled moments.

    The result has rows of norm 1, shape `(k, in)`. Its first `r` rows are the best factor of rank `r`.
    """
    pooled_inputs: Tensor | None = None
    if any(x.columns is not None for x in weightings):
        size = matrices[0].shape[1]
        pooled_inputs = matrices[0].new_zeros(size, size)
        for w, x in zip(matrices, weightings, strict=True):
            pooled_inputs += _trace(x.rows, w.shape[0]) * _full(x.columns, size, w)
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


def _bases(
    matrices: Sequence[Tensor], weightings: Sequence[Weighting]
) -> Iterator[tuple[Tensor, list[WeightedSVD]]]:
    """Yield bases, each with the weighted SVDs of the remainders (matrices minus base).

    The first base is the mean of the matrices. Each later base is the mean of `W_e - A_e B_e`, where
    `A_e B_e` approximates the remainder of matrix `e` for the previous base. The rank of `A_e B_e` increases
    from base to base.
    """
    count, (rows, columns) = len(matrices), matrices[0].shape
    # This is the largest rank at which base and factors have fewer elements than the matrices.
    largest = ((count - 1) * rows * columns - 1) // (count * (rows + columns))
    ranks = [1, *(_GROWTH**k for k in range(rows) if _GROWTH**k <= largest)]
    base = _mean(matrices, weightings)
    for rank in (*ranks, None):
        found = [weighted_svd(w - base, x) for w, x in zip(matrices, weightings, strict=True)]
        yield base, found
        if rank is not None:
            pairs = [each.factors(rank) for each in found]
            rest = [w - left @ right for w, (left, right) in zip(matrices, pairs, strict=True)]
            base = _mean(rest, weightings)


# --- rounding -------------------------------------------------------------------------------------


def _round_factors(
    pattern: str,
    matrices: Sequence[Tensor],
    weightings: Sequence[Weighting],
    cores: Cores,
    formats: Mapping[str, NumberFormat | None],
) -> list[dict[str, Core]]:
    """Round the shared factor once; then fit the private factors to the rounded one, and round them."""
    if pattern == "in":
        cores = _equal_columns(cores)
    core, own = PATTERNS[pattern], "0" if pattern == "in" else "1"
    value, number_format = cores[0][int(core)], formats[core]
    shared: Core = value
    if number_format is not None:
        shared = round_dense(value, number_format, _seen_by_shared(pattern, cores, weightings))
        value = shared.dequantize(torch.float64)
    found = []
    for w, (left, right), x in zip(matrices, cores, weightings, strict=True):
        if pattern == "in":
            private = round_factor(w, left, value, "left", formats[own], x)
        else:
            private = round_factor(w, value, right, "right", formats[own], x)
        found.append({own: private, core: shared})
    return found


def _equal_columns(cores: Cores) -> Cores:
    """Normalize the columns of the private left factors, and rescale the rows of the shared right factor.

    Column `i` of every left factor is divided by the root mean square of the norms of all columns `i`, and
    row `i` of the right factor is multiplied by it. Elements in the same row of a left
    factor share a quantization scale, so small columns would be lost to rounding next to large ones. Each row
    of the right factor has its own scales.
    """
    size = torch.stack([left.square().sum(0) for left, _ in cores]).mean(0).sqrt()
    size = torch.where(size > 0, size, torch.ones_like(size))
    right = size[:, None] * cores[0][1]
    return [(left / size, right) for left, _ in cores]


# --- moments --------------------------------------------------------------------------------------


def _seen_by_shared(pattern: str, cores: Cores, weightings: Sequence[Weighting]) -> Weighting:
    """Compute one weighting of errors of the shared factor from the weightings of all matrices."""
    if pattern == "in":
        seen = [_moments_of_right(left, x) for (left, _), x in zip(cores, weightings, strict=True)]
        return pooled(seen, cores[0][1])
    seen = [_moments_of_left(right, x) for (_, right), x in zip(cores, weightings, strict=True)]
    return pooled(seen, cores[0][0])


def _moments_of_right(left: Tensor, weighting: Weighting) -> Weighting:
    return Weighting(left.mT @ times(weighting.rows, left), weighting.columns)


def _moments_of_left(right: Tensor, weighting: Weighting) -> Weighting:
    return Weighting(weighting.rows, right @ times(weighting.columns, right.mT))


def _mean(matrices: Sequence[Tensor], weightings: Sequence[Weighting]) -> Tensor:
    """Compute the weighted mean of matrices; the weights are the products of the traces of their moments."""
    sizes = [
        _trace(x.rows, w.shape[0]) * _trace(x.columns, w.shape[1])
        for w, x in zip(matrices, weightings, strict=True)
    ]
    total = sum((s * w for s, w in zip(sizes, matrices, strict=True)), start=torch.zeros_like(matrices[0]))
    return total / sum(sizes)


def _trace(moment: Tensor | None, size: int) -> float:
    """Compute the trace of a moment: a matrix, or a vector (a diagonal matrix), or None (the identity)."""
    if moment is None:
        return float(size)
    return float(moment.sum() if moment.ndim == 1 else moment.diagonal().sum())


def _full(moment: Tensor | None, size: int, like: Tensor) -> Tensor:
    """Convert a moment to a full matrix in the dtype and on the device of a tensor."""
    if moment is None:
        return torch.eye(size, dtype=like.dtype, device=like.device)
    return torch.diag(moment.to(like)) if moment.ndim == 1 else moment.to(like)


def pooled(weightings: Sequence[Weighting], like: Tensor) -> Weighting:
    """Approximate the sum of several weightings of a matrix by a single one with the same trace.

    The row moment of the result is the sum of all row moments, each weighted by the trace of the column
    moment of the same weighting; likewise for the column moment.

    Args:
        weightings: the weightings to add.
        like: a tensor with the shape of the matrix.
    """
    rows, columns = like.shape
    sizes = [(_trace(x.rows, rows), _trace(x.columns, columns)) for x in weightings]

    def total(moments: Sequence[Tensor | None], factors: Sequence[float], size: int) -> Tensor | None:
        like = next((x.double() for x in moments if x is not None), None)
        if like is None:
            return None
        return sum(
            (f * _full(x, size, like) for x, f in zip(moments, factors, strict=True)),
            start=like.new_zeros(size, size),
        )

    left = total([x.rows for x in weightings], [b for _, b in sizes], rows)
    right = total([x.columns for x in weightings], [a for a, _ in sizes], columns)
    if left is None or right is None:  # an identity (None) has trace `rows` or `columns`
        return Weighting(None if left is None else left / columns, None if right is None else right / rows)
    return Weighting(left / max(sum(a * b for a, b in sizes), 1e-300), right)


# --- predicted losses -----------------------------------------------------------------------------


def shared_candidates(
    pattern: str,
    matrices: Sequence[Tensor],
    sensitivities: Sequence[Sensitivity],
    formats: Sequence[NumberFormat] = (),
    *,
    per_token: float = 1.0,
) -> list[Candidate]:
    """Predict the losses of one sharing pattern at all ranks, in each combination of number formats.

    The rounding error of a shared core is the same in all experts, so it adds up over the experts of a token.
    The moments of single experts do not contain this effect: with equal combine weights the loss increase is
    `per_token` times what they predict. In a trained mixture (8 experts, 2 per token), errors of shared cores
    increased the loss 1.4 to 2.6 times as much as errors of private cores with the same predicted loss.

    Args:
        pattern: a key of `PATTERNS`.
        matrices: each `(out, in)`.
        sensitivities: sensitivity of the loss to errors in each matrix.
        formats: number formats in which cores may be stored; if empty, only the model's dtype is used.
        per_token: mean number of these matrices that process the same token.

    Returns:
        One candidate for each combination of formats and each rank `1 ... k`. Its topology is that of one
        matrix, but its size and predicted losses are those of all matrices together. `error` is not
        predicted.
    """
    count, (rows, columns) = len(matrices), matrices[0].shape
    dense, dtype = count * rows * columns, matrices[0].dtype
    every = range(1, min(rows, columns) + 1)
    ranks = sum(pattern_params(pattern, count, rows, columns, rank) < dense for rank in every)
    if not ranks:
        return []
    work = _in_double(matrices)
    plain = _fit_losses(pattern, work, sensitivities, ranks)
    ranks = int(plain[0].isfinite().sum())
    storages = encodings(pattern, formats)
    quantized = [storage for storage in storages if storage.quantized]
    added: dict[Storage, Tensor] = {}
    if ranks and quantized:
        losses = _rounding_of_factors(pattern, work, sensitivities, quantized, ranks, per_token)
        added = dict(zip(quantized, losses, strict=True))
    found = []
    for storage in storages:
        # Networks must be smaller than dense matrices in the format of the shared core or in that of the
        # private cores, whichever is larger.
        kinds = (storage.number_format, storage.format_of(PATTERNS[pattern]))
        limit = count * max(kind.nbytes((rows, columns), dtype) for kind in kinds)
        costs, forecasts = (plain[:, :ranks] + added.get(storage, 0)).clamp_min(0).tolist()
        sizes = _sizes(pattern, count, rows, columns, ranks, storage, dtype)
        for (topology, params, num_bytes), cost, forecast in zip(sizes, costs, forecasts, strict=True):
            if num_bytes >= limit or not math.isfinite(cost + forecast):
                break
            found.append(Candidate(topology, storage, num_bytes, params, forecast, error=0.0, cost=cost))
    return found


def encodings(pattern: str, formats: Sequence[NumberFormat]) -> list[Storage]:
    """List the combinations of allowed number formats for private and shared cores under a sharing pattern.

    Cores of the pattern `base` keep the dtype of the model. In `in` and `out`, a private factor may
    have any format that factors have in low-rank networks without sharing. The shared core has the same
    format, or the smallest allowed one of at least eight bits. Without formats, all cores keep their dtype.
    """
    if pattern == "base" or not formats:
        return [PLAIN] if _FLOAT in formats or not formats else []
    own = [x for x in formats if (x == _FLOAT or x.is_integer) and x.for_networks]
    accurate = [x for x in own if x == _FLOAT or (x.bits or 0) >= _ACCURATE_BITS]
    best = min(accurate, key=lambda x: x.nbytes((64, 64)), default=None)
    pairs: list[tuple[NumberFormat, NumberFormat | None]] = []  # (private, shared)
    for private, _ in topology_family("low_rank").encodings(own):
        pairs += [(private, private), (private, best)]
    # Skip combinations of an integer shared core with private factors in the model's dtype. Most values are
    # private, so storing the private factors in eight bits is better.
    useful = dict.fromkeys(
        (private, shared) for private, shared in pairs if shared and (private != _FLOAT or shared == _FLOAT)
    )
    core = PATTERNS[pattern]
    return [
        Storage(number_format=private, core_formats=() if private == shared else ((core, shared),))
        for private, shared in useful
    ]


def _fit_losses(
    pattern: str, matrices: Sequence[Tensor], sensitivities: Sequence[Sensitivity], ranks: int
) -> Tensor:
    """Predict the losses of the fits of all ranks, shape `(2, ranks)`.

    The two rows are the losses under `weighting` and under `forecast` of the sensitivities.
    """
    weightings = [x.weighting for x in sensitivities]
    tries: Iterable[Iterable[FactoredMatrix | WeightedSVD]] = [
        _factors_of_all_ranks(pattern, matrices, weightings)
    ]
    if pattern == "base":
        tries = (
            [
                each if len(each.values) == min(w.shape) else (w - base, each.left, each.right)
                for w, each in zip(matrices, svds, strict=True)
            ]
            for base, svds in _bases(matrices, weightings)
        )
    best = torch.full((2, ranks), torch.inf, dtype=torch.float64)
    for terms in tries:
        found = torch.zeros_like(best)
        for each, sensitivity in zip(terms, sensitivities, strict=True):
            found += _rank_losses(each, sensitivity, ranks)
        best = torch.where(found[0] < best[0], found, best)
    return best


def _rank_losses(terms: FactoredMatrix | WeightedSVD, sensitivity: Sensitivity, ranks: int) -> Tensor:
    """Predict the losses of one matrix at all ranks; infinite at ranks for which `terms` has no factors."""
    weighting, forecast = sensitivity.weighting, sensitivity.forecast
    if isinstance(terms, WeightedSVD):
        found = torch.stack([terms.error, other_tail_costs(terms, weighting, forecast)])
    else:
        costs = leading_costs(*terms, weighting)
        found = torch.stack([costs, costs if forecast is weighting else leading_costs(*terms, forecast)])
    found = found[:, 1 : ranks + 1].cpu()
    return torch.nn.functional.pad(found, (0, ranks - found.shape[1]), value=torch.inf)


@lru_cache(maxsize=256)
def _sizes(
    pattern: str, count: int, rows: int, columns: int, ranks: int, storage: Storage, dtype: torch.dtype
) -> list[tuple[Topology, int, int]]:
    """Return for each rank the topology of one network, and the parameters and bytes of all networks."""
    found = []
    for rank in range(1, ranks + 1):
        topology = pattern_topology(pattern, rows, columns, rank)
        params, num_bytes = storage.core_size(topology, PATTERNS[pattern], dtype)
        found.append(
            (
                topology,
                count * storage.num_params(topology) - (count - 1) * params,
                count * storage.num_bytes(topology, dtype) - (count - 1) * num_bytes,
            )
        )
    return found


def _rounding_of_factors(
    pattern: str,
    matrices: Sequence[Tensor],
    sensitivities: Sequence[Sensitivity],
    storages: Sequence[Storage],
    ranks: int,
    per_token: float,
) -> list[Tensor]:
    """Predict the loss increase due to rounding both factors, for each storage.

    For the shapes of arguments and result see `_fit_losses`.
    """
    core = PATTERNS[pattern]
    kinds = [[x.weighting for x in sensitivities], [x.forecast for x in sensitivities]]
    tried = sorted({max(1, round(fraction * ranks)) for fraction in _TRIED})
    private = list(dict.fromkeys(x.number_format for x in storages))
    shared = list(dict.fromkeys(x.format_of(core) for x in storages))
    fits = list(_fits(pattern, matrices, kinds[0], tried))
    if pattern == "in":
        fits = [_equal_columns(cores) for cores in fits]
    of_shared = [
        _rounding(
            cores[0][int(core)],
            shared,
            [_seen_by_shared(pattern, cores, weightings) for weightings in kinds],
            DENSE_ROW_DAMPING,
        )
        for cores in fits
    ]
    of_private = torch.zeros(len(private), 2, len(tried), dtype=torch.float64)
    for place, sides in enumerate(zip(*kinds, strict=True)):
        with remembering():  # factorize the moments of a matrix once for all ranks
            for at, cores in enumerate(fits):
                left, right = cores[place]
                if pattern == "in":
                    found = _rounding(left, private, [_moments_of_left(right, x) for x in sides])
                else:
                    found = _rounding(right, private, [_moments_of_right(left, x) for x in sides])
                of_private[:, :, at] += found
    losses = []
    for storage in storages:
        first, second = shared.index(storage.format_of(core)), private.index(storage.number_format)
        once = torch.stack([found[first] for found in of_shared], dim=-1)  # shape: (2, tried)
        # Interpolate the logarithm of the loss, linearly in the logarithm of the rank.
        logs = np.log(np.maximum((per_token * once + of_private[second]).numpy(), 1e-300))
        every = np.log(np.arange(1, ranks + 1))
        rows = [np.interp(every, np.log(tried), row) for row in logs]
        losses.append(torch.from_numpy(np.exp(np.stack(rows))))
    return losses


def _rounding(
    core: Tensor,
    formats: Sequence[NumberFormat],
    weightings: Sequence[Weighting],
    row_damping: float = LEAST_DAMPING,
) -> Tensor:
    """Predict the loss increase due to rounding a core, shape `(formats, weightings)`.

    The core is rounded so that the loss under the first weighting is small.
    """
    integers = [x for x in formats if x.is_integer]
    sample = spaced_rows(core, _SAMPLED_ROWS)
    found = torch.zeros(len(formats), len(weightings), dtype=torch.float64)
    losses = predict_losses(core, integers, weightings, row_damping=row_damping, sample=sample)
    found[torch.tensor([x.is_integer for x in formats])] = losses.double().cpu().clamp_min(0)
    return found
