"""Turning a budget into one cap for all bonds, for families whose bonds share a cap."""

from collections.abc import Callable

from tensornet.budget import Budget
from tensornet.errors import BudgetError


def uniform_cap(
    budget: Budget, shape: tuple[int, int], limit: int, params: Callable[[int], int], what: str
) -> tuple[int, str]:
    """The largest cap within `max_bond` and `param_ratio`, and which of the two decides.

    Args:
        budget: caps of the caller.
        shape: `(out_features, in_features)`, without padding.
        limit: a cap at which nothing is cut.
        params: parameters of the network at a cap; need not be monotone.
        what: the network, for the error message.

    Returns:
        `(cap, bound_by)`; `bound_by` is `"exact"` if nothing is cut.

    Raises:
        BudgetError: not even a cap of 1 fits `param_ratio`.
    """
    cap, bound_by = limit, "exact"
    if budget.max_bond is not None and budget.max_bond < limit:
        cap, bound_by = budget.max_bond, "max_bond"
    if budget.param_ratio is None:
        return cap, bound_by
    allowed = budget.param_ratio * shape[0] * shape[1]
    for candidate in range(cap, 0, -1):
        if params(candidate) <= allowed:
            return candidate, bound_by if candidate == cap else "param_ratio"
    raise BudgetError(
        f"param_ratio={budget.param_ratio} allows {int(allowed)} parameters for a matrix of shape "
        f"{shape}, but {what} needs {params(1)} at bond 1; raise the budget, use other dims, or another "
        "topology."
    )
