"""Predicted losses of shared forms in number formats, at all ranks, beside those in floating point.

To explain how losses are predicted: rounding adds to the loss of the form, whose error it hardly meets. What
it adds to factors is predicted without rounding them, at a few ranks for projections and bases of outputs,
between which it is interpolated. A base in integers is rounded once for each format; the low ranks then take
a part of its rounding error, which is found exactly.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from tensornet._util import remembering
from tensornet.compression.sensitivity import Sensitivity
from tensornet.compression.shared_forms import (
    SHARED_FORMS,
    FormCurve,
    form_curve,
    mean_matrix,
    rank_costs,
    relative_errors,
    terms_of,
    trace,
    working,
)
from tensornet.compression.shared_rounding import (
    balanced,
    even_columns,
    pooled,
    round_shared,
    seen_by_left,
    seen_by_right,
    value,
)
from tensornet.linalg.weighted_svd import Weighting, weighted_svd
from tensornet.nn.storage import Storage
from tensornet.quantization import NumberFormat
from tensornet.quantization.expected_loss import expected_losses
from tensornet.quantization.prediction import spaced_rows
from tensornet.quantization.product_loss import predict_product_losses
from tensornet.quantization.rounding import LEAST_DAMPING
from tensornet.topologies import topology_family
from tensornet.topologies.dense import ROUNDING_DAMPING
from tensornet.topologies.residual_family import BASE

#: Fractions of the largest rank at which the losses of rounding are predicted.
_TRIED = (0.0, 0.06, 0.12, 0.25, 0.5, 1.0)
#: Fewest bits of factors that are rounded, and of those that are taken as accurate.
_LEAST_BITS, _ACCURATE_BITS = 4, 8
#: Rows of a factor that stand for all.
_SAMPLED_ROWS = 128
#: Own format of the model.
_FLOAT = NumberFormat()


def form_curves(
    name: str,
    matrices: Sequence[Tensor],
    sensitivities: Sequence[Sensitivity],
    formats: Sequence[NumberFormat] = (),
    *,
    per_token: float = 1.0,
) -> list[FormCurve]:
    """Predict the losses of one form at all ranks in each encoding.

    To explain what a shared core costs: the error of its rounding is the same in all experts, so that it adds
    up over those that a token reaches, for which the moments of single experts do not account. If they have
    equal weights it costs as many times more. In a trained mixture of 8 experts, two for each token, common
    errors cost 1.4 to 2.6 times private ones of equal price.

    Args:
        name: a key of `SHARED_FORMS`.
        matrices: each `(out, in)`.
        sensitivities: of the loss to errors in each.
        formats: number formats that cores may be stored in; the model's own alone if there are none.
        per_token: number of the matrices that a token reaches.

    Example:
        >>> import torch
        >>> from tensornet.linalg.weighted_svd import Weighting
        >>> matrices = [torch.randn(32, 64) for _ in range(3)]
        >>> seen = [Sensitivity(Weighting(), Weighting())] * 3
        >>> formats = [_FLOAT, NumberFormat.parse("int8")]
        >>> [str(x.storage.number_format) for x in form_curves("inputs", matrices, seen, formats)]
        ['float', 'int8']
    """
    choices, forecasts = [x.choice for x in sensitivities], [x.forecast for x in sensitivities]
    plain = form_curve(name, matrices, choices, forecasts)
    if not len(plain.numbers):
        return []
    found = [plain] if not formats or _FLOAT in formats else []
    storages = [storage for storage in encodings(name, formats) if storage.quantized]
    if not storages:
        return found
    added = _base_losses if name == "base" else _factor_losses
    losses = added(name, working(matrices), sensitivities, storages, len(plain.numbers), per_token)
    floating = torch.stack([plain.costs, plain.forecasts, _squares(plain, matrices)])
    for storage, more in zip(storages, losses, strict=True):
        curve = _joined(name, matrices, storage, (floating + more).clamp_min(0))
        found += [curve] if len(curve.numbers) else []
    return found


def encodings(name: str, formats: Sequence[NumberFormat]) -> list[Storage]:
    """List the encodings of the cores of a form, from the allowed formats.

    Private factors, and projections and bases of outputs, have the formats that factors of networks have. A
    shared core may have eight bits or more beside private ones with four. A base has any format, beside
    factors in the same one or in the smallest of eight bits or more.

    Example:
        >>> allowed = [NumberFormat.parse(name) for name in ("int8", "int4")]
        >>> [sorted(x.to_dict().get("core_formats", {})) for x in encodings("inputs", allowed)]
        [[], [], ['1']]
    """
    core = SHARED_FORMS[name].core
    own = [x for x in formats if x == _FLOAT or x.is_integer]
    accurate = [x for x in own if x == _FLOAT or (x.bits or 0) >= _ACCURATE_BITS]
    best = min(accurate, key=lambda x: x.nbytes((64, 64)), default=None)
    pairs: list[tuple[NumberFormat, NumberFormat]] = []  # private, shared
    if name == "base":
        for shared in own:
            same = [shared] if shared == _FLOAT or (shared.bits or 0) >= _LEAST_BITS else []
            pairs += [(x, shared) for x in (*same, best) if x is not None]
    else:
        for private, _ in topology_family("low_rank").encodings(own):
            pairs += [(private, shared) for shared in (private, best) if shared is not None]
    made = dict.fromkeys((private, shared) for private, shared in pairs if _worth(private, shared))
    return [
        Storage(number_format=private, core_formats=() if private == shared else ((core, shared),))
        for private, shared in made
    ]


def _worth(private: NumberFormat, shared: NumberFormat) -> bool:
    """Return True unless private factors are float beside integers: they are many, and 8 bits do as well."""
    return private != _FLOAT or shared == _FLOAT


def _squares(curve: FormCurve, matrices: Sequence[Tensor]) -> Tensor:
    """Convert the relative errors of a curve to losses without weighting, shape `(count, k)`."""
    norms = [torch.linalg.vector_norm(x, dtype=torch.float64).cpu() for x in matrices]
    return (curve.errors * torch.stack(norms)[:, None]).square() / 2


def _joined(name: str, matrices: Sequence[Tensor], storage: Storage, losses: Tensor) -> FormCurve:
    """Build the curve of one encoding from its losses, at the ranks that are smaller than integers alone."""
    rows, columns = matrices[0].shape
    numbers, sizes = _sizes(name, len(matrices), rows, columns, losses.shape[2], storage, matrices[0].dtype)
    core = SHARED_FORMS[name].core
    largest = max(
        x.nbytes((rows, columns), matrices[0].dtype) for x in (storage.number_format, storage.format_of(core))
    )
    useful = (sizes < len(matrices) * largest) & losses.sum((0, 1)).isfinite()
    known = int(useful.sum())
    errors = [relative_errors(x, matrix) for x, matrix in zip(losses[2], matrices, strict=True)]
    return FormCurve(
        name,
        numbers[:known],
        sizes[:known],
        losses[0, :, :known],
        losses[1, :, :known],
        torch.stack(errors)[:, :known],
        storage,
    )


@lru_cache(maxsize=256)
def _sizes(
    name: str, count: int, rows: int, columns: int, most: int, storage: Storage, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Count numbers and bytes of all matrices at the ranks up to `most`; the shared core counts once."""
    form, found = SHARED_FORMS[name], []
    for rank in range(1, most + 1):
        topology = form.build(rows, columns, rank)
        each = storage.num_params(topology), storage.num_bytes(topology, dtype)
        once = storage.core_size(topology, form.core, dtype)
        found.append([count * x - (count - 1) * y for x, y in zip(each, once, strict=True)])
    numbers, sizes = torch.tensor(found, dtype=torch.float64).T
    return numbers, sizes


