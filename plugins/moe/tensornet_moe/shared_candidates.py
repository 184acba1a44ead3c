"""Predicted losses of low-rank networks that share a core, at all ranks and in number formats.

The loss that rounding adds is predicted without rounding the factors, and is added to the loss of the fit.
For projections and bases of outputs it is predicted at a few ranks, and interpolated between them. A base in
an integer format is rounded once for each format: the low ranks then make up for a part of its rounding
error, which is computed exactly.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from tensornet._util import remembering
from tensornet.compression.allocate import Candidate
from tensornet.compression.sensitivity import Sensitivity
from tensornet.linalg.weighted_svd import (
    WeightedSVD,
    Weighting,
    leading_costs,
    other_tail_costs,
    weighted_svd,
)
from tensornet.nn.storage import PLAIN, Storage
from tensornet.quantization import NumberFormat
from tensornet.quantization.moments import DENSE_ROW_DAMPING, LEAST_DAMPING
from tensornet.quantization.predict import predict_losses, predict_product_losses, spaced_rows
from tensornet.topologies import topology_family
from tensornet.topology import Topology
from tensornet_moe.low_rank_sharing import (
    PATTERNS,
    Terms,
    balanced,
    equal_columns,
    in_double,
    mean_matrix,
    moments_of_left,
    moments_of_right,
    pooled,
    round_shared,
    terms_of,
    value_of,
)

#: Fractions of the largest rank at which the losses of rounding are predicted.
_TRIED = (0.0, 0.06, 0.12, 0.25, 0.5, 1.0)
#: Fewest bits of factors that are rounded, and of those that count as accurate.
_LEAST_BITS, _ACCURATE_BITS = 4, 8
#: Rows of a factor from which the loss of rounding all of it is estimated.
_SAMPLED_ROWS = 128
#: Own format of the model.
_FLOAT = NumberFormat()


def shared_candidates(
    pattern: str,
    matrices: Sequence[Tensor],
    sensitivities: Sequence[Sensitivity],
    formats: Sequence[NumberFormat] = (),
    *,
    per_token: float = 1.0,
) -> list[Candidate]:
    """Predict the losses of one sharing pattern at all ranks, in each combination of number formats.

    The rounding error of a shared core is the same in all experts, so it adds up over the experts that a
    token reaches. The moments of single experts do not account for that: with equal combine weights the error
    costs `per_token` times as much. In a trained mixture of 8 experts, two for each token, common errors cost
    1.4 to 2.6 times as much as private ones of the same predicted loss.

    Args:
        pattern: a key of `PATTERNS`.
        matrices: each `(out, in)`.
        sensitivities: of the loss to errors in each.
        formats: number formats that cores may be stored in; only the model's own if there are none.
        per_token: number of the matrices that a token reaches.

    Returns:
        Networks of one matrix, with the size and the predicted losses of all matrices together; `error` is
        not predicted. For each combination of formats the ranks `1 ... k`.

    Example:
        >>> from tensornet.linalg.weighted_svd import Weighting
        >>> matrices = [torch.randn(32, 64) for _ in range(3)]
        >>> seen = [Sensitivity(Weighting(), Weighting())] * 3
        >>> formats = [_FLOAT, NumberFormat.parse("int8")]
        >>> found = shared_candidates("inputs", matrices, seen, formats)
        >>> sorted({str(x.storage.number_format) for x in found})
        ['float', 'int8']
    """
    count, (rows, columns) = len(matrices), matrices[0].shape
    dense, dtype = count * rows * columns, matrices[0].dtype
    size = PATTERNS[pattern].params
    ranks = sum(size(count, rows, columns, rank) < dense for rank in range(1, min(rows, columns) + 1))
    if not ranks:
        return []
    work = in_double(matrices)
    plain = _fit_losses(pattern, work, sensitivities, ranks)
    ranks = int(plain[0].isfinite().sum())
    storages = encodings(pattern, formats) if formats else [PLAIN]
    quantized = [storage for storage in storages if storage.quantized]
    added: dict[Storage, Tensor] = {}
    if ranks and quantized:
        predict = _base_losses if pattern == "base" else _factor_losses
        losses = predict(pattern, work, sensitivities, quantized, ranks, per_token)
        added = dict(zip(quantized, losses, strict=True))
    found = []
    for storage in storages:
        # A network is useful only if it is smaller than the matrices in the larger of its formats.
        kinds = (storage.number_format, storage.format_of(PATTERNS[pattern].core))
        limit = count * max(kind.nbytes((rows, columns), dtype) for kind in kinds)
        costs, forecasts = (plain[:, :ranks] + added.get(storage, 0)).clamp_min(0).tolist()
        sizes = _sizes(pattern, count, rows, columns, ranks, storage, dtype)
        for (topology, params, num_bytes), cost, forecast in zip(sizes, costs, forecasts, strict=True):
            if num_bytes >= limit or not math.isfinite(cost + forecast):
                break
            found.append(Candidate(topology, storage, num_bytes, params, forecast, error=0.0, cost=cost))
    return found


def encodings(pattern: str, formats: Sequence[NumberFormat]) -> list[Storage]:
    """List the combinations of number formats of the cores of a pattern, from the allowed formats.

    Private factors, and projections and bases of outputs, have the formats that factors of networks have. A
    shared core may have eight bits or more with private cores of four. A base has any format, with factors
    in the same one or in the smallest of eight bits or more.

    Example:
        >>> allowed = [NumberFormat.parse(name) for name in ("int8", "int4")]
        >>> [sorted(x.to_dict().get("core_formats", {})) for x in encodings("inputs", allowed)]
        [[], [], ['1']]
    """
    own = [x for x in formats if x == _FLOAT or x.is_integer]
    accurate = [x for x in own if x == _FLOAT or (x.bits or 0) >= _ACCURATE_BITS]
    best = min(accurate, key=lambda x: x.nbytes((64, 64)), default=None)
    pairs: list[tuple[NumberFormat, NumberFormat | None]] = []  # private, shared
    if pattern == "base":
        for shared in own:
            if shared == _FLOAT or (shared.bits or 0) >= _LEAST_BITS:
                pairs.append((shared, shared))
            if best is not None:
                pairs.append((best, shared))
    else:
        for private, _ in topology_family("low_rank").encodings(own):
            pairs += [(private, private), (private, best)]
    # Private factors are most of the numbers: in the model's own format they are no match for eight bits.
    useful = dict.fromkeys(
        (private, shared) for private, shared in pairs if shared and (private != _FLOAT or shared == _FLOAT)
    )
    core = PATTERNS[pattern].core
    return [
        Storage(number_format=private, core_formats=() if private == shared else ((core, shared),))
        for private, shared in useful
    ]


def _fit_losses(
    pattern: str, matrices: Sequence[Tensor], sensitivities: Sequence[Sensitivity], ranks: int
) -> Tensor:
    """Compute the losses of the fits at all ranks, costs and forecasts: shape `(2, ranks)`."""
    best = torch.full((2, ranks), torch.inf, dtype=torch.float64)
    for terms in PATTERNS[pattern].terms(matrices, [x.choice for x in sensitivities]):
        found = torch.zeros_like(best)
        for each, sensitivity in zip(terms, sensitivities, strict=True):
            found += _rank_losses(each, sensitivity, ranks)
        best = torch.where(found[0] < best[0], found, best)
    return best


def _rank_losses(terms: Terms, sensitivity: Sensitivity, ranks: int) -> Tensor:
    """Compute the losses of one matrix at all ranks: `(2, ranks)`, infinite without terms."""
    choice, forecast = sensitivity.choice, sensitivity.forecast
    if isinstance(terms, WeightedSVD):
        found = torch.stack([terms.error, other_tail_costs(terms, choice, forecast)])
    else:
        costs = leading_costs(*terms, choice)
        found = torch.stack([costs, costs if forecast is choice else leading_costs(*terms, forecast)])
    found = found[:, 1 : ranks + 1].cpu()
    return torch.nn.functional.pad(found, (0, ranks - found.shape[1]), value=torch.inf)


@lru_cache(maxsize=256)
def _sizes(
    pattern: str, count: int, rows: int, columns: int, ranks: int, storage: Storage, dtype: torch.dtype
) -> list[tuple[Topology, int, int]]:
    """Build the networks of all ranks, and count numbers and bytes of all matrices; the shared core once."""
    found = []
    for rank in range(1, ranks + 1):
        topology = PATTERNS[pattern].build(rows, columns, rank)
        params, num_bytes = storage.core_size(topology, PATTERNS[pattern].core, dtype)
        found.append(
            (
                topology,
                count * storage.num_params(topology) - (count - 1) * params,
                count * storage.num_bytes(topology, dtype) - (count - 1) * num_bytes,
            )
        )
    return found


def _factor_losses(
    pattern: str,
    matrices: Sequence[Tensor],
    sensitivities: Sequence[Sensitivity],
    storages: Sequence[Storage],
    ranks: int,
    per_token: float,
) -> list[Tensor]:
    """Predict what rounding both factors adds, shape `(2, ranks)` for each storage."""
    core = PATTERNS[pattern].core
    choices = [x.choice for x in sensitivities]
    kinds = [choices, [x.forecast for x in sensitivities]]
    tried = sorted({max(1, round(fraction * ranks)) for fraction in _TRIED})
    private = list(dict.fromkeys(x.number_format for x in storages))
    shared = list(dict.fromkeys(x.format_of(core) for x in storages))
    of_shared, of_private, pairs_at = [], torch.zeros(len(private), 2, len(tried), dtype=torch.float64), []
    for cores in PATTERNS[pattern].fits(matrices, choices, tried):
        pairs = [(left, right) for left, right in cores]
        if pattern == "inputs":
            lefts, right = equal_columns(cores)
            pairs = [(left, right) for left in lefts]
        pairs_at.append(pairs)
        common, sums = (pairs[0][1] if pattern == "inputs" else pairs[0][0]), []
        for weightings in kinds:
            if pattern == "inputs":
                seen = [moments_of_right(a, x) for (a, _), x in zip(pairs, weightings, strict=True)]
            else:
                seen = [moments_of_left(b, x) for (_, b), x in zip(pairs, weightings, strict=True)]
            sums.append(pooled(seen, (common.shape[0], common.shape[1])))
        of_shared.append(_expected(common, shared, sums, DENSE_ROW_DAMPING))
    for place, sides in enumerate(zip(*kinds, strict=True)):
        with remembering():  # the moments of a matrix are factorised once for all ranks
            for at, pairs in enumerate(pairs_at):
                left, right = pairs[place]
                if pattern == "inputs":
                    found = _expected(left, private, [moments_of_left(right, x) for x in sides])
                else:
                    found = _expected(right, private, [moments_of_right(left, x) for x in sides])
                of_private[:, :, at] += found
    losses = []
    for storage in storages:
        first, second = shared.index(storage.format_of(core)), private.index(storage.number_format)
        once = torch.stack([found[first] for found in of_shared], dim=-1)  # shape: (2, tried)
        losses.append(_interpolated(per_token * once + of_private[second], tried, ranks))
    return losses


def _expected(
    core: Tensor,
    formats: Sequence[NumberFormat],
    weightings: Sequence[Weighting],
    row_damping: float = LEAST_DAMPING,
) -> Tensor:
    """Predict the losses of rounding a core under the first weighting, shape `(formats, weightings)`."""
    integers = [x for x in formats if x.is_integer]
    sample = spaced_rows(core, _SAMPLED_ROWS)
    found = torch.zeros(len(formats), len(weightings), dtype=torch.float64)
    losses = predict_losses(core, integers, weightings, row_damping=row_damping, sample=sample)
    found[torch.tensor([x.is_integer for x in formats])] = losses.double().cpu().clamp_min(0)
    return found


def _interpolated(values: Tensor, tried: Sequence[int], ranks: int) -> Tensor:
    """Interpolate values at a few ranks to all of them, log-linearly, shape `(2, ranks)`."""
    logs = np.log(np.maximum(values.numpy(), 1e-300))
    every = np.log(np.arange(1, ranks + 1))
    return torch.from_numpy(np.exp(np.stack([np.interp(every, np.log(tried), row) for row in logs])))


def _base_losses(
    pattern: str,
    matrices: Sequence[Tensor],
    sensitivities: Sequence[Sensitivity],
    storages: Sequence[Storage],
    ranks: int,
    per_token: float,
) -> list[Tensor]:
    """Predict what rounding the base and the factors adds, shape `(2, ranks)` for each storage.

    The mean of the matrices is used in place of the bases of all ranks.
    """
    core, choices = PATTERNS[pattern].core, [x.choice for x in sensitivities]
    base = mean_matrix(matrices, choices)
    whole = pooled(choices, (base.shape[0], base.shape[1]))
    with remembering():
        rounded = {
            kind: value_of(round_shared(base, kind, whole))
            for kind in dict.fromkeys(storage.format_of(core) for storage in storages)
            if kind.is_integer
        }
    losses = [torch.zeros(2, ranks, dtype=torch.float64) for _ in storages]
    for matrix, sensitivity in zip(matrices, sensitivities, strict=True):
        weightings = [sensitivity.choice, sensitivity.forecast]
        with remembering():
            known = {}  # losses of all low ranks of the remainder, and its balanced factors
            for kind, value in {**rounded, _FLOAT: base}.items():
                rest = matrix - value
                made = weighted_svd(rest, sensitivity.choice)
                costs = _rank_losses(terms_of(rest, made), sensitivity, ranks)
                known[kind] = costs, balanced(made.left, made.right)
            for total, storage in zip(losses, storages, strict=True):
                costs, (left, right) = known[storage.format_of(core)]
                more = per_token * (costs - known[_FLOAT][0])
                total += torch.where(costs.isfinite(), more, torch.inf)
                if storage.number_format.is_integer:
                    product = predict_product_losses(left, right, storage.number_format, weightings)
                    product = product[:, :ranks].double().cpu()
                    total += torch.nn.functional.pad(product, (0, ranks - product.shape[1]), value=torch.inf)
    return losses
