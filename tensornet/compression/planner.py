"""Planner: choose a topology and an encoding for every layer from a configuration."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from tensornet._util import on_cpu_unless_said, progress_bar, warn
from tensornet.calibration.batches import BatchLike
from tensornet.calibration.losses import TokenLosses, losses_against
from tensornet.calibration.stats import CalibrationStats
from tensornet.compression.apply import apply_plan, check_stats
from tensornet.compression.candidates import LayerCandidates, storage_of
from tensornet.compression.choose import NO_REST, Allocation, ModelRest, choose_candidates
from tensornet.compression.config import WHOLE_MODEL_BUDGETS, CompressionConfig, check_config
from tensornet.compression.forecast import UNMEASURED, Forecast, all_losses, light_copy, measured_rise
from tensornet.compression.latency import Clock
from tensornet.compression.layer_candidates import all_candidates
from tensornet.compression.layer_plan import Baseline, LayerPlan, with_baseline
from tensornet.compression.objective_choice import resolve_objective
from tensornet.compression.plan import CompressionPlan
from tensornet.compression.plan_by_weight import plan_layers
from tensornet.compression.report import model_size
from tensornet.compression.rounded_layers import RoundedLayers
from tensornet.compression.sensitivity import is_known, never_ran
from tensornet.compression.verification import Checks
from tensornet.compression.verify import verify_prices
from tensornet.contraction.cost import default_machine
from tensornet.errors import BudgetError, CalibrationWarning
from tensornet.linalg.svd import check_finite, singular_values
from tensornet.nn.targets import Target, check_holder, check_loaded, find_targets, summary
from tensornet.nn.unfuse import unfused
from tensornet.quantization import NumberFormat
from tensornet.topologies import Decomposition

#: Budgets that are spent after preparation.
BUDGETS = ("param_ratio", *WHOLE_MODEL_BUDGETS)
#: Bits of a weight at which `PreparedPlan.measured` measures the loss where number formats are planned; those
#: below what the formats allow are left out.
MEASURED_BITS = (8.25, 6.25, 4.25, 3.25, 2.25)
#: Shares of the parameters at which `PreparedPlan.measured` measures the loss.
MEASURED_SHARES = (0.9, 0.75, 0.6)


@dataclass(frozen=True)
class PreparedPlan:
    """Candidates of every layer with predicted losses: slow to compute, and valid for all budgets.

    Made by `prepare`. It holds references to the weights, but no copies.

    Args:
        config: what it was made with.
        objective: what an error was taken to cost.
        targets: the weights, in model order.
        candidates: of each; empty where layers are planned one by one by the error of their weights.
        spectra: singular values of each, likewise.
        dense_loss: mean loss of a token during calibration, None where tokens have none.
        calibration: what the statistics were collected on.
        forecast: corrects predicted rises, see `measured`.
        rest: the part of the model that is not targeted, for budgets that count all of it.
        unseen: layers that were to be targets, but never ran in calibration.
        of_tokens: whether `dense_loss` is the cross entropy of tokens.
        checks: predicted losses that were verified, see `verified`.
        weights: every weight of the model, with the reason to skip it.
        rounded: layers that were rounded to verify them, for `apply_plan`.

    Example:
        >>> from tensornet.compression import prepare
        >>> model = torch.nn.Sequential(torch.nn.Linear(32, 64))
        >>> prepared = prepare(model, tn.CompressionConfig(max_bond=8, topology="low_rank"))
        >>> prepared.objective, len(prepared.targets)
        ('weight', 1)
    """

    config: CompressionConfig
    objective: str
    targets: tuple[Target, ...]
    candidates: tuple[LayerCandidates, ...]
    spectra: tuple[tuple[float, ...], ...]
    dense_loss: float | None
    calibration: str | None
    forecast: Forecast = UNMEASURED
    rest: ModelRest = NO_REST
    unseen: tuple[str, ...] = ()
    of_tokens: bool = False
    checks: Checks | None = None
    weights: tuple[Target, ...] = field(default=(), compare=False, repr=False)
    rounded: RoundedLayers = field(default_factory=RoundedLayers, compare=False, repr=False)

    def verified(
        self,
        model: nn.Module,
        stats: CalibrationStats,
        batches: Sequence[BatchLike],
        *,
        loss_fn: TokenLosses | None = None,
        progress: bool = False,
        **budget: Any,
    ) -> "PreparedPlan":
        """Verify the predicted losses of the plan for a budget by measuring, and raise those far too low.

        Layers with large errors (two bits, small ranks, an output far stronger than the others) are rounded
        and measured together with the others of their block; blocks that cost more than twice their
        prediction are split to find the layers that do. The losses of these layers and of smaller candidates
        of their family are multiplied by what was measured, and the plan is made again. The model is left as
        it was. Plans without number formats or predicted losses are not verified.

        Args:
            model: what the preparation was made for.
            stats: likewise.
            batches: as for `calibrate`; about a thousand tokens of them are used.
            loss_fn: see `measured`.
            progress: show a progress bar.
            budget: as for `plan`.

        Raises:
            BudgetError: as `plan`.

        Example:
            >>> from tensornet.compression import prepare
            >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
            >>> batches = [(torch.randn(64, 64), torch.randint(8, (64,)))]
            >>> stats = tn.calibrate(model, batches)
            >>> prepared = prepare(model, tn.CompressionConfig(bits_per_weight=2.5), stats)
            >>> prepared.verified(model, stats, batches).plan().verification.layers > 0
            True
        """
        if self.objective != "curvature" or not self.config.plans_formats or not len(batches):
            return self
        start = replace(self, checks=self.checks or Checks())
        return verify_prices(start, model, stats, batches, loss_fn=loss_fn, progress=progress, **budget)

    def measured(
        self,
        model: nn.Module,
        stats: CalibrationStats,
        validation: Collection[BatchLike],
        *,
        loss_fn: TokenLosses | None = None,
        shares: Sequence[float] | None = None,
        sizes: Sequence[int] | None = None,
        source: str = "validation text",
        progress: bool = False,
    ) -> "PreparedPlan":
        """Correct the forecast by loss increases measured at a few sizes, and return the new preparation.

        A copy of the model that shares its weights is compressed to each size and run on the text; nothing
        is trained, and the model is left as it was. Takes one compression for each size, and three forward
        passes over the text. Rises below twice their standard error are left out.

        Args:
            model: what the preparation was made for.
            stats: likewise.
            validation: batches as for `calibrate`, walked through several times: some ten thousand tokens,
                of another source than the calibration text if the forecast is to hold for other text.
            loss_fn: see `tensornet.calibration.losses`; not one that draws labels. `losses_against(model)` if
                absent: of labels, or one minus the cosine for encoders.
            shares: of the parameters of the targeted layers, to measure at; what lies between is
                interpolated. `MEASURED_SHARES` if absent, or `MEASURED_BITS` where formats are planned.
            sizes: bytes of the targeted layers to measure at, in place of shares.
            source: what the text is, for reports.
            progress: show a progress bar.

        Raises:
            BudgetError: another objective, which predicts no losses, or no measured loss is higher than the
                dense one.
        """
        if self.objective != "curvature":
            raise BudgetError(
                f"Only objective='curvature' predicts losses, which measurements can correct, not "
                f"{self.objective!r}."
            )
        loss_fn = loss_fn or losses_against(model)
        dense = all_losses(model, validation, loss_fn)
        found = []
        budgets = self._measured_budgets(shares, sizes)
        layers_alone = replace(self, forecast=UNMEASURED, config=replace(self.config, whole_model=False))
        for budget in progress_bar(budgets, desc="measuring the forecast", disable=not progress, unit="size"):
            made = layers_alone.plan(**budget)
            copied = light_copy(model)
            apply_plan(copied, made, stats)
            assert made.predicted_loss_increase is not None
            rise = measured_rise(model, copied, validation, loss_fn, dense)
            if rise.significant:
                found.append((made.predicted_loss_increase, rise.value))
        return replace(self, forecast=Forecast.through(found, source))

    def _measured_budgets(
        self, shares: Sequence[float] | None, sizes: Sequence[int] | None
    ) -> list[dict[str, float]]:
        """Choose the budgets at which the loss is measured.

        Raises:
            BudgetError: shares and sizes are both given.
        """
        if shares is not None and sizes is not None:
            raise BudgetError(
                "Losses are measured at shares= of the parameters or at sizes= in bytes, not both."
            )
        if sizes is not None:
            return [{"max_bytes": size} for size in sizes]
        if shares is not None or not self.config.plans_formats:
            return [{"param_ratio": share} for share in shares or MEASURED_SHARES]
        least = 8 * sum(float(found.num_bytes.min()) for found in self.candidates)
        smallest = least / sum(target.matrix.numel() for target in self.targets)
        return [{"bits_per_weight": bits} for bits in MEASURED_BITS if bits >= smallest] or [
            {"bits_per_weight": smallest * (1 + 1e-9)}
        ]

    @torch.no_grad()
    @on_cpu_unless_said
    def plan_decomposed(self, *, progress: bool = False) -> tuple[CompressionPlan, dict[str, Decomposition]]:
        """Plan for the budget of the configuration, and decompose by what planning has computed already.

        Returns:
            The plan, and decompositions for `apply_plan` by layer name: of the layers that are planned one by
            one by the error of their weights. They take the memory of the compressed layers.
        """
        if self.candidates:
            return self.plan(progress=progress), {}
        planned = plan_layers(self.targets, self.config, decompose=True, progress=progress)
        found = {each.layer.name: each.decomposition for each in planned if each.decomposition is not None}
        return self._as_plan([each.layer for each in planned], self.config), found

    @torch.no_grad()
    @on_cpu_unless_said
    def plan(self, *, progress: bool = False, **budget: Any) -> CompressionPlan:
        """Compute the plan of least predicted loss for one budget.

        Args:
            progress: show a progress bar where layers are decomposed one by one.
            budget: any of `param_ratio`, `bits_per_weight`, `byte_ratio`, `max_bytes`, `loss_increase` and
                `max_milliseconds` (for the token count of the configuration), in place of the
                configuration's.

        Raises:
            BudgetError: the budget cannot be met, or a cap was named that candidates depend on.
        """
        if unknown := sorted(budget.keys() - set(BUDGETS)):
            raise BudgetError(
                f"A prepared plan takes the budgets {', '.join(BUDGETS)}, got {', '.join(unknown)}; prepare "
                "again for other options."
            )
        caps: dict[str, Any] = {**dict.fromkeys(BUDGETS), **budget}
        config = replace(self.config, **caps) if budget else self.config
        if not self.candidates:
            alone = plan_layers(self.targets, config, progress=progress)
            return self._as_plan([each.layer for each in alone], config)
        if config.needs_curvature and self.objective != "curvature" and not config.one_format_keeps:
            raise BudgetError(f"{', '.join(budget)} needs objective='curvature', not {self.objective!r}.")
        given = Allocation(self.targets, self.candidates, config, self.objective, self.forecast, self.rest)
        return replace(self, config=config).planned(*choose_candidates(given))

    def planned(self, chosen: Sequence[int], bound_by: str) -> CompressionPlan:
        """Turn the index of a candidate of each layer into a plan.

        Args:
            chosen: indices.
            bound_by: the cap that decided.
        """
        layers = []
        work = zip(self.targets, self.candidates, chosen, self.spectra, strict=True)
        for target, found, index, spectrum in work:
            topology, storage = found.make(index)
            made = LayerPlan(
                name=target.name,
                shape=(target.matrix.shape[0], target.matrix.shape[1]),
                topology=topology,
                bound_by="dense" if topology is None else bound_by,
                error=float(found.errors[index]),
                baseline_error=0.0,
                singular_values=spectrum,
                storage=storage,
                loss_increase=float(found.forecasts[index]) if self.objective == "curvature" else None,
                curve=found.hull("params") if self.objective == "curvature" else (),
                milliseconds=float(found.milliseconds[index]) if self.config.tokens is not None else None,
                dtype=target.matrix.dtype,
                byte_curve=found.hull("num_bytes") if self.objective == "curvature" else (),
            )
            layers.append(with_baseline(made))
        joined = self._as_plan(layers, self.config)
        return replace(joined, baseline=self._baseline(sum(layer.bytes_after for layer in layers)))

    def _as_plan(self, layers: Sequence[LayerPlan], config: CompressionConfig) -> CompressionPlan:
        """Join the plans of layers and the figures of the calibration into one plan."""
        calibrated = self.objective != "weight"
        return CompressionPlan(
            tuple(layers),
            objective=self.objective,
            damping=config.damping if calibrated else 0.0,
            rounding=config.rounding,
            dense_loss=self.dense_loss,
            calibration=self.calibration,
            tokens=config.tokens,
            forecast=self.forecast,
            topology_options=config.topology_options,
            of_tokens=self.of_tokens,
            unseen=self.unseen,
            verification=None if self.checks is None else self.checks.of(layers),
        )

    def _baseline(self, num_bytes: int) -> Baseline | None:
        """Return round to nearest in the largest format of about these bytes, or else in the smallest."""
        known = [found.nearest for found in self.candidates]
        names = [name for name in known[0] if all(name in losses for losses in known)]
        if not names or self.objective != "curvature":
            return None
        made = []
        for name in names:
            number_format = NumberFormat.parse(name)
            size = sum(number_format.nbytes(target.matrix.shape) for target in self.targets)
            made.append(Baseline(name, size, sum(losses[name] for losses in known)))
        fitting = [each for each in made if each.num_bytes <= 1.01 * num_bytes]
        if not fitting:
            return min(made, key=lambda each: each.num_bytes)
        return max(fitting, key=lambda each: each.num_bytes)


def plan(
    model: nn.Module,
    config: CompressionConfig,
    stats: CalibrationStats | None = None,
    *,
    progress: bool = False,
) -> CompressionPlan:
    """Choose a candidate for every targeted layer; the model is not changed.

    Args:
        model: any module; targets are found by `find_targets`.
        config: what to compress and how far.
        stats: from `calibrate`; what the objective may use.
        progress: show a progress bar.

    Raises:
        TargetError: nothing matches, or the objective needs statistics that are not there.
        NonFiniteError: a weight holds NaN or infinity; the message names the layer.
        BudgetError: a layer cannot meet the budget; the message names it.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
        >>> stats = tn.calibrate(model, [(torch.randn(64, 32), torch.randint(10, (64,)))])
        >>> plan = tn.plan(model, tn.CompressionConfig(param_ratio=0.5), stats)
        >>> plan.params_after <= 0.5 * plan.params_before
        True
    """
    return prepare(model, config, stats, progress=progress).plan(progress=progress)


@torch.no_grad()
@on_cpu_unless_said
def prepare(
    model: nn.Module,
    config: CompressionConfig,
    stats: CalibrationStats | None = None,
    *,
    progress: bool = False,
) -> PreparedPlan:
    """Build the candidates of every targeted layer, once for all budgets; arguments and errors of `plan`.

    Example:
        >>> from tensornet.compression import prepare
        >>> model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
        >>> stats = tn.calibrate(model, [(torch.randn(64, 32), torch.randint(10, (64,)))])
        >>> prepared = prepare(model, tn.CompressionConfig(param_ratio=0.5), stats)
        >>> plans = [prepared.plan(param_ratio=ratio) for ratio in (0.7, 0.4)]
        >>> plans[0].predicted_loss_increase < plans[1].predicted_loss_increase
        True
    """
    check_holder(model)
    check_config(config)
    config.check_says_how_far()
    check_stats(stats)
    objective = resolve_objective(config, stats)
    with unfused(model):
        weights = tuple(find_targets(model, config, () if stats is None else stats.readers))
    targets = tuple(x for x in weights if not x.skip)
    check_loaded(targets)
    if stats is not None:
        stats.check_weights(targets)
    targets, unseen = _seen(targets, config, objective, stats)
    for target in targets:
        check_finite(target.matrix, f"Layer {target.name!r}")
    params, size = model_size(model)
    rest = ModelRest(
        params - sum(target.matrix.numel() for target in targets),
        size - sum(target.matrix.numel() * target.matrix.element_size() for target in targets),
    )
    candidates, spectra = [], []
    clock = _clock(config, targets[0].weight)
    alone = objective == "weight" and not config.plans_formats and storage_of(config, objective).plain
    if not alone and not config.fixed:
        found = all_candidates(targets, config, objective, stats, clock)
        work = progress_bar(targets, desc="planning", disable=not progress, unit="layer")
        for target, each in zip(work, found, strict=True):
            candidates.append(each)
            spectra.append(tuple(singular_values(target.matrix).tolist()))
    return PreparedPlan(
        config,
        objective,
        targets,
        tuple(candidates),
        tuple(spectra),
        stats.loss if stats is not None and stats.loss == stats.loss else None,  # NaN: no loss of tokens
        stats.source if stats is not None else None,
        rest=rest,
        unseen=unseen,
        of_tokens=stats is not None and stats.of_tokens,
        weights=weights,
    )


def _seen(
    targets: tuple[Target, ...], config: CompressionConfig, objective: str, stats: CalibrationStats | None
) -> tuple[tuple[Target, ...], tuple[str, ...]]:
    """Separate the weights that calibration knows from those that never ran, which a warning names.

    Raises:
        TargetError: it ran none of them, or not all and the configuration requires all.
    """
    if objective == "weight" or stats is None:
        return targets, ()
    unseen = [target for target in targets if not is_known(target, stats)]
    if unseen and (config.require_calibrated or len(unseen) == len(targets)):
        raise never_ran(unseen[0])
    names = tuple(target.name for target in unseen)
    if names:
        warn(
            f"Left dense, because they never ran during calibration: {summary(unseen)}. Calibrate with data "
            "that reaches them, compress them by their weights alone (objective='weight' with target_modules "
            "that name them), or set require_calibrated=True for an error in place of this warning.",
            CalibrationWarning,
        )
    return tuple(target for target in targets if target.name not in names), names


def _clock(config: CompressionConfig, weight: Tensor) -> Clock | None:
    if config.tokens is None:
        return None
    return Clock(config.tokens, default_machine(weight.device), weight.element_size())
