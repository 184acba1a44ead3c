"""Divide a budget among layers: choose a candidate for each layer by one Lagrange multiplier for all layers.

Each candidate of a layer has a size and a cost. With a Lagrange multiplier `m`, every layer takes the
candidate with the least `cost + m * size`. Among all choices with the same total size this choice has the
least total cost (Everett's theorem). As `m` decreases, every layer steps along the lower convex hull of its
candidates, from small to large ones. The steps of all layers are sorted by the cost that they save per unit
of size, and taken until no further step fits. The rest of the budget is used in a way that a larger budget
never leads to a larger cost.

Reference:
    Everett 1963, "Generalized Lagrange multiplier method for solving problems of optimum allocation of
    resources"; Shoham, Gersho 1988, "Efficient bit allocation for an arbitrary set of quantizers".
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from tensornet.calibration.stats import weight_samples
from tensornet.compression.config import DEFAULT_FORMATS, CompressionConfig
from tensornet.errors import BudgetError
from tensornet.nn.storage import Storage
from tensornet.nn.targets import Target
from tensornet.quantization import NumberFormat
from tensornet.topology import Topology

_Choice = TypeVar("_Choice")


@dataclass(frozen=True)
class Candidate:
    """One way to store a weight.

    Args:
        topology: topology of the network; None means the dense matrix in the dtype of the model.
        storage: how the cores are stored.
        num_bytes: exact size in bytes, including scales and padding.
        params: number of stored values, including scales.
        predicted_loss: predicted loss increase; in nats per token if gradients were calibrated.
        error: relative Frobenius error.
        cost: loss increase for comparing candidates, predicted with little damping of the gradient moments.
            Little damping ranks candidates best but underestimates the loss on other text, so
            `predicted_loss` uses more damping.
        number_format: for a dense matrix, the name of its number format as the user gave it; else empty.
        tensors: number of tensors in the file of the model.
    """

    topology: Topology | None
    storage: Storage
    num_bytes: int
    params: int
    predicted_loss: float
    error: float
    cost: float = 0.0
    number_format: str = ""
    tensors: int = 1

    def scaled(self, factor: float) -> "Candidate":
        """Return a copy with the predicted losses multiplied by a factor."""
        return replace(self, cost=factor * self.cost, predicted_loss=factor * self.predicted_loss)


#: Fields of candidates that add up over layers.
SUMMED = ("num_bytes", "params", "predicted_loss", "cost", "tensors")


def joined(candidates: Sequence[Candidate], **changes: Any) -> Candidate:
    """Combine the candidates of several layers: a copy of the first one with the sums of sizes and losses.

    Args:
        candidates: the candidate of each layer.
        changes: other fields that differ from those of the first candidate.
    """
    sums = {name: sum(getattr(x, name) for x in candidates) for name in SUMMED}
    return replace(candidates[0], **sums, **changes)


@dataclass(frozen=True)
class SurveyedLayer:
    """A weight and the candidates for storing it.

    Args:
        names: names of the modules that use the weight; the first identifies it.
        shape: shape of the weight, `(out, in)`.
        dtype: dtype of the weight.
        candidates: ways to store the weight, with their sizes and predicted losses.
        sample: four elements of the weight, from `weight_samples`, to recognize the model.
        spectrum: singular values of the weight, to compare with a truncated SVD; empty if unknown.
        stack: name of the parameter that contains the weight and others; empty if there is none.
    """

    names: tuple[str, ...]
    shape: tuple[int, int]
    dtype: torch.dtype
    candidates: tuple[Candidate, ...]
    sample: tuple[float, ...] = ()
    spectrum: tuple[float, ...] = ()
    stack: str = ""

    @classmethod
    def of(
        cls, target: Target, candidates: Sequence[Candidate], spectrum: Sequence[float] = ()
    ) -> "SurveyedLayer":
        """Combine a weight and its candidates; the weight itself is not kept."""
        shape, dtype = (target.matrix.shape[0], target.matrix.shape[1]), target.matrix.dtype
        sample = weight_samples([target])[target.name]
        return cls(target.names, shape, dtype, tuple(candidates), sample, tuple(spectrum), target.stack)

    @property
    def name(self) -> str:
        """Name of the weight in plans and reports."""
        return self.names[0]

    @property
    def grid(self) -> str | None:
        """Name of the smallest number format that stores the weight without error; None if there is none."""
        exact = [x for x in self.candidates if x.error == 0 and x.storage.quantized and x.number_format]
        best = min(exact, key=lambda x: x.num_bytes, default=None)
        return None if best is None else best.storage.number_format.name

    @property
    def numel(self) -> int:
        """Number of elements of the weight."""
        return self.shape[0] * self.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the weight in its own dtype."""
        return self.numel * self.dtype.itemsize


