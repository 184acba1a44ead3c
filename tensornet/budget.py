"""What a decomposition may cost: a frozen triple of caps, of which the tightest wins."""

import math
from dataclasses import dataclass
from typing import Any

from tensornet.checks import check_number, check_size
from tensornet.errors import BudgetError


@dataclass(frozen=True)
class Budget:
    """Caps on one decomposition. Any may be combined; the tightest decides each bond.

    Args:
        max_bond: largest bond dimension, at least 1. A cap above the exact bond is clipped to it.
        rel_error: largest relative Frobenius error `|W - W'| / |W|`, in `[0, 1)`.
        param_ratio: largest share of the dense parameter count `out_features * in_features`, above 0.

    Raises:
        BudgetError: a cap is outside its range.
    """

    max_bond: int | None = None
    rel_error: float | None = None
    param_ratio: float | None = None

    def __post_init__(self) -> None:
        if self.max_bond is not None:
            bond = check_size("max_bond", self.max_bond, error=BudgetError)
            object.__setattr__(self, "max_bond", bond)  # NumPy's integers become Python's
        for name in ("rel_error", "param_ratio"):
            if (value := getattr(self, name)) is not None:
                check_number(name, value)
        if self.rel_error is not None and not 0 <= self.rel_error < 1:
            raise BudgetError(
                f"rel_error must lie in [0, 1), got {self.rel_error!r}: it is the relative Frobenius error; "
                "an error of 1 is reached by the zero matrix."
            )
        if self.param_ratio is not None and not 0 < self.param_ratio < math.inf:
            raise BudgetError(
                f"param_ratio must be above 0, got {self.param_ratio!r}: it is the share of the dense "
                "parameters to keep, for example 0.5."
            )

    @property
    def unlimited(self) -> bool:
        """True if no cap is set, so the decomposition is exact."""
        return self.max_bond is None and self.rel_error is None and self.param_ratio is None


def check_budget(value: Any) -> None:
    """Refuse what is no `Budget`.

    Raises:
        BudgetError: saying what was got.
    """
    if not isinstance(value, Budget):
        raise BudgetError(
            f"Expected a Budget, got {value!r}; write Budget(max_bond=8), or Budget() for no cap."
        )
