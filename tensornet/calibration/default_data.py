"""Calibration data for callers who bring none.

The core has no text. A plugin that has some registers a provider; it is asked when `compress` could use
calibration data and was given none.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn

from tensornet.calibration.batches import BatchLike
from tensornet.calibration.stats import CalibrationStats

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


def provided_data(model: nn.Module) -> ProvidedData | None:
    """Return data of the first registered provider that has some for this model, or None."""
    return next((data for ask in _PROVIDERS if (data := ask(model)) is not None), None)