class CostCurve(NamedTuple):
    """Sizes (parameters or bytes) and costs of the candidates of one layer.

    Both tensors have shape `(candidates,)`. Costs may have any unit, but must add up over layers.
    """

    sizes: Tensor
    costs: Tensor

    def best(self, multiplier: float) -> int:
        """Return the index of the candidate with the least `cost + multiplier * size`."""
        return int((self.costs + multiplier * self.sizes).argmin())


def spend_size(curves: Sequence[CostCurve], budget: float) -> list[int]:
    """Choose one candidate for each layer, so that the total size is within a budget and the cost is small.

    Args:
        curves: the cost curve of each layer.
        budget: largest total size.

    Returns:
        Index of the candidate of each layer.

    Raises:
        BudgetError: the smallest candidates together are larger than the budget.
    """
    least = sum(float(curve.sizes.min()) for curve in curves)
    if least > budget:
        raise BudgetError(
            f"The budget allows {budget:,.6g}, but the smallest candidates of all layers need {least:,.6g}; "
            "raise the budget or choose fewer layers."
        )
    start, steps = hull_steps(curves)
    # `walk`: take all steps that fit, in order; a layer whose step does not fit takes no further steps.
    # With a larger budget the cost is never larger: at the first step that differs, the larger budget allows
    # a step that the smaller one does not, and all later steps save less per unit of size.
    walk, blocked = list(start), set()
    left = budget - total_size(curves, start)
    for layer, candidate, growth in steps:
        if layer in blocked:
            continue
        if growth <= left:
            walk[layer], left = candidate, left - growth
        else:
            blocked.add(layer)
    # `other`: stop at the first step that does not fit. Then, in one layer, switch to another candidate: the
    # one that saves the most cost among those that fit. The cheaper of `walk` and `other` is returned.
    other, left = list(start), budget - total_size(curves, start)
    for layer, candidate, growth in steps:
        if growth > left:
            break
        other[layer], left = candidate, left - growth
    best, place = 0.0, None
    for layer, (curve, index) in enumerate(zip(curves, other, strict=True)):
        saving = curve.costs[index] - curve.costs
        saving = torch.where(curve.sizes - curve.sizes[index] <= left, saving, 0.0)
        if float(saving.max()) > best:
            best, place = float(saving.max()), (layer, int(saving.argmax()))
    if place is not None:
        other[place[0]] = place[1]
    return min((walk, other), key=lambda chosen: total_cost(curves, chosen))


