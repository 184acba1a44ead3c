"""Planning with calibrated prices: forms of each layer, and one budget spent over all of them."""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from tensornet.calibration.stats import CalibrationStats
from tensornet.compression.allocate import CostCurve, decide_alone, spend_cost, spend_size, total_cost
from tensornet.compression.candidates import (
    LayerForms,
    Prices,
    dense_form,
    joined,
    keep_promise,
    low_rank_forms,
    network_forms,
)
from tensornet.compression.config import AUTO, CompressionConfig, family_options
from tensornet.compression.forecast import UNMEASURED, Forecast
from tensornet.compression.latency import Clock
from tensornet.compression.weighted import FORECAST_DAMPING, input_weighting, weighting_of
from tensornet.errors import BudgetError, ShapeError, TargetError
from tensornet.linalg.weighted_svd import Weighting, check_weighting
from tensornet.nn.encoding import CHAINS, Storage
from tensornet.nn.targets import Target


def storage_of(config: CompressionConfig, objective: str) -> Storage:
    """How cores are kept: pivoted with calibration data unless the configuration says otherwise."""
    pivoted = objective != "weight" if config.pivoted is None else config.pivoted
    return Storage(pivoted=pivoted, int8=config.int8)


def layer_weighting(
    target: Target, objective: str, stats: CalibrationStats | None, damping: float
) -> Weighting | None:
    """Prices of errors in one layer; None where errors cost nothing because no gradient arrives.

    Raises:
        TargetError: nothing is known of the layer, or the statistics are of another model.
    """
    if objective == "weight" or stats is None:
        return Weighting()
    found = (
        weighting_of(target, stats, damping) if objective == "curvature" else input_weighting(target, stats)
    )
    try:
        check_weighting(target.matrix, found or Weighting())
    except ShapeError as error:
        raise TargetError(
            f"The statistics do not belong to this model: layer {target.name!r} has another shape there. "
            f"{error} Calibrate this model."
        ) from error
    return found


def layer_prices(
    target: Target, objective: str, stats: CalibrationStats | None, damping: float
) -> Prices | None:
    """`layer_weighting` with little damping for the choice, and with more for the forecast."""
    choice = layer_weighting(target, objective, stats, damping)
    if choice is None:
        return None
    if objective != "curvature":
        return Prices(choice, choice)
    forecast = layer_weighting(target, objective, stats, max(damping, FORECAST_DAMPING))
    assert forecast is not None
    return Prices(choice, forecast)


def layer_forms(
    target: Target,
    config: CompressionConfig,
    objective: str,
    stats: CalibrationStats | None,
    clock: Clock | None = None,
) -> LayerForms:
    """All forms of one layer that the caps on single layers allow; `clock` predicts their times.

    Raises:
        BudgetError: none is left.
    """
    families = ("low_rank",) if config.topology == AUTO else config.families
    prices = layer_prices(target, objective, stats, config.damping)
    if prices is None:
        return dense_form(target.matrix, clock)
    storage = storage_of(config, objective)
    forms = joined(
        [_family_forms(target.matrix, prices, family, config, storage, clock) for family in families]
    )
    if config.rel_error is not None:
        forms = keep_promise(forms, target.matrix, prices.choice, config.rel_error)
    if len(forms.params) == 0:
        raise BudgetError(
            f"Layer {target.name!r}: no rank up to max_bond={config.max_bond} has a relative error of at "
            f"most rel_error={config.rel_error}."
        )
    return forms


def _family_forms(
    matrix: Tensor,
    prices: Prices,
    family: str,
    config: CompressionConfig,
    storage: Storage,
    clock: Clock | None,
) -> LayerForms:
    if family not in CHAINS:  # only chains have a gauge that storage knows how to fix
        storage = replace(storage, pivoted=False)
    if family == "low_rank":
        return low_rank_forms(
            matrix, prices, storage, max_rank=config.max_bond, rel_error=config.rel_error, clock=clock
        )
    return network_forms(
        matrix,
        prices,
        storage,
        family,
        max_bond=config.max_bond,
        rel_error=config.rel_error,
        clock=clock,
        search_dims=config.dims == "auto",
        **family_options(family, config),
    )


def choose_forms(
    targets: Sequence[Target],
    forms: Sequence[LayerForms],
    config: CompressionConfig,
    objective: str,
    forecast: Forecast = UNMEASURED,
) -> tuple[list[int], str]:
    """Index of the form of each layer, and the cap that decided.

    With several caps on the whole, the one that leaves least wins. `forecast` says which price
    `config.loss_increase` stands for.

    Raises:
        BudgetError: the caps cannot be kept.
    """
    if objective != "curvature" or (config.param_ratio is None and not config.needs_curvature):
        return _alone(targets, forms, config), _cap(config)
    curves = [form.curve("params") for form in forms]
    choices = []
    if config.param_ratio is not None:
        allowed = config.param_ratio * sum(target.matrix.numel() for target in targets)
        choices.append((_spend(curves, allowed, "param_ratio", config), "param_ratio"))
    for unit, name in (("num_bytes", "max_bytes"), ("milliseconds", "max_milliseconds")):
        if (allowed := getattr(config, name)) is not None:
            choices.append((_spend([form.curve(unit) for form in forms], allowed, name, config), name))
    if config.loss_increase is not None:
        allowed = forecast.price(config.loss_increase)
        chosen = spend_cost(curves, allowed, [form.forecasts for form in forms])
        if not choices:
            return chosen, "loss_increase"
        cheapest = max(choices, key=lambda choice: total_cost(curves, choice[0]))
        price = sum(float(f.forecasts[k]) for f, k in zip(forms, cheapest[0], strict=True))
        predicted = forecast.rise(price)
        if predicted > config.loss_increase:
            raise BudgetError(
                f"{cheapest[1]} and loss_increase={config.loss_increase} contradict each other: the best "
                f"plan of that size raises the loss by {predicted:.4g}. Drop one of them or raise it."
            )
        return cheapest
    return max(choices, key=lambda choice: total_cost(curves, choice[0]))


def _spend(curves: Sequence[CostCurve], allowed: float, name: str, config: CompressionConfig) -> list[int]:
    """`spend_size`, whose errors name the budget."""
    try:
        return spend_size(curves, allowed)
    except BudgetError as error:
        raise BudgetError(f"{name}={getattr(config, name)}: {error}") from error


def _alone(targets: Sequence[Target], forms: Sequence[LayerForms], config: CompressionConfig) -> list[int]:
    """The best form of each layer under the caps on single layers."""
    if config.param_ratio is not None:
        sizes = [target.matrix.numel() for target in targets]

        def decide(index: int, ratio: float) -> int:
            try:
                return spend_size([forms[index].curve("params")], ratio * sizes[index])[0]
            except BudgetError as error:
                raise BudgetError(f"Layer {targets[index].name!r}: {error}") from error

        def stay(index: int) -> tuple[int, float]:
            """The dense form, which is the last one; the smallest where a cap on ranks excludes it."""
            params = forms[index].params
            last = len(params) - 1
            place = last if forms[index].make(last)[0] is None else int(params.argmin())
            return place, float(params[place])

        return decide_alone(sizes, config.param_ratio, decide, stay)
    if config.rel_error is not None:
        return [int(form.params.argmin()) for form in forms]
    return [int(form.costs.argmin()) for form in forms]


def _cap(config: CompressionConfig) -> str:
    names = ("param_ratio", "rel_error", "max_bond")
    return next((name for name in names if getattr(config, name) is not None), "exact")
