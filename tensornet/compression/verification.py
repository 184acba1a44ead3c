"""Record of a verification: predicted loss increases that were checked by measuring, and those raised."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tensornet.compression.layer_plan import LayerPlan, describe

#: Relative error of a weight from which on its predicted loss increase is uncertain: that of integers of two
#: bits and of small ranks; integers of three bits have 0.2 to 0.3.
LARGE_ERROR = 0.35


@dataclass(frozen=True)
class RaisedPrice:
    """Predicted loss increase that was multiplied, since the measured one was far higher.

    Args:
        layer: name of the layer.
        form: number format and family, as plans print them.
        factor: measured over predicted.
    """

    layer: str
    form: str
    factor: float


@dataclass(frozen=True)
class Verification:
    """Outcome of measuring predicted loss increases of a plan.

    Args:
        layers: layers of the plan that were measured as planned.
        raised: predicted loss increases that were multiplied before the plan was made, of forms that it may
            no longer contain.

    Example:
        >>> from tensornet.compression.verification import RaisedPrice, Verification
        >>> print(Verification(28, (RaisedPrice("output.dense", "int2 dense", 25.5),)))
        28 layers verified by measuring, predicted loss raised of output.dense in int2 dense (26x)
    """

    layers: int
    raised: tuple[RaisedPrice, ...] = ()

    def __str__(self) -> str:
        text = f"{self.layers} layers verified by measuring"
        if self.raised:
            each = (f"{x.layer} in {x.form} ({x.factor:.2g}x)" for x in self.raised)
            text += f", predicted loss raised of {', '.join(each)}"
        return text

    def to_dict(self) -> dict[str, Any]:
        """Convert to a JSON-ready form."""
        return {"layers": self.layers, "raised": [asdict(x) for x in self.raised]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any] | None) -> "Verification | None":
        """Restore a verification from `to_dict`; None where nothing was verified."""
        if data is None:
            return None
        return cls(int(data["layers"]), tuple(RaisedPrice(**x) for x in data["raised"]))


@dataclass(frozen=True)
class Checks:
    """All measurements of a preparation, whatever plan they were made for.

    Args:
        measured: `(layer, form)` of each.
        raised: predicted loss increases that were multiplied.
    """

    measured: frozenset[tuple[str, str]] = frozenset()
    raised: tuple[RaisedPrice, ...] = ()

    def of(self, layers: Sequence[LayerPlan]) -> Verification:
        """Summarize what was verified of a plan."""
        return Verification(sum(form_of(layer) in self.measured for layer in layers), self.raised)


def form_of(layer: LayerPlan) -> tuple[str, str]:
    """Name a layer and the form in which it is planned."""
    return layer.name, describe(layer.topology, layer.storage)


def has_large_error(layer: LayerPlan) -> bool:
    """Return True if a layer loses so much that its predicted loss increase is uncertain."""
    return layer.topology is not None and layer.error is not None and layer.error > LARGE_ERROR


def is_unverified(layer: LayerPlan) -> bool:
    """Return True if verification would have measured a layer, as far as its plan tells."""
    return has_large_error(layer) and bool(layer.loss_increase) and layer.storage.own_dtypes
