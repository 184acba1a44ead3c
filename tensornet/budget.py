"""The limits of a decomposition: largest bonds, largest error and largest number of parameters."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tensornet._util import check_number, check_size
from tensornet.errors import BudgetError


@dataclass(frozen=True)
class Budget:
    """Limits on the bonds, the error and the number of parameters of one decomposition.

    Limits can be combined. With `rel_error`, a decomposition chooses the smallest bonds whose error is at
    most `rel_error`; it raises `BudgetError` if the other limits do not allow such bonds. Without
    `rel_error`, it chooses the largest bonds that the other limits allow.

    Args:
        max_bond: largest bond dimension, at least 1, or a sequence with a limit for each bond. The order of
            bonds is from left to right in a chain; the closing bond of a ring is last. In a Tucker network,
            each leg has one rank, out-legs first. A limit above the bond of an exact network has no effect.
        rel_error: largest relative Frobenius error `|W - W'| / |W|`, in `[0, 1)`.
        param_ratio: largest number of parameters as a fraction of `out_features * in_features`, above 0.

    Raises:
        BudgetError: a limit is out of range.

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
                f"rel_error must lie in [0, 1), got {self.rel_error!r}: it is the relative Frobenius error, "
                "which is 1 for the zero matrix."
            )
        if self.param_ratio is not None and not 0 < self.param_ratio < math.inf:
            raise BudgetError(
                f"param_ratio must be above 0, got {self.param_ratio!r}: it is the fraction of the dense "
                "parameters to keep, for example 0.5."
            )

    @property
    def unlimited(self) -> bool:
        """True if there is no limit, so that the decomposition is exact."""
        return self.max_bond is None and self.rel_error is None and self.param_ratio is None

    def caps_of_bonds(self, count: int) -> tuple[int | None, ...]:
        """Expand `max_bond` to one limit for each of `count` bonds; see the function `caps_of_bonds`."""
        return caps_of_bonds(self.max_bond, count)


def check_max_bond(value: Any, error: type[ValueError] = BudgetError) -> int | tuple[int, ...]:
    """Convert a limit on bonds to `int`, or a sequence of limits to a tuple of `int`.

    Raises:
        BudgetError, or the class `error`: an entry is not an integer of at least 1.
    """
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(check_size("Every entry of max_bond", cap, error=error) for cap in value)
    return check_size("max_bond", value, error=error)


def caps_of_bonds(
    max_bond: int | Sequence[int] | None, count: int, error: type[ValueError] = BudgetError
) -> tuple[int | None, ...]:
    """Expand `max_bond` to a tuple with one limit for each bond.

    Args:
        max_bond: one limit for all bonds, a sequence with a limit for each bond, or None for no limits.
        count: number of bonds.
        error: class of the exception to raise.

    Raises:
        BudgetError, or the class `error`: a limit is not an integer of at least 1, or the sequence does not
            have length `count`.
    """
    if max_bond is None:
        return (None,) * count
    caps = check_max_bond(max_bond, error)
    if isinstance(caps, int):
        return (caps,) * count
    if len(caps) != count:
        raise error(
            f"max_bond {caps} has {len(caps)} entries, but the network has {count} bonds; give one limit "
            "for each bond, or one integer for all bonds."
        )
    return caps


def uniform_caps(
    budget: Budget,
    shape: tuple[int, int],
    exact: Sequence[int],
    params: Callable[[list[int]], int],
    what: str,
) -> tuple[list[int], str]:
    """Find the largest bonds within `max_bond` and `param_ratio`, and name the limit that bounds them.

    `param_ratio` is converted to a common limit for all bonds.

    Args:
        budget: the limits of the caller.
        shape: shape `(out_features, in_features)` of the matrix, without padding.
        exact: bonds of the exact network.
        params: function that returns the number of parameters for given bonds; it need not be monotone.
        what: name of the network, for the error message.

    Returns:
        `(bonds, bound_by)`. `bound_by` is `"max_bond"` or `"param_ratio"`, or `"exact"` if no bond is
        truncated.

    Raises:
        BudgetError: even bonds of 1 exceed `param_ratio`, or `max_bond` has the wrong number of entries.
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
        f"{shape}, but {what} needs {params([1] * len(limits))} at bond 1; raise the budget, or use other "
        "dims or another topology."
    )
