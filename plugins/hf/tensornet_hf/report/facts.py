"""Rows of the comparison: one model each, with its bytes, its parameters and its quality."""

from dataclasses import dataclass
from typing import Any

from tensornet_hf.text.quality import Quality


@dataclass(frozen=True)
class ModelFacts:
    """One row of the comparison.

    Args:
        name: how the page calls this model.
        params: stored numbers of the whole model, scales included.
        bytes: of its weight files, or counted where nothing was saved; None if unknown.
        bits: of a weight of the compressed layers, scales included; None if unknown.
        form: number format or ranks, in a few characters.
        quality: on held-out text, None if not measured.
        predicted_rise: of the loss, None if not predicted.
        sample: generated text, if any.
    """

    name: str
    params: int
    bytes: int | None = None
    bits: float | None = None
    form: str = ""
    quality: Quality | None = None
    predicted_rise: float | None = None
    sample: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON-ready form."""
        return {
            "name": self.name,
            "form": self.form,
            "bytes": self.bytes,
            "bits_per_weight": self.bits,
            "parameters": self.params,
            "quality": None if self.quality is None else self.quality.to_dict(),
            "predicted_loss_increase": self.predicted_rise,
            "sample": self.sample,
        }


def compact_bytes(value: float) -> str:
    """Format a size with three significant digits: `1234567` -> `1.23 MB`."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{f'{value / size:#.3g}'.rstrip('.')} {unit}"
    return f"{value:g} B"