def _weightings(sensitivities: Sequence[Sensitivity]) -> list[list[Weighting]]:
    """List the weightings of all matrices for the choice, for the forecast, and without weights."""
    choices, forecasts = [x.choice for x in sensitivities], [x.forecast for x in sensitivities]
    return [choices, forecasts, [Weighting()] * len(choices)]


def _factor_losses(
    name: str,
    matrices: Sequence[Tensor],
    sensitivities: Sequence[Sensitivity],
    storages: Sequence[Storage],
    ranks: int,
    per_token: float,
) -> list[Tensor]:
    """Predict what rounding both factors adds in each encoding, shape `(3, count, ranks)`."""
    form, kinds = SHARED_FORMS[name], _weightings(sensitivities)
    tried = sorted({max(1, round(fraction * ranks)) for fraction in _TRIED})
    private = list(dict.fromkeys(x.number_format for x in storages))
    shared = list(dict.fromkeys(x.format_of(form.core) for x in storages))
    shares, owns, factors = [], [], []
    for cores in form.fits(matrices, kinds[0], tried):
        lefts, rights = [left for left, _ in cores], [right for _, right in cores]
        if name == "inputs":
            lefts, right = even_columns(cores)
            rights = [right] * len(lefts)
        pairs = list(zip(lefts, rights, strict=True))
        factors.append(pairs)
        shares.append(_shared_losses(name, pairs, kinds, shared))
    for place, sides in enumerate(zip(*kinds, strict=True)):
        with remembering():  # the moments of a matrix are factorised once for all ranks
            owns.append([_private_losses(name, pairs[place], sides, private) for pairs in factors])
    found = []
    for storage in storages:
        first, second = shared.index(storage.format_of(form.core)), private.index(storage.number_format)
        both = torch.stack([x[first] for x in shares], dim=-1)  # shape: (3, count, tried)
        both = _added_up(both, per_token)
        both = both + torch.stack([torch.stack([x[second] for x in own], dim=-1) for own in owns], dim=1)
        found.append(_between(both, tried, ranks))
    return found


