"""Budget of a decomposition: caps on bonds, error and parameters; the tightest wins."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tensornet._util import check_number, check_size
from tensornet.errors import BudgetError


@dataclass(frozen=True)
class Budget:
    """Caps on bonds, error and parameters of one decomposition; the tightest decides each bond.

    Args:
        max_bond: largest bond dimension, at least 1, or a sequence with one cap for each bond in the order of
            the family's bonds (chains: left to right; rings: the closing bond last; Tucker: one rank for each
            leg, out-legs first). A cap above the exact bond is clipped to it.
        rel_error: largest relative Frobenius error `|W - W'| / |W|`, in `[0, 1)`.
        param_ratio: largest keep ratio, relative to the dense parameter count `out_features * in_features`,
            above 0.

    Raises:
        BudgetError: a cap is outside its range.

    Example:
        >>> tn.topologies.Budget(max_bond=(4, 8)).caps_of_bonds(2)
        (4, 8)
    """

    max_bond: int | Sequence[int] | None = None
    rel_error: float | None = None
    param_ratio: float | None = None

    def __post_init__(self) -> None:
        if self.max_bond is not None:
            bonds = check_max_bond(self.max_bond)
            object.__setattr__(self, "max_bond", bonds)  # converts NumPy integers to int
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
        """True if no cap is set, so that the decomposition is exact."""
        return self.max_bond is None and self.rel_error is None and self.param_ratio is None

    def caps_of_bonds(self, count: int) -> tuple[int | None, ...]:
        """Expand `max_bond` to one cap for each of `count` bonds; None leaves a bond uncapped.

        Raises:
            BudgetError: a sequence of another length.
        """
        return caps_of_bonds(self.max_bond, count)


def check_max_bond(value: Any, error: type[ValueError] = BudgetError) -> int | tuple[int, ...]:
    """Raise BudgetError unless `value` is a cap on bonds: one integer or a sequence of them.

    Raises:
        BudgetError: not integers of at least 1 (or the class given by `error`).
    """
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(check_size("Every entry of max_bond", cap, error=error) for cap in value)
    return check_size("max_bond", value, error=error)


def caps_of_bonds(
    max_bond: int | Sequence[int] | None, count: int, error: type[ValueError] = BudgetError
) -> tuple[int | None, ...]:
    """Expand `max_bond` to a tuple with one cap for each bond.

    Args:
        max_bond: one cap for all bonds, a sequence with one for each, or None.
        count: number of bonds.
        error: class to raise.

    Raises:
        BudgetError: not integers of at least 1, or a sequence of another length.
    """
    if max_bond is None:
        return (None,) * count
    caps = check_max_bond(max_bond, error)
    if isinstance(caps, int):
        return (caps,) * count
    if len(caps) != count:
        raise error(
            f"max_bond {caps} has {len(caps)} entries, the network has {count} bonds; give one cap for each "
            "bond, or one integer for all of them."
        )
    return caps


def uniform_caps(
    budget: Budget,
    shape: tuple[int, int],
    exact: Sequence[int],
    params: Callable[[list[int]], int],
    what: str,
) -> tuple[list[int], str]:
    """Find the largest bonds within `max_bond` and `param_ratio`, and name the cap that decides.

    `param_ratio` is converted to one cap for all bonds.

    Args:
        budget: caps of the caller.
        shape: `(out_features, in_features)`, without padding.
        exact: bonds of the exact network.
        params: returns the number of parameters for given bonds; need not be monotone.
        what: the network, for the error message.

    Returns:
        `(bonds, bound_by)`; `bound_by` is `"exact"` if no bond is truncated.

    Raises:
        BudgetError: even bonds of 1 exceed `param_ratio`, or the number of caps is not that of the bonds.
    """
    caps = budget.caps_of_bonds(len(exact))
    limits = [min(bond, cap or bond) for bond, cap in zip(exact, caps, strict=True)]
    bound_by = "exact" if limits == list(exact) else "max_bond"
    if budget.param_ratio is None:
        return limits, bound_by
    allowed = budget.param_ratio * shape[0] * shape[1]
    for cap in range(max(limits, default=1), 0, -1):
        bonds = [min(cap, limit) for limit in limits]
        if params(bonds) <= allowed:
            return bonds, bound_by if bonds == limits else "param_ratio"
    raise BudgetError(
        f"param_ratio={budget.param_ratio} allows {int(allowed)} parameters for a matrix of shape "
        f"{shape}, but {what} needs {params([1] * len(limits))} at bond 1; raise the budget, use other dims, "
        "or another topology."
    )
