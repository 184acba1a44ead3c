"""TT-SVD of a matrix into matrix-product-operator cores, with a certificate.

Reference: Oseledets 2011, "Tensor-Train Decomposition", algorithm 1 and theorem 2.2.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tensornet.budget import Budget
from tensornet.errors import BudgetError, TopologyError
from tensornet.svd import Method, check_finite, result_dtype, truncated_svd, working_dtype


@dataclass(frozen=True)
class TTResult:
    """Cores `(left, out, in, right)`, all but the last left-orthonormal, and what was cut.

    Args:
        cores: the chain.
        error: certified relative Frobenius error, `sqrt(sum over bonds of discarded energy) / |W|`.
        bound_by: the cap that decided (see `Decomposition.bound_by`).
    """

    cores: tuple[Tensor, ...]
    error: float
    bound_by: str


def check_dims(shape: tuple[int, int], out_dims: Sequence[int], in_dims: Sequence[int]) -> None:
    """Refuse leg sizes that cannot carry a matrix of this shape.

    Raises:
        TopologyError: different numbers of out- and in-dims, a size below 1, or a product that is too small.
    """
    if len(out_dims) != len(in_dims) or not out_dims:
        raise TopologyError(
            f"out_dims {tuple(out_dims)} and in_dims {tuple(in_dims)} must have the same number of sites, "
            "at least one; use size 1 where a site has no leg."
        )
    for name, features, dims in (("out_dims", shape[0], out_dims), ("in_dims", shape[1], in_dims)):
        if min(dims) < 1 or math.prod(dims) < features:
            raise TopologyError(
                f"{name} {tuple(dims)} multiply to {math.prod(dims)}, which does not hold {features} "
                "features; the product must be at least that (the excess is padded with zeros)."
            )


def max_bonds(out_dims: Sequence[int], in_dims: Sequence[int]) -> tuple[int, ...]:
    """Largest useful bonds: `d_k = min(prod of legs left of bond k, prod of legs right of it)`."""
    legs = [o * i for o, i in zip(out_dims, in_dims, strict=True)]
    return tuple(min(math.prod(legs[:k]), math.prod(legs[k:])) for k in range(1, len(legs)))


def mpo_params(out_dims: Sequence[int], in_dims: Sequence[int], bonds: Sequence[int]) -> int:
    """Number of elements of all cores."""
    full = (1, *bonds, 1)
    return sum(full[k] * o * i * full[k + 1] for k, (o, i) in enumerate(zip(out_dims, in_dims, strict=True)))


def cap_bonds(
    shape: tuple[int, int], out_dims: Sequence[int], in_dims: Sequence[int], budget: Budget
) -> tuple[tuple[int, ...], str]:
    """Bond caps that `max_bond` and `param_ratio` imply, and which of the two decides.

    The parameter budget is turned into the largest uniform cap that fits it.

    Returns:
        `(bonds, bound_by)`; `bound_by` is `"exact"` if no cap cuts anything.

    Raises:
        BudgetError: not even bonds of 1 fit `param_ratio`.
    """
    full = max_bonds(out_dims, in_dims)
    bonds, bound_by = full, "exact"
    if budget.max_bond is not None and any(b > budget.max_bond for b in full):
        bonds, bound_by = tuple(min(b, budget.max_bond) for b in full), "max_bond"
    if budget.param_ratio is not None:
        allowed = budget.param_ratio * shape[0] * shape[1]
        smallest = mpo_params(out_dims, in_dims, [1] * len(full))
        if smallest > allowed:
            raise BudgetError(
                f"param_ratio={budget.param_ratio} allows {int(allowed)} parameters for a matrix of shape "
                f"{tuple(shape)}, but dims {tuple(out_dims)} x {tuple(in_dims)} need {smallest} at bond 1; "
                "raise the budget or use more sites."
            )
        if mpo_params(out_dims, in_dims, bonds) > allowed:
            low, high = 1, max(bonds)  # invariant: low fits, high does not
            while high - low > 1:
                middle = (low + high) // 2
                fits = mpo_params(out_dims, in_dims, [min(b, middle) for b in bonds]) <= allowed
                low, high = (middle, high) if fits else (low, middle)
            bonds, bound_by = tuple(min(b, low) for b in bonds), "param_ratio"
    return bonds, bound_by


def pad_matrix(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """Zero-pad to `(rows, columns)`."""
    return torch.nn.functional.pad(matrix, (0, columns - matrix.shape[1], 0, rows - matrix.shape[0]))


@torch.no_grad()
def tt_svd(
    matrix: Tensor,
    out_dims: Sequence[int],
    in_dims: Sequence[int],
    budget: Budget,
    *,
    bonds: Sequence[int] | None = None,
    method: Method = "auto",
) -> TTResult:
    """Decompose `matrix: (out, in)` into a chain of cores `(left, out_k, in_k, right)`.

    Args:
        matrix: real or complex; padded with zeros to the product of the dims.
        out_dims: sizes of the out-legs, most significant first.
        in_dims: sizes of the in-legs, as many as out-legs.
        budget: caps. `rel_error` is spent bond by bond, what one bond leaves over goes to the next.
        bonds: an explicit cap for each bond, on top of the budget.
        method: see `truncated_svd`.

    Raises:
        BudgetError, NonFiniteError, TopologyError: see `cap_bonds`, `check_finite`, `check_dims`.
    """
    check_dims((matrix.shape[0], matrix.shape[1]), out_dims, in_dims)
    check_finite(matrix, "The matrix")
    caps, bound_by = cap_bonds((matrix.shape[0], matrix.shape[1]), out_dims, in_dims, budget)
    if bonds is not None:
        if len(bonds) != len(caps):
            raise TopologyError(f"bonds {tuple(bonds)} must have {len(caps)} entries, one for each bond.")
        if any(b < c for b, c in zip(bonds, caps, strict=True)):
            bound_by = "max_bond"
        caps = tuple(min(b, c) for b, c in zip(bonds, caps, strict=True))
    dtype, sites = result_dtype(matrix.dtype), len(out_dims)
    rest = pad_matrix(matrix.detach(), math.prod(out_dims), math.prod(in_dims)).to(
        working_dtype(matrix.dtype)
    )
    order = [axis for k in range(sites) for axis in (k, sites + k)]
    rest = rest.reshape(*out_dims, *in_dims).permute(order).reshape(1, -1)
    total = float(torch.linalg.vector_norm(rest)) ** 2
    spent, left, cores = 0.0, 1, []
    for site in range(sites - 1):
        rest = rest.reshape(left * out_dims[site] * in_dims[site], -1)
        energy = float(torch.linalg.vector_norm(rest)) ** 2
        tolerance = None
        if budget.rel_error is not None:
            share = max(budget.rel_error**2 * total - spent, 0.0) / (sites - 1 - site)
            tolerance = min(math.sqrt(share / energy), 1 - 1e-12) if energy > 0 else None
        # The SVD sees double precision either way; the original dtype tells "auto" what accuracy is asked.
        factors = truncated_svd(rest, max_rank=caps[site], rel_error=tolerance, method=_route(method, dtype))
        if factors.S.numel() < min(caps[site], *rest.shape):
            bound_by = "rel_error"
        spent += factors.error**2 * energy
        left_legs = (left, out_dims[site], in_dims[site])
        left = factors.S.numel()
        cores.append(factors.U.reshape(*left_legs, left))
        rest = factors.S[:, None].to(rest.dtype) * factors.Vh
    cores.append(rest.reshape(left, out_dims[-1], in_dims[-1], 1))
    error = math.sqrt(spent / total) if total > 0 else 0.0
    return TTResult(tuple(core.to(dtype).contiguous() for core in cores), error, bound_by)


def _route(method: Method, dtype: torch.dtype) -> Method:
    # Single-precision weights carry no singular values that a double-precision Gram matrix would lose.
    return "gram" if method == "auto" and dtype in (torch.float32, torch.complex64) else method