def spend_cost(
    curves: Sequence[CostCurve], allowed: float, counted: Sequence[Tensor] | None = None
) -> list[int]:
    """Choose one candidate for each layer, so that the total cost is within a budget and the size is small.

    Args:
        curves: the cost curve of each layer.
        allowed: largest total cost.
        counted: costs that count against the budget, if they differ from the costs in `curves`.

    Returns:
        Index of the candidate of each layer.

    Raises:
        BudgetError: the most accurate candidates together cost more than allowed.
    """
    charged = counted if counted is not None else [curve.costs for curve in curves]

    def charge(multiplier: float) -> float:
        return sum(float(x[c.best(multiplier)]) for x, c in zip(charged, curves, strict=True))

    least = charge(0.0)
    if least > allowed:
        raise BudgetError(
            f"A cost of {allowed:g} is allowed, but the best candidates already cost {least:g}; allow more "
            "or choose fewer layers."
        )
    # The cost grows with the multiplier: find the largest multiplier whose cost is still allowed.
    low, high = 0.0, 1.0
    while charge(high) <= allowed and high < 1e12:
        high *= 4
    for _ in range(100):
        # Bisect on a logarithmic scale, since multipliers span many orders of magnitude.
        middle = (max(low, high * 1e-12) * high) ** 0.5
        low, high = (middle, high) if charge(middle) <= allowed else (low, middle)
    return [curve.best(low) for curve in curves]


def decide_alone(
    dense: Sequence[int],
    ratio: float,
    decide: Callable[[int, float], _Choice],
    stay: Callable[[int], tuple[_Choice, float]],
) -> list[_Choice]:
    """Choose the candidate of each layer separately, with the same parameter ratio for all layers.

    Even the smallest candidate of a tiny matrix may have more parameters than the ratio allows. Such a layer
    stays dense, and the ratio of the other layers is lowered, so that all layers together meet `ratio`.

    Args:
        dense: number of parameters of each dense layer.
        ratio: largest fraction of the dense parameters to keep.
        decide: function that returns the candidate for a layer index and a ratio; it raises `BudgetError` if
            there is none.
        stay: function that returns the candidate of a layer that stays dense, and its number of parameters.

    Raises:
        BudgetError: the ratio cannot be met; the error is that of the first layer that failed.
    """
    refused: dict[int, BudgetError] = {}
    share = ratio
    while True:
        chosen: dict[int, _Choice] = {}
        before = len(refused)
        for index in range(len(dense)):
            if index not in refused:
                try:
                    chosen[index] = decide(index, share)
                except BudgetError as error:
                    refused[index] = error
        if len(refused) == before:
            return [chosen[k] if k in chosen else stay(k)[0] for k in range(len(dense))]
        left = ratio * sum(dense) - sum(stay(index)[1] for index in refused)
        rest = sum(dense[index] for index in chosen)
        if left <= 0 or rest == 0:
            raise min(refused.items())[1]
        share = left / rest


def frontier(curves: Sequence[CostCurve], points: int = 64) -> list[tuple[float, float]]:
    """Compute pairs `(total size, total cost)` of optimal choices of candidates, sorted by decreasing size.

    Args:
        curves: the cost curve of each layer.
        points: largest number of pairs.
    """
    steps = [c.costs.max() / (c.sizes.max() - c.sizes.min()).clamp_min(1) for c in curves]
    steepest = max(max(float(step) for step in steps), 1e-300)
    # The choices of candidates change at multipliers near `steepest`.
    top = float(torch.tensor(steepest, dtype=torch.float64).log10())
    exponents = torch.logspace(top - 8, top + 3, points - 1, base=10, dtype=torch.float64)
    multipliers = [0.0, *exponents.tolist()]
    allocations = [[curve.best(multiplier) for curve in curves] for multiplier in multipliers]
    pairs = {(total_size(curves, chosen), total_cost(curves, chosen)) for chosen in allocations}
    return sorted(pairs, reverse=True)


def total_size(curves: Sequence[CostCurve], chosen: Sequence[int]) -> float:
    """Sum the sizes of the chosen candidates."""
    return sum(float(curve.sizes[index]) for curve, index in zip(curves, chosen, strict=True))


def total_cost(curves: Sequence[CostCurve], chosen: Sequence[int]) -> float:
    """Sum the costs of the chosen candidates."""
    return sum(float(curve.costs[index]) for curve, index in zip(curves, chosen, strict=True))


