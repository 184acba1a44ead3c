"""Loss of a model before and after its compression, measured on a few rows of the data.

The predicted loss increase takes the second moments of gradients for the curvature. Where a model fits its
calibration data these vanish, and with them every prediction, whatever an error costs. One pass over a few
rows tells.
"""

import math
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tensornet._util import in_eval_mode, uncompiled, warn, without_cache
from tensornet.calibration.batches import Batch, BatchLike, BatchSample, some_rows
from tensornet.calibration.losses import TokenLosses, losses_against
from tensornet.compression.forecast import Rise
from tensornet.errors import CalibrationWarning

#: Tokens, or rows of plain models, that losses are measured on, at most; and batches they are taken from.
TOKENS, BATCHES = 2048, 8
#: A rise is far above its prediction if it is above this many times it, and above this value, by so many
#: standard errors; of fewer losses no standard error is known.
_TIMES, _FLOOR, _ERRORS, _LEAST = 3.0, 0.02, 3.0, 8
#: Errors of models that do not run on a part of a batch, or have no loss: then nothing is measured.
_NOT_MEASURED = (RuntimeError, TypeError, ValueError, AttributeError, LookupError)


@dataclass(frozen=True)
class MeasuredRise:
    """Measured rise of the loss by a compression.

    Args:
        value: mean over the losses.
        standard_error: of that mean.
        dense_loss: mean loss of the dense model; 0 where losses are distances from its outputs.
        losses: how many there are: of tokens, or of rows.
        source: what they were measured on.

    Example:
        >>> from tensornet.compression.measured_loss import MeasuredRise
        >>> print(MeasuredRise(0.0312, 0.002, 1.5, 2048, "calibration data"))
        0.0312 (standard error 0.002, 2,048 losses on calibration data)
    """

    value: float
    standard_error: float
    dense_loss: float
    losses: int
    source: str

    def __str__(self) -> str:
        noise = f"standard error {self.standard_error:.2g}, {self.losses:,} losses on {self.source}"
        return f"{self.value:.4f} ({noise})"

    @property
    def least(self) -> float:
        """The rise less some standard errors; infinite for a model that broke down."""
        least = self.value - _ERRORS * self.standard_error
        return least if math.isfinite(least) else math.inf

    def exceeds(self, predicted: float) -> bool:
        """Return True if the rise is far above a prediction."""
        return self.least > max(_TIMES * predicted, _FLOOR)

    def to_dict(self) -> dict[str, Any]:
        """Convert to a JSON-ready form."""
        return asdict(self)


class DenseLosses:
    """Losses of a few rows under a dense model, to compare the model with once it is compressed in place.

    Args:
        batches: keyword arguments of the model.
        loss_fn: losses of a batch; keeps what it needs of the dense model.
        dense: losses of all batches, shape `(losses,)`.
        source: what the data is, for reports.
    """

    def __init__(self, batches: list[Batch], loss_fn: TokenLosses, dense: Tensor, source: str) -> None:
        self.batches, self.loss_fn, self.dense, self.source = batches, loss_fn, dense, source

    @classmethod
    def measure(
        cls, model: nn.Module, batches: Iterable[BatchLike], source: str = "calibration data"
    ) -> "DenseLosses | None":
        """Run the dense model on a few rows: at most 2,048 tokens of 8 batches.

        Returns:
            None without batches, and where the model has no loss or does not run on a part of a batch.

        Example:
            >>> from tensornet.compression.measured_loss import DenseLosses
            >>> model = torch.nn.Linear(4, 3)
            >>> before = DenseLosses.measure(model, [(torch.randn(16, 4), torch.arange(16) % 3)])
            >>> with torch.no_grad():
            ...     _ = model.weight.mul_(10)
            >>> before.rise(model).losses
            16
        """
        sample = BatchSample(batches)
        for _ in sample:  # a loader is walked through; a few of its batches stay
            pass
        if not sample.kept:
            return None
        loss_fn = losses_against(model, remember=True)
        try:
            parts = some_rows(sample.kept, model, TOKENS, parts=BATCHES)
            dense = _losses(model, parts, loss_fn)
        except _NOT_MEASURED:
            return None
        return cls(parts, loss_fn, dense, source) if len(dense) else None

    def rise(self, model: nn.Module) -> MeasuredRise:
        """Run the compressed model on the same rows."""
        rise = Rise.of(_losses(model, self.batches, self.loss_fn) - self.dense)
        size = len(self.dense)
        return MeasuredRise(rise.value, rise.standard_error, float(self.dense.mean()), size, self.source)


@torch.no_grad()
def _losses(model: nn.Module, batches: Iterable[Batch], loss_fn: TokenLosses) -> Tensor:
    with in_eval_mode(model), uncompiled(), without_cache(model), warnings.catch_warnings():
        # Calibration has said what there is to say of these batches; parts of them have odd sizes.
        warnings.simplefilter("ignore", CalibrationWarning)
        return torch.cat([loss_fn(model, batch).double().flatten().cpu() for batch in batches])


def warn_of_loss(measured: MeasuredRise, predicted: float | None, allowed: float | None) -> None:
    """Warn of a rise that is far above its prediction, or certainly above the one that was allowed.

    Args:
        measured: on the compressed model.
        predicted: by its plan; None if nothing was.
        allowed: the budget `loss_increase`; None if there is none.
    """
    few = measured.losses < _LEAST and math.isfinite(measured.value)
    far = predicted is not None and measured.exceeds(predicted)
    over = allowed is not None and measured.least > allowed
    if few or not (far or over):
        return
    larger = "allow more bytes" if allowed is None else "set a budget of bytes (bits_per_weight=)"
    said = f"predicted {predicted:.2g}" if predicted is not None else "no prediction"
    budget = "" if allowed is None else f", loss_increase={allowed:g} allowed"
    text = (
        f"Compression raised the loss by {measured.value:.3g} on {measured.source} "
        f"(before {measured.dense_loss:.2g}, {said}{budget})"
    )
    if far and measured.dense_loss and measured.source == "calibration data":
        text += (
            ": the model was probably trained on these data and fits them, so that their gradients do not "
            "show what an error costs. Calibrate with other data, pass validation= batches of other data, or "
            f"{larger}."
        )
    else:
        text += (
            ": predictions are too low for errors this large. Pass validation=, which corrects them by "
            f"measuring, or {larger}."
        )
    warn(text, CalibrationWarning)
