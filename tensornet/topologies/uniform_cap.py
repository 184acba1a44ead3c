"""Conversion of a budget into bond caps, for families whose bonds share a cap."""

from collections.abc import Callable, Sequence

from tensornet.budget import Budget
from tensornet.errors import BudgetError


def uniform_caps(
    budget: Budget,
    shape: tuple[int, int],
    exact: Sequence[int],
    params: Callable[[list[int]], int],
    what: str,
) -> tuple[list[int], str]:
    """Find the largest bonds within `max_bond` and `param_ratio`, and name the cap that decides.

    `param_ratio` is turned into one cap for all bonds.

    Args:
        budget: caps of the caller.
        shape: `(out_features, in_features)`, without padding.
        exact: bonds of the exact network.
        params: parameters of the network at such bonds; need not be monotone.
        what: the network, for the error message.

    Returns:
        `(bonds, bound_by)`; `bound_by` is `"exact"` if no bond is truncated.

    Raises:
        BudgetError: not even bonds of 1 fit `param_ratio`, or another number of caps than bonds.
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