def hull_steps(curves: Sequence[CostCurve]) -> tuple[list[int], list[tuple[int, int, float]]]:
    """Find the smallest candidate of each layer, and the order of the steps to larger candidates.

    Returns:
        The index of the smallest candidate of each layer (if several are smallest, the one of least cost);
        and the list of all steps along the lower convex hulls, as `(layer, candidate, growth in size)`. Steps
        that save more cost per unit of size come first.
    """
    start, steps = [], []
    for layer, curve in enumerate(curves):
        sizes, costs = curve.sizes.tolist(), curve.costs.tolist()
        hull = lower_hull(sizes, costs)
        start.append(hull[0])
        for a, b in pairwise(hull):
            growth = sizes[b] - sizes[a]
            steps.append(((costs[b] - costs[a]) / growth, layer, growth, b))
    return start, [(layer, candidate, growth) for _, layer, growth, candidate in sorted(steps)]


def lower_hull(sizes: Sequence[float], costs: Sequence[float]) -> list[int]:
    """Return indices of the points on the decreasing part of the lower convex hull, by increasing size."""
    hull: list[int] = []
    for k in sorted(range(len(sizes)), key=lambda index: (sizes[index], costs[index], index)):
        if hull and costs[k] >= costs[hull[-1]]:
            continue
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            if (costs[b] - costs[a]) * (sizes[k] - sizes[a]) < (costs[k] - costs[a]) * (sizes[b] - sizes[a]):
                break
            hull.pop()
        hull.append(k)
    return hull


# --- all limits of a configuration ------------------------------------------------------------------

#: Upper bound of the bytes of a tensor in the header of a safetensors file, without the name of its layer:
#: syntax, dtype, shape, two offsets, and the names of core and part.
MOST_ENTRY = 112
#: Number format of all layers if there are neither calibration data nor `formats`.
_BLIND = "int8"
#: Largest number of layers named in an error message.
_NAMED = 4


def curve_of(candidates: Sequence[Candidate], unit: str, entry: int = 0) -> CostCurve:
    """Make the cost curve of a layer.

    Args:
        candidates: the candidates of the layer.
        unit: the attribute used as size: `"params"` or `"num_bytes"`.
        entry: size that is added for each tensor, see `entry_bytes`.
    """
    sizes = torch.tensor([float(getattr(x, unit) + entry * x.tensors) for x in candidates]).double()
    return CostCurve(sizes, torch.tensor([x.cost for x in candidates], dtype=torch.float64))