def _shared_losses(
    name: str,
    pairs: Sequence[tuple[Tensor, Tensor]],
    kinds: Sequence[Sequence[Weighting]],
    formats: Sequence[NumberFormat],
) -> Tensor:
    """Predict the losses of rounding the shared factor, of each matrix, shape `(formats, 3, count)`."""
    core = pairs[0][1] if name == "inputs" else pairs[0][0]
    shape, parts, sums = (core.shape[0], core.shape[1]), [], []
    for weightings in kinds:
        if name == "inputs":
            seen = [seen_by_right(a, x) for (a, _), x in zip(pairs, weightings, strict=True)]
        else:
            seen = [seen_by_left(b, x) for (_, b), x in zip(pairs, weightings, strict=True)]
        sums.append(pooled(seen, shape))
        sizes = [trace(x.rows, shape[0]) * trace(x.columns, shape[1]) for x in seen]
        parts.append(torch.tensor(sizes, dtype=torch.float64) / max(sum(sizes), 1e-300))
    losses = _expected(core, formats, sums, ROUNDING_DAMPING)
    return losses[:, :, None] * torch.stack(parts)


def _private_losses(
    name: str, pair: tuple[Tensor, Tensor], weightings: Sequence[Weighting], formats: Sequence[NumberFormat]
) -> Tensor:
    """Predict the losses of rounding the private factor of one matrix, shape `(formats, 3)`."""
    left, right = pair
    if name == "inputs":
        return _expected(left, formats, [seen_by_left(right, x) for x in weightings])
    return _expected(right, formats, [seen_by_right(left, x) for x in weightings])


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
    losses = expected_losses(core, integers, weightings, row_damping=row_damping, sample=sample)
    found[torch.tensor([x.is_integer for x in formats])] = losses.double().cpu().clamp_min(0)
    return found


def _added_up(losses: Tensor, per_token: float) -> Tensor:
    """Multiply losses of a shared core, but not its squared errors, shape `(3, ...)`."""
    return torch.cat([per_token * losses[:2], losses[2:]])


def _between(values: Tensor, tried: Sequence[int], ranks: int) -> Tensor:
    """Interpolate values at a few ranks to all of them, log-linearly, shape `(3, count, ranks)`."""
    logs = np.log(np.maximum(values.numpy(), 1e-300)).reshape(-1, len(tried))
    every = np.log(np.arange(1, ranks + 1))
    rows = [np.interp(every, np.log(tried), row) for row in logs]
    return torch.from_numpy(np.exp(np.stack(rows))).reshape(*values.shape[:2], ranks)


def _base_losses(
    name: str,
    matrices: Sequence[Tensor],
    sensitivities: Sequence[Sensitivity],
    storages: Sequence[Storage],
    ranks: int,
    per_token: float,
) -> list[Tensor]:
    """Predict what rounding the base and the factors adds in each encoding, shape `(3, count, ranks)`.

    The mean of the matrices stands for the bases of all ranks.
    """
    choices = [x.choice for x in sensitivities]
    base = mean_matrix(matrices, choices)
    whole = pooled(choices, (base.shape[0], base.shape[1]))
    with remembering():
        kept = {
            x: value(round_shared(base, x, whole))
            for x in dict.fromkeys(storage.format_of(BASE) for storage in storages)
            if x.is_integer
        }
    found: list[list[Tensor]] = [[] for _ in storages]
    for matrix, sensitivity in zip(matrices, sensitivities, strict=True):
        with remembering():
            known = {x: _low_ranks(matrix - rounded, sensitivity, ranks) for x, rounded in kept.items()}
            known[_FLOAT] = _low_ranks(matrix - base, sensitivity, ranks)
            for losses, storage in zip(found, storages, strict=True):
                costs, left, right = known[storage.format_of(BASE)]
                more = costs - known[_FLOAT][0]
                more = torch.where(costs.isfinite(), _added_up(more, per_token), torch.inf)
                losses.append(more + _product_losses(left, right, storage.number_format, sensitivity, ranks))
    return [torch.stack(losses, dim=1) for losses in found]


def _low_ranks(rest: Tensor, sensitivity: Sensitivity, ranks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the losses of all low ranks of a matrix, shape `(3, ranks)`, and balanced factors."""
    made = weighted_svd(rest, sensitivity.choice)
    costs = rank_costs(terms_of(rest, made), sensitivity.choice, sensitivity.forecast, ranks)
    return costs, *balanced(made.left, made.right)


def _product_losses(
    left: Tensor, right: Tensor, number_format: NumberFormat, sensitivity: Sensitivity, ranks: int
) -> Tensor:
    """Predict the losses of rounding both factors at all ranks, shape `(3, ranks)`."""
    if not number_format.is_integer:
        return torch.zeros(3, ranks, dtype=torch.float64)
    weightings = [sensitivity.choice, sensitivity.forecast, Weighting()]
    losses = predict_product_losses(left, right, number_format, weightings)[:, :ranks].double().cpu()
    return torch.nn.functional.pad(losses, (0, ranks - losses.shape[1]), value=torch.inf)
