"""Input tensors that several layers read: their moment is computed and summed once."""

import weakref
from dataclasses import dataclass

from torch import Tensor


@dataclass
class InputSum:
    """Summed input moment of layers that have read the same tensors so far."""

    layers: list[str]
    total: Tensor


class Reading:
    """Input tensor, its moment, and the layers that have read it."""

    def __init__(self, x: Tensor, moment: Tensor, tokens: int) -> None:
        self.moment, self.tokens = moment, tokens
        self.layers: list[str] = []
        self._of = weakref.ref(x)
        self._version = version_of(x)

    def joins(self, name: str, x: Tensor) -> bool:
        """Return True if a layer reads this tensor, unchanged, for the first time."""
        unchanged = self._version is not None and version_of(x) == self._version
        return self._of() is x and unchanged and name not in self.layers


def version_of(x: Tensor) -> int | None:
    """Return the in-place version of a tensor; None if it has no version counter.

    Example:
        >>> from tensornet.calibration.shared_inputs import version_of
        >>> x = torch.zeros(2)
        >>> version_of(x), version_of(x.add_(1))
        (0, 1)
    """
    return None if x.is_inference() else x._version