def choose_candidates(
    layers: Sequence[SurveyedLayer],
    candidates: Sequence[Sequence[Candidate]],
    config: CompressionConfig,
    objective: str,
    *,
    untargeted: tuple[int, int, int] = (0, 0, 0),
    names: Sequence[str] | None = None,
    shares: Sequence[float] | None = None,
) -> tuple[list[int], str]:
    """Choose one candidate for each layer, so that all budgets of a configuration are met.

    Args:
        layers: the weights to compress.
        candidates: the candidates of each layer, or of each group of fused layers.
        config: the configuration.
        objective: objective for which the candidates were made.
        untargeted: number of elements and number of bytes of all parameters that are not targeted, and all
            other bytes of the model's file; they count in budgets of the whole model.
        names: name of each layer or group, for error messages; by default, the names of the layers.
        shares: share of the tokens that are multiplied with each layer or group; by default 1.

    Returns:
        Index of the candidate of each layer, and the name of the tightest budget.

    Raises:
        BudgetError: the budgets cannot be met, or the speed of a number format is not known.
    """
    if objective != "curvature" or not (config.param_ratio is not None or config.needs_curvature):
        if config.formats:
            return one_format(layers, candidates, config, untargeted)
        capping = (x for x in ("param_ratio", "rel_error", "max_bond") if getattr(config, x) is not None)
        bound_by = next(capping, "topology" if config.fixed else "exact")
        return _choose_alone(layers, candidates, config), bound_by
    caps: list[Cap] = []
    names = names or [x.name for x in layers]

    def add(name: str, unit: str, allowed: float, entry: int = 0) -> None:
        caps.append(Cap(name, [curve_of(found, unit, entry) for found in candidates], allowed))

    if config.param_ratio is not None:
        add("param_ratio", "params", config.param_ratio * sum(x.numel for x in layers))
    for name, allowed in allowed_bytes(config, layers, untargeted).items():
        add(name, "num_bytes", allowed, entry_bytes(config, name, layers))
    if config.tokens_per_second is not None:
        caps.append(_time_cap(candidates, shares or [1.0] * len(candidates), config, untargeted[1]))
    if not caps:
        assert config.loss_increase is not None
        curves = [curve_of(found, "num_bytes" if config.formats else "params") for found in candidates]
        losses = [torch.tensor([x.predicted_loss for x in found]).double() for found in candidates]
        return spend_cost(curves, config.loss_increase, losses), "loss_increase"
    try:
        chosen, bound_by = choose_within(caps, names)
    except BudgetError as error:
        raise BudgetError(f"{error}{_with_rel_error(config)}") from error
    for name in _common_formats(candidates):  # one format for all layers may cost less
        same = [uniform(found)[name] for found in candidates]
        cheaper = total_cost(caps[0].curves, same) < total_cost(caps[0].curves, chosen)
        if cheaper and all(cap.use(same) <= 1 for cap in caps):
            chosen, bound_by = same, max(caps, key=lambda cap: cap.use(same)).name
    if config.loss_increase is not None:
        predicted = sum(found[k].predicted_loss for found, k in zip(candidates, chosen, strict=True))
        if predicted > config.loss_increase:
            raise BudgetError(
                f"{bound_by} and loss_increase={config.loss_increase} contradict each other: the best plan "
                f"of this size increases the loss by {predicted:.4g}. Leave out one of them, or raise it."
            )
    return chosen, bound_by


class Cap(NamedTuple):
    """Limit on the total size of all layers, in one unit.

    Args:
        name: name of the budget, for errors and reports.
        curves: the cost curve of each layer with sizes in this unit; the costs are the same for all limits.
        allowed: largest total size.
    """

    name: str
    curves: Sequence[CostCurve]
    allowed: float

    def use(self, chosen: Sequence[int]) -> float:
        """Compute the fraction of the limit that a choice of candidates uses."""
        return total_size(self.curves, chosen) / self.allowed


def choose_within(caps: Sequence[Cap], names: Sequence[str] = ()) -> tuple[list[int], str]:
    """Choose one candidate for each layer, so that all limits are met and the total cost is small.

    Usually the best choice for one of the limits meets the others too. If no such choice does, as may happen
    with limits in different units, candidates are measured by their shares of the limits. The size of a
    candidate is then its largest share of any limit. If these sizes sum to at most 1, all limits are met.

    Args:
        caps: the limits.
        names: names of the layers, for error messages.

    Returns:
        Index of the candidate of each layer, and the name of the tightest limit.

    Raises:
        BudgetError: a limit cannot be met, or the limits cannot all be met together.
    """
    alone = []
    for cap in caps:
        try:
            alone.append(spend_size(cap.curves, cap.allowed))
        except BudgetError as error:
            # The message names the layers with one candidate first. Within these and within the others,
            # layers with a larger minimum size are named first.
            least = [(len(curve.sizes) == 1, float(curve.sizes.min())) for curve in cap.curves]
            fixed = [size for only, size in least if only]
            text = (
                f" {len(fixed)} layers have one candidate and take {sum(fixed):,.6g}, such as layers whose "
                "rows fit no given number format (name others, or exclude the layers), or whose gradients "
                "are zero in calibration (exclude the layers)."
            )
            order = sorted(range(len(names)), key=lambda k: least[k], reverse=True)
            shown = ", ".join(f"{names[k]} ({least[k][1]:,.6g})" for k in order[:_NAMED])
            more = f"{text if fixed else ''} The largest are {shown}." if shown else ""
            raise BudgetError(f"{cap.name}: {error}{more}") from error
    kept = [chosen for chosen in alone if all(cap.use(chosen) <= 1 for cap in caps)]
    if not kept:
        shares = (
            torch.stack([cap.curves[k].sizes / cap.allowed for cap in caps]).amax(0)
            for k in range(len(caps[0].curves))
        )
        joint = [CostCurve(x, curve.costs) for x, curve in zip(shares, caps[0].curves, strict=True)]
        try:
            kept = [spend_size(joint, 1.0)]
        except BudgetError as error:
            raise BudgetError(
                f"{' and '.join(cap.name for cap in caps)} contradict each other: no choice of candidates "
                "was found that keeps them all. Leave out one of them, or raise it."
            ) from error
    best = min(kept, key=lambda chosen: total_cost(caps[0].curves, chosen))
    return best, max(caps, key=lambda cap: cap.use(best)).name


