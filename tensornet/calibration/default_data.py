"""Calibration data for callers who bring none.

The core has no text. A plugin that has some registers a provider; it is asked when `compress` could use
calibration data and was given none.
"""

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn

from tensornet.calibration.batches import BatchLike
from tensornet.calibration.calibrate import calibrate
from tensornet.calibration.stats import CalibrationStats
from tensornet.compression.config import CompressionConfig
from tensornet.errors import CalibrationWarning

Calibration = CalibrationStats | Iterable[BatchLike]


@dataclass(frozen=True)
class ProvidedData:
    """Batches for one model, and a few words that say what they are."""

    batches: Iterable[BatchLike]
    source: str


#: Returns data that fits the model, or None if it has none for it.
CalibrationProvider = Callable[[nn.Module], ProvidedData | None]

_PROVIDERS: list[CalibrationProvider] = []


def register_calibration_provider(provider: CalibrationProvider) -> CalibrationProvider:
    """Have `provider` asked for data when a model is compressed without any. Usable as a decorator."""
    _PROVIDERS.append(provider)
    return provider


def gather_statistics(
    model: nn.Module, config: CompressionConfig, calibration: Calibration | None, *, progress: bool
) -> CalibrationStats | None:
    """Statistics for a configuration, collected unless they are given; None where it needs none.

    Warns where it takes data of its own, and where the error of the weights must do.
    """
    if isinstance(calibration, CalibrationStats):
        return calibration
    if config.objective == "weight" or (config.budget.unlimited and not config.needs_curvature):
        return None
    source = "calibration data"
    if calibration is None:
        found = next((data for ask in _PROVIDERS if (data := ask(model)) is not None), None)
        if found is None:
            if config.objective == "auto" and not config.needs_curvature:
                warnings.warn(
                    f"No calibration data: {type(model).__name__} is compressed by the error of its weights "
                    "alone, which keeps far less of what it can do. Pass calibration=batches (about 30 of "
                    "1,000 tokens), or objective='weight' if this is meant.",
                    CalibrationWarning,
                    stacklevel=3,
                )
            return None
        calibration, source = found.batches, found.source
        warnings.warn(
            f"No calibration data: using {source}. Text like that of the intended use gives a better model; "
            "pass calibration=batches.",
            CalibrationWarning,
            stacklevel=3,
        )
    gradients = 0 if config.objective == "activation" else None
    return calibrate(
        model, calibration, config=config, gradient_batches=gradients, source=source, progress=progress
    )
