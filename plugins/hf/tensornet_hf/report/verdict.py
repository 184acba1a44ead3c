"""First screen of the report: bytes and quality of the model, and of the plain methods at the same bytes."""

from collections.abc import Sequence
from dataclasses import dataclass

from tensornet_hf.report.facts import ModelFacts, compact_bytes

#: A rise smaller than this, in nats, is not told from none.
_NOTHING = 5e-5
#: A method that takes so many times the bits still counts as one of the same bytes.
_SLACK = 1.02


@dataclass(frozen=True)
class Rise:
    """Rise of the loss of one model over the dense one.

    Args:
        value: in nats, or one minus the cosine of an encoder.
        measured: on held-out text, else predicted.
    """

    value: float
    measured: bool

    def __str__(self) -> str:
        return f"{self.value:+.4f}" if abs(self.value) >= _NOTHING else "0.0000"


def rise_of(model: ModelFacts, original: ModelFacts) -> Rise | None:
    """Return the measured rise of the loss, else the predicted one, else None."""
    if model.quality is not None and original.quality is not None:
        return Rise(model.quality.loss - original.quality.loss, True)
    return None if model.predicted_rise is None else Rise(model.predicted_rise, False)


def best_plain(models: Sequence[ModelFacts]) -> tuple[ModelFacts, Rise] | None:
    """Return the plain method (third and later models) with the smallest loss; None without any.

    Only rises that came about as that of the compressed model are compared, and only methods that take no
    more bits: the smallest number format may take more than a very small plan.
    """
    original, compressed, *plain = models
    ours = rise_of(compressed, original)
    known = [(model, rise_of(model, original)) for model in plain if _no_larger(model, compressed)]
    found = [(model, rise) for model, rise in known if rise is not None]
    found = [(model, rise) for model, rise in found if ours is None or rise.measured == ours.measured]
    return min(found, key=lambda pair: pair[1].value, default=None)


def _no_larger(model: ModelFacts, compressed: ModelFacts) -> bool:
    return model.bits is None or compressed.bits is None or model.bits <= _SLACK * compressed.bits


def verdict(models: Sequence[ModelFacts], *, measure: str) -> str:
    """Summarize size, quality and the comparison with plain methods in two sentences.

    Args:
        models: original, compressed, then plain methods.
        measure: what rises: `"loss"` or `"one minus cosine"`.
    """
    original, compressed = models[0], models[1]
    size = ""
    if original.bytes and compressed.bytes:
        before, after = compact_bytes(original.bytes), compact_bytes(compressed.bytes)
        size = f"{before} became {after} ({100 * compressed.bytes / original.bytes:.1f} %). "
    ours = rise_of(compressed, original)
    if ours is None:
        return f"{size}Nothing says what that costs: give calibration text to predict it, or held-out text."
    how = "On held-out text" if ours.measured else "As predicted,"
    of_loss = measure == "loss"
    much = f"the loss rises by {ours.value:.4f}" if of_loss else f"{measure} is {ours.value:.4f}"
    change = much if ours.value > _NOTHING else "nothing is lost"
    best = best_plain(models)
    if best is None:
        return f"{size}{how} {change}."
    return f"{size}{how} {change}. {_against(ours, *best)}"


def _against(ours: Rise, model: ModelFacts, rise: Rise) -> str:
    plain = f"The best plain method of at most these bytes, {model.name} ({model.form}),"
    if rise.value < ours.value:
        return f"{plain} is better here: {rise.value:.4f}."
    times = f", {rise.value / ours.value:.1f} times as much" if ours.value > _NOTHING else ""
    return f"{plain} costs {rise.value:.4f}{times}."