def _time_cap(
    candidates: Sequence[Sequence[Candidate]],
    shares: Sequence[float],
    config: CompressionConfig,
    untargeted_bytes: int,
) -> Cap:
    """Limit the seconds in which a runtime reads all weights once (see `CompressionConfig.speeds`).

    Raises:
        BudgetError: the speed of a format is not known; or the parameters that are not targeted take longer.
    """
    speeds, wanted = config.speeds, config.tokens_per_second
    assert isinstance(speeds, Mapping)
    assert wanted is not None
    formats = {x.number_format for found in candidates for x in found}
    known = {name: NumberFormat.parse(name).name for name in formats if name}
    if missing := sorted({known.get(name, "networks") for name in formats} - speeds.keys()):
        raise BudgetError(
            f"tokens_per_second needs the speed of {', '.join(missing)}; speeds has {', '.join(speeds)}. Add "
            "it, or name the formats to plan with: formats=('gguf', 'int4:g32:float16')."
        )
    others = untargeted_bytes / speeds.get("float", max(speeds.values()))
    allowed = 1 / wanted - others
    if allowed <= 0:
        raise BudgetError(
            f"tokens_per_second={wanted:g} cannot be reached: tensors that are not compressed already take "
            f"{others:.3g} s for a token. Lower it, or target more layers."
        )
    curves = []
    for found, share in zip(candidates, shares, strict=True):
        seconds = [share * x.num_bytes / speeds[known[x.number_format]] for x in found]
        costs = torch.tensor([x.cost for x in found], dtype=torch.float64)
        curves.append(CostCurve(torch.tensor(seconds, dtype=torch.float64), costs))
    return Cap("tokens_per_second", curves, allowed)


def entry_bytes(config: CompressionConfig, budget: str, layers: Sequence[SurveyedLayer]) -> int:
    """Bound the bytes that a tensor takes in the header of a safetensors file, if a budget counts them.

    `max_bytes` counts them, except for export targets, which count their own files.

    Args:
        config: the configuration.
        budget: name of the budget.
        layers: the weights to compress, whose names are parts of the names of tensors.
    """
    counted = budget == "max_bytes" and config.menu is None
    return MOST_ENTRY + max(len(x.name) for x in layers) if counted else 0


def allowed_bytes(
    config: CompressionConfig, layers: Sequence[SurveyedLayer], untargeted: tuple[int, int, int]
) -> dict[str, float]:
    """Map the name of each budget of bytes to the number of bytes that it leaves for the targeted layers.

    Args:
        config: the configuration.
        layers: the weights to compress.
        untargeted: number of elements and number of bytes of all parameters that are not targeted, and all
            other bytes of the model's file.

    Raises:
        BudgetError: the parameters that are not targeted already exceed a budget.
    """
    found = {}
    if config.bits_per_weight is not None:
        found["bits_per_weight"] = config.bits_per_weight / 8 * sum(x.numel for x in layers)
    if config.max_bytes is not None:
        others = untargeted[1] + (untargeted[2] if config.menu is None else 0)
        found["max_bytes"] = config.max_bytes - others
        if found["max_bytes"] <= 0:
            raise BudgetError(
                f"max_bytes={config.max_bytes:,} is for the whole model, but tensors that are not compressed "
                f"take {others:,} bytes. Raise it, or target more layers."
            )
    return found


