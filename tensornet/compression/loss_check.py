"""Check predicted losses by measuring, before layers are replaced.

The predicted loss increase `1/2 tr(R E C E^T)` is of second order. For a large error it may be far too low.
An example is all-MiniLM-L6-v2: one output channel in front of a layer norm has thousands of times the power
of the others. An error of one percent of this channel is larger than all other channels, and gradients at the
dense weights do not show this.

`check_loss` therefore rounds the layers with large errors, and measures the loss of all such layers of a
block together. If the measured loss is far above the sum of the predictions, each half of this set of layers
is measured, and so on. This finds the layers that cause the loss. The predictions for these layers are
multiplied by the ratio of measured to predicted loss, and the plan is made again.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from tensornet._util import in_eval_mode
from tensornet.calibration.batches import Batch, BatchLike, some_rows
from tensornet.calibration.losses import TokenLosses, losses_against
from tensornet.calibration.stats import CalibrationStats
from tensornet.calibration.walk import find_chains, hidden_of, replaced_blocks
from tensornet.compression.allocate import Candidate
from tensornet.compression.apply import LayerCache, apply_plan
from tensornet.compression.layer_names import layer_names
from tensornet.compression.loss_increase import (
    LossIncrease,
    light_copy,
    opposite_errors,
)
from tensornet.compression.plan import CompressionPlan, LayerPlan, LossCheck, RaisedLoss
from tensornet.compression.prices import PriceList
from tensornet.errors import CalibrationWarning
from tensornet.nn.targets import Target, list_weights
from tensornet.nn.unfuse import unfused

#: Number of tokens on which the loss of layers is measured.
CHECK_TOKENS = 1024
#: Three limits. The number of rounds of planning and measuring. The number of groups of layers that are
#: measured in a round; a group has several blocks if there are more blocks than groups. The number of
#: measurements in a round that find out which layers of a group increase the loss too much.
ROUNDS, GROUPS, _SPLITS = 4, 12, 48
#: A prediction is raised if the measured loss exceeds two limits: `_TOO_LOW` times the prediction, and the
#: prediction plus `_SHARE` times the predicted loss of the whole plan. The factor is at most `_MOST`.
_TOO_LOW, _SHARE, _MOST = 2.0, 0.02, 1e4
#: With at least this many groups, predictions are first multiplied by a factor for all groups: the median
#: ratio of measured to predicted loss, or 1 if the median is smaller.
_COMMON = 4
#: A layer is measured if the product of two numbers is larger than this: the squared relative error of its
#: weight, and the power of its strongest output relative to the median output. The error of the strongest
#: output may then be larger than all other outputs.
_OUTLIER = 10.0
#: Exceptions that models raise if a block is skipped although other code needs more than the block's output.
_CANNOT_SKIP = (RuntimeError, TypeError, ValueError, AttributeError, LookupError)

Group = tuple[LayerPlan, ...]


def check_loss(
    prices: PriceList,
    model: nn.Module,
    batches: Sequence[BatchLike],
    stats: CalibrationStats | None,
    *,
    loss_fn: TokenLosses | None = None,
    cache: LayerCache | None = None,
    progress: bool = False,
    **budget: Any,
) -> PriceList:
    """Measure the loss of layers with large errors in a plan, and raise predictions that are far too low.

    The plan with raised predictions is checked in the same way, for a few rounds. The model is not changed.
    Plans without number formats or predicted losses are not checked.

    Args:
        prices: the candidates of this model, from `price`.
        model: the dense model.
        batches: batches as for `calibrate`; about a thousand of their tokens are used.
        stats: the statistics with which the model was priced.
        loss_fn: loss function (see `tensornet.calibration.losses`); `losses_against(model)` if absent.
        cache: receives the layers that are rounded for measurements, to be reused by `apply_plan`.
        progress: whether to show a progress bar.
        budget: budget of the plan (see `PriceList.plan`).

    Returns:
        The candidates with raised predictions.

    Raises:
        BudgetError: the budget cannot be met (see `PriceList.plan`).

    Example:
        >>> from tensornet.compression import check_loss, price
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
        >>> batches = [(torch.randn(64, 64), torch.randint(8, (64,)))]
        >>> stats = tn.calibrate(model, batches)
        >>> prices = price(model, tn.CompressionConfig(bits_per_weight=2.5), stats)
        >>> check_loss(prices, model, batches, stats).plan().loss_check.layers > 0
        True
    """
    if prices.template.objective != "curvature" or not prices.config.formats or not len(batches):
        return prices
    given, trial = prices, None
    check = prices.template.loss_check or LossCheck(0)
    measured = prices.measured or frozenset()
    assert stats is not None  # the curvature objective needs statistics
    with unfused(model):
        known = {x.name: x for x in list_weights(model)}
    targets = [known[layer.name] for layer in prices.layers]
    powers = _outlier_powers(targets, stats)
    for _ in range(ROUNDS):
        prices = replace(prices, template=replace(prices.template, loss_check=check), measured=measured)
        plan = prices.plan(**budget)
        suspects = {raised.layer for raised in check.raised}  # other schemes of these layers are checked too
        groups = _groups(plan, powers, suspects)
        groups = [x for x in groups if not all((layer.name, layer.scheme) in measured for layer in x)]
        if not groups:
            break
        if trial is None:
            try:
                trial = _Trial(model, batches, loss_fn, prices, stats, {} if cache is None else cache)
            except _CANNOT_COPY as error:
                warnings.warn(
                    f"Predicted losses were not checked by measuring, because {type(model).__name__} cannot "
                    f"be copied ({error}). verify=False skips the check and this warning.",
                    CalibrationWarning,
                    stacklevel=2,
                )
                return given
        factors = trial.factors(plan, groups, progress=progress)
        layers = {layer.name: layer for group in groups for layer in group}
        measured |= {(layer.name, layer.scheme) for layer in layers.values()}
        raised = [RaisedLoss(name, layers[name].scheme, round(x, 3)) for name, x in factors.items()]
        check = replace(check, raised=(*check.raised, *raised))
        raised_layers = [
            replace(x, candidates=_raise(x.candidates, layers[x.name], factors[x.name]))
            if x.name in factors
            else x
            for x in prices.layers
        ]
        prices = replace(prices, layers=tuple(raised_layers))
        if not factors:
            break
    return replace(prices, template=replace(prices.template, loss_check=check), measured=measured)


def _groups(plan: CompressionPlan, powers: Mapping[str, float], suspects: set[str]) -> list[Group]:
    """Group layers with uncertain predictions into at most `GROUPS` groups, by block.

    Args:
        plan: the plan.
        powers: result of `_outlier_powers`.
        suspects: names of layers whose prediction was too low in another scheme.
    """
    blocks: dict[str, list[LayerPlan]] = {}
    for layer, name in zip(plan, layer_names([layer.name for layer in plan]), strict=True):
        error = layer.error or 0.0
        drowns = layer.topology is not None and error * error * powers[layer.name] > _OUTLIER
        if layer.loss_increase and (layer.name in suspects or drowns or layer.has_large_error):
            blocks.setdefault(name.place, []).append(layer)
    runs, each = list(blocks.values()), max(1, -(-len(blocks) // GROUPS))
    return [
        tuple(layer for block in runs[k : k + each] for layer in block) for k in range(0, len(runs), each)
    ]


def _outlier_powers(targets: Sequence[Target], stats: CalibrationStats) -> dict[str, float]:
    """Compute, for each weight, the power of the strongest output relative to the power of the median output.

    The power of an output is the sum of its squared weights times the mean squares of the inputs, as if the
    inputs were independent. The result is 1 for embeddings, and if most outputs are zero.
    """
    found = {}
    for target in targets:
        found[target.name] = 1.0
        moment = next((stats.columns[name] for name in target.names if name in stats.columns), None)
        if moment is None or target.kinds[0].name == "embedding":
            continue
        squares = (moment if moment.ndim == 1 else moment.diagonal()).to(target.matrix.device).double()
        power = target.matrix.double().square() @ squares
        if (median := float(power.median())) > 0:
            found[target.name] = float(power.max()) / median
    return found


def _raise(found: Sequence[Candidate], layer: LayerPlan, factor: float) -> tuple[Candidate, ...]:
    """Scale the predicted losses of the planned candidate, and of smaller candidates of the same family."""
    assert layer.topology is not None
    family = layer.topology.family
    return tuple(
        x.scaled(factor)
        if x.topology is not None and x.topology.family == family and x.num_bytes <= layer.bytes_after
        else x
        for x in found
    )


#: Exceptions that a model raises if it cannot be copied.
_CANNOT_COPY = (TypeError, ValueError, RuntimeError, AttributeError, NotImplementedError)


class _Trial:
    """Dense model and its losses on a few rows, for comparison with partly compressed copies.

    The outputs of all blocks of the dense model are stored, and blocks before the first compressed layer are
    skipped. So measuring a layer of the last block takes little more time than running this block and the
    head.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[BatchLike],
        loss_fn: TokenLosses | None,
        prices: PriceList,
        stats: CalibrationStats,
        cache: LayerCache,
    ) -> None:
        copied = light_copy(model)  # fails early: a model that cannot be copied is not checked
        self.model, self.stats, self.cache = model, stats, cache
        self.modules = {layer.name: layer.names for layer in prices.layers}
        self.loss_fn = loss_fn or losses_against(model, remember=True)
        self.batches: list[Batch] = some_rows(batches, model, CHECK_TOKENS)
        with in_eval_mode(model):
            self.loss_fn(model, self.batches[0])  # the first call chooses the loss of the model
            chains = find_chains(model, self.batches[0])
        self.blocks = max(chains.values(), key=len, default=())
        self.outputs: list[list[Any]] = [[None] * len(self.blocks) for _ in self.batches]
        self.dense = self._losses(model, record=True)
        try:  # skipping all blocks but the last must not change the losses
            found = self._losses(copied, first=len(self.blocks) - 1)
            skips = bool(self.blocks) and torch.allclose(found, self.dense, rtol=1e-4, atol=1e-5)
        except _CANNOT_SKIP:
            skips = False
        if not skips:
            self.blocks = ()

    def factors(self, plan: CompressionPlan, groups: Sequence[Group], *, progress: bool) -> dict[str, float]:
        """Map the name of each layer whose predicted loss is far too low to the factor that corrects it.

        The layers of a group are measured together.
        """
        self.plan, self.left, self.common = plan, _SPLITS, 1.0
        self.total = sum(layer.loss_increase or 0.0 for layer in plan)
        work = tqdm(groups, desc="checking the loss", disable=not progress, unit="group")
        increases = [self._increase(group) for group in work]
        if len(groups) >= _COMMON:  # a factor that is common to all layers would not change the plan
            ratios = sorted(x.mean / _predicted(group) for x, group in zip(increases, groups, strict=True))
            middle = ratios[(len(ratios) - 1) // 2]
            self.common = max(1.0, middle) if math.isfinite(middle) else 1.0
        found: dict[str, float] = {}
        for group, increase in zip(groups, increases, strict=True):
            if self._too_high(group, increase):
                found |= self._split(group, increase)
        return found

    def _split(self, group: Group, increase: LossIncrease) -> dict[str, float]:
        """Find the layers that make the loss of a group too high, and map their names to correction factors.

        The two halves of the group are measured. If neither has too high a loss, all layers of the group are
        returned. `increase` is the measured loss increase of the group.
        """
        found: dict[str, float] = {}
        if len(group) > 1 and self.left > 1:
            self.left -= 2
            middle = len(group) // 2
            halves = group[:middle], group[middle:]
            for half, measured in zip(halves, [self._increase(half) for half in halves], strict=True):
                if self._too_high(half, measured):
                    found |= self._split(half, measured)
        factor = min(_MOST, increase.mean / (_predicted(group) * self.common))
        return found or dict.fromkeys((layer.name for layer in group), factor)

    def _allowed(self, group: Group) -> float:
        """Compute the measured loss increase above which the predictions of a group are raised."""
        predicted = self.common * _predicted(group)
        return max(_TOO_LOW * predicted, predicted + self.common * _SHARE * self.total)

    def _too_high(self, group: Group, increase: LossIncrease) -> bool:
        return increase.mean - 2 * increase.stderr > self._allowed(group)

    @torch.no_grad()
    def _increase(self, group: Group) -> LossIncrease:
        """Measure the loss increase caused by compressing a group; infinite if a loss is not finite."""
        compressed = light_copy(self.model)
        part = replace(self.plan, layers=group, loss_check=None)
        apply_plan(compressed, part, self.stats, cache=self.cache)
        first = min(
            next((k for k, block in enumerate(self.blocks) if f"{name}.".startswith(f"{block}.")), 0)
            for layer in group
            for name in self.modules[layer.name]
        )
        found = self._losses(compressed, first)
        increase = LossIncrease.of(found - self.dense)
        # If the result is not clear, remove first-order effects by a second run with opposite errors.
        if increase.mean + 2 * increase.stderr > self._allowed(group):
            with unfused(self.model), opposite_errors(self.model, compressed):
                mirrored = self._losses(compressed, first)
            increase = LossIncrease.of((found + mirrored) / 2 - self.dense)
        known = math.isfinite(increase.mean) and math.isfinite(increase.stderr)
        return increase if known else replace(increase, mean=math.inf, stderr=0.0)

    def _losses(self, model: nn.Module, first: int = 0, *, record: bool = False) -> Tensor:
        """Compute the losses of all tokens of the batches, shape `(tokens,)`.

        Args:
            model: the dense model, or a copy with compressed layers.
            first: blocks before this one are skipped.
            record: whether to store the outputs of all blocks.
        """
        found = []
        with in_eval_mode(model):
            for batch, outputs in zip(self.batches, self.outputs, strict=True):

                def step(
                    index: int, forward: Callable[..., Any], *args: Any, _: list[Any] = outputs, **kwargs: Any
                ) -> Any:
                    if index < first:
                        return _copied(_[index])
                    output = forward(*args, **kwargs)
                    if record:
                        _[index] = _copied(output)
                    return output

                with replaced_blocks(model, self.blocks if first or record else (), step):
                    found.append(self.loss_fn(model, batch).double().flatten().cpu())
        return torch.cat(found)


def _predicted(group: Iterable[LayerPlan]) -> float:
    return sum(layer.loss_increase or 0.0 for layer in group)


def _copied(output: Any) -> Any:
    """Copy the hidden state in the output of a block, since other modules may change it in place."""
    hidden = hidden_of(output).clone()
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden
