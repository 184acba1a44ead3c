"""Forecast of the loss increase, corrected by measurements at a few sizes.

The predicted loss increase of a plan, its price, is of second order, adds up layers as if they were
independent, and knows only the calibration text. All three make it wrong by a factor, which can be measured:
the model is compressed to a few sizes and run on text of another source. Other sizes are read off the curve
through these.
"""

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from tensornet._util import in_eval_mode
from tensornet.calibration.batches import BatchLike, as_batch
from tensornet.calibration.losses import TokenLosses
from tensornet.errors import BudgetError, TargetError
from tensornet.nn.module import NetworkModule


@dataclass(frozen=True)
class Forecast:
    """Map from the predicted loss increase of a plan to the measured scale, through measured points.

    A price is the prediction before correction, a rise the loss increase measured at it. Logarithms are
    interpolated linearly between points; beyond the first and the last the ratio of rise and price is
    constant. Without points a price is its own forecast.

    Args:
        points: `(price, rise)`, both above 0 and rising.
        source: what the rises were measured on.

    Raises:
        BudgetError: the points do not rise from above 0.
    """

    points: tuple[tuple[float, float], ...] = ()
    source: str | None = None

    def __post_init__(self) -> None:
        flat = [(0.0, 0.0), *self.points]
        if not all(a[0] < b[0] < math.inf and a[1] < b[1] < math.inf for a, b in pairwise(flat)):
            raise BudgetError(f"The points of a forecast must rise from above 0, got {self.points}.")

    @classmethod
    def through(cls, measured: Iterable[tuple[float, float]], source: str | None = None) -> "Forecast":
        """Fit a forecast through pairs `(price, rise)` of predicted and measured loss increase.

        A rise that is not above 0, or not above that of a smaller price, is noise and left out.

        Raises:
            BudgetError: no pair remains.
        """
        points: list[tuple[float, float]] = []
        for price, rise in sorted(measured):
            if rise > (points[-1][1] if points else 0.0) and price > (points[-1][0] if points else 0.0):
                points.append((price, rise))
        if not points:
            raise BudgetError(
                "No compressed model had a higher loss than the dense one, so a forecast cannot be measured; "
                "use more validation text, or smaller shares."
            )
        return cls(tuple(points), source)

    def rise(self, price: float) -> float:
        """Correct a predicted loss increase by the measurements."""
        return _along(self.points, price)

    def price(self, rise: float) -> float:
        """Compute the uncorrected prediction that gives this loss increase: the inverse of `rise`."""
        return _along([(b, a) for a, b in self.points], rise)

    def to_dict(self) -> dict[str, Any]:
        """Convert to a JSON-ready form."""
        return {"points": [list(point) for point in self.points], "source": self.source}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Forecast":
        """Restore a forecast from `to_dict`."""
        return cls(tuple((float(a), float(b)) for a, b in data["points"]), data["source"])


#: Prices are their own forecast.
UNMEASURED = Forecast()


def _along(points: Sequence[tuple[float, float]], x: float) -> float:
    """Interpolate through points linearly in logarithms, with a constant ratio beyond them."""
    if not points or x <= 0:
        return x
    below = [point for point in points if point[0] <= x]
    above = [point for point in points if point[0] > x]
    if not below or not above:
        near = below[-1] if below else above[0]
        return x * near[1] / near[0]
    (x0, y0), (x1, y1) = below[-1], above[0]
    return y0 * (y1 / y0) ** (math.log(x / x0) / math.log(x1 / x0))


def mean_loss(model: nn.Module, batches: Iterable[BatchLike], loss_fn: TokenLosses) -> float:
    """Compute the mean loss of the tokens of all batches, in eval mode.

    Raises:
        TargetError: no token is scored.
    """
    return float(all_losses(model, batches, loss_fn).mean())


@torch.no_grad()
def all_losses(model: nn.Module, batches: Iterable[BatchLike], loss_fn: TokenLosses) -> Tensor:
    """Collect the losses of the tokens of all batches, in eval mode, shape `(tokens,)`.

    Raises:
        TargetError: no token is scored.
    """
    device = next(model.parameters()).device
    found = []
    with in_eval_mode(model):
        for batch in batches:
            losses = loss_fn(model, as_batch(batch, model, device))
            found.append(losses.double().flatten().cpu())
    if not sum(losses.numel() for losses in found):
        raise TargetError(
            "No validation text is left: pass a list of batches or another collection that can be walked "
            "again, not an iterator."
        )
    return torch.cat(found)


@dataclass(frozen=True)
class Rise:
    """Measured rise of the loss of a token.

    Args:
        value: mean over tokens.
        standard_error: of that mean.
    """

    value: float
    standard_error: float

    @property
    def significant(self) -> bool:
        """True if the rise exceeds twice its standard error."""
        return self.value > 2 * self.standard_error

    @classmethod
    def of(cls, values: Tensor) -> "Rise":
        """Average the rises of single tokens, shape `(tokens,)`."""
        error = float(values.std()) / len(values) ** 0.5 if len(values) > 1 else 0.0
        return cls(float(values.mean()), error)


def measured_rise(
    model: nn.Module, compressed: nn.Module, batches: Iterable[BatchLike], loss_fn: TokenLosses, dense: Tensor
) -> Rise:
    """Measure by how much the loss of a compressed model is higher.

    To explain how this works: to first order a small error moves the losses of single tokens up and down, by
    far more than their mean. That part changes its sign with the error. So the model is also run with the
    opposite error, dense outputs twice less compressed ones, and half of the difference is subtracted unless
    it exceeds twice its own standard error.

    Args:
        model: the dense one.
        compressed: the same with some layers replaced.
        batches: text, walked through twice.
        loss_fn: losses of tokens.
        dense: losses of the dense model, from `all_losses`.
    """
    found = all_losses(compressed, batches, loss_fn)
    with opposite_errors(model, compressed):
        odd = (found - all_losses(compressed, batches, loss_fn)) / 2
    first_order = Rise.of(odd)
    if abs(first_order.value) <= 2 * first_order.standard_error:
        found = found - odd
    return Rise.of(found - dense)


@contextmanager
def opposite_errors(model: nn.Module, compressed: nn.Module) -> Iterator[None]:
    """Reflect the outputs of compressed layers in those of the dense ones, inside the block.

    Args:
        model: the dense one.
        compressed: the same with some layers replaced.
    """
    stock = dict(model.named_modules())
    handles = [
        module.register_forward_hook(_reflection(stock[name]), with_kwargs=True)
        for name, module in compressed.named_modules()
        if isinstance(module, NetworkModule) and name in stock
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _reflection(stock: nn.Module) -> Any:
    def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        return 2 * stock(*args, **kwargs) - output

    return hook


def light_copy(model: nn.Module) -> nn.Module:
    """Copy the modules of a model without their parameters and buffers, which are shared."""
    shared: dict[int, Any] = {id(x): x for x in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)