def one_format(
    layers: Sequence[SurveyedLayer],
    candidates: Sequence[Sequence[Candidate]],
    config: CompressionConfig,
    untargeted: tuple[int, int, int],
) -> tuple[list[int], str]:
    """Choose the largest number format with which all layers meet the budgets; used without calibration data.

    Returns:
        Index of the candidate of each layer, and the name of the tightest budget.

    Raises:
        BudgetError: no format meets the budgets.
    """
    caps = allowed_bytes(config, layers, untargeted)
    names = _common_formats(candidates)
    if config.formats == DEFAULT_FORMATS:  # without data, fewer than 8 bits are used only on request
        names = [_BLIND]
    entry = max((entry_bytes(config, name, layers) for name in caps), default=0)
    sizes = dict.fromkeys(names, 0)
    for name in names:
        same = [found[uniform(found)[name]] for found in candidates]
        sizes[name] = sum(x.num_bytes + entry * x.tensors for x in same)
    for name in sorted(names, key=lambda x: -sizes[x]):
        if all(sizes[name] <= allowed for allowed in caps.values()):
            return [uniform(found)[name] for found in candidates], min(
                caps, key=caps.__getitem__, default="exact"
            )
    budget = " and ".join(f"{name}={getattr(config, name)}" for name in caps)
    raise BudgetError(
        f"{budget}: without calibration data all layers get one format, {' or '.join(names)}, which takes "
        f"{min(sizes.values()):,.0f} bytes, but {min(caps.values()):,.0f} are allowed. Pass "
        "calibration=batches to plan smaller formats, or name one for all layers: formats=('int4',)."
    )


def _common_formats(candidates: Sequence[Sequence[Candidate]]) -> list[str]:
    """List the number formats in which the dense matrix of every layer can be stored."""
    return [x for x in uniform(candidates[0]) if all(x in uniform(found) for found in candidates)]


def uniform(candidates: Sequence[Candidate]) -> dict[str, int]:
    """Map each number format to the index of the candidate that stores the dense matrix in this format."""
    return {x.number_format: k for k, x in enumerate(candidates) if x.number_format}


def _with_rel_error(config: CompressionConfig) -> str:
    """Return a sentence about `rel_error` for error messages; the text is empty if `rel_error` is not set."""
    limit = f" These candidates keep rel_error={config.rel_error}; a larger error needs less."
    return "" if config.rel_error is None else limit


def _choose_alone(
    layers: Sequence[SurveyedLayer], candidates: Sequence[Sequence[Candidate]], config: CompressionConfig
) -> list[int]:
    """Choose the best candidate of each layer separately, under the limits on single layers."""
    if config.param_ratio is not None:
        sizes = [x.numel for x in layers]

        def decide(index: int, ratio: float) -> int:
            try:
                return spend_size([curve_of(candidates[index], "params")], ratio * sizes[index])[0]
            except BudgetError as error:
                raise BudgetError(
                    f"Layer {layers[index].name!r}: {error}{_with_rel_error(config)}"
                ) from error

        def stay(index: int) -> tuple[int, float]:
            """Return the index and the size of the dense candidate, or of the smallest if none is dense."""
            found = candidates[index]
            dense = [k for k, x in enumerate(found) if x.topology is None]
            place = dense[0] if dense else min(range(len(found)), key=lambda k: found[k].params)
            return place, float(found[place].params)

        return decide_alone(sizes, config.param_ratio, decide, stay)
    if config.rel_error is not None:
        return [min(range(len(found)), key=lambda k: found[k].params) for found in candidates]
    return [min(range(len(found)), key=lambda k: found[k].cost) for found in candidates]
