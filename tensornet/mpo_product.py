"""Products of chains with small bonds, without the exact product whose bonds are products of bonds."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tensornet._util import outside_autocast
from tensornet.budget import caps_of_bonds
from tensornet.linalg.svd import check_finite, result_dtype, working_dtype
from tensornet.mpo_algebra import Cores, split_exponent, times_power_of_two

#: Gram matrices square the singular values, so errors below this cannot be seen in double precision.
SMALLEST_ERROR = 1e-6


@outside_autocast
@torch.no_grad()
def compressed_product(
    left: Sequence[Tensor],
    right: Sequence[Tensor],
    *,
    max_bond: int | Sequence[int] | None,
    rel_error: float,
) -> tuple[Cores, float]:
    """Multiply two chains and truncate on the way, by the density matrix of each part (not differentiable).

    From the right, the Gram matrix of the rest of the product is computed at each bond. From the left, the
    product is then projected to the leading eigenvectors of the density matrix of the sites so far. Nested
    projections are orthogonal, so the squares of their errors add up to the exact error. With bonds `D` of
    `right` and `w` of `left`, a site takes `O(D^3 w^2)` operations; the exact product takes `O(D^3 w^3)`.

    Args:
        left, right: the chains; the in-dims of `left` are the out-dims of `right`.
        max_bond: limit for all bonds, or a sequence with a limit for each bond.
        rel_error: largest relative error, at least `SMALLEST_ERROR`, unless `max_bond` requires more.

    Returns:
        The cores, all but the last left-orthonormal, and a bound on the relative error.

    Reference:
        McCulloch 2007, "From density-matrix renormalization group to matrix product states"; ITensor's
        `contract` with the algorithm "densitymatrix".
    """
    sites = len(left)
    caps = caps_of_bonds(max_bond, sites - 1)
    kind = torch.promote_types(left[0].dtype, right[0].dtype)
    dtype = working_dtype(kind)
    exponent = torch.zeros((), dtype=torch.float64, device=left[0].device)
    factors = []
    for core, other in zip(left, right, strict=True):
        for tensor in (core, other):
            check_finite(tensor, "An operator of the product")
        (a, of_a), (b, of_b) = split_exponent(core.to(dtype)), split_exponent(other.to(dtype))
        factors.append((a, b))
        exponent = exponent + of_a + of_b

    gram = torch.ones(1, 1, 1, 1, dtype=dtype, device=left[0].device)
    grams = [gram]  # shape: (bond of left, bond of right), once for the product and once for its conjugate
    for a, b in reversed(factors[1:]):
        half = torch.einsum("bmic,vcux->bmivux", b, gram)
        half = torch.einsum("womv,bmivux->wboiux", a, half)
        half = torch.einsum("wboiux,yonu->wbiyxn", half, a.conj())
        gram, _ = split_exponent(torch.einsum("wbiyxn,znix->wbyz", half, b.conj()))
        grams.append(gram)
    grams.reverse()

    rest = torch.ones(1, 1, 1, dtype=dtype, device=left[0].device)  # shape: (kept bond, left, right)
    cores, spent = [], 0.0
    for k, (a, b) in enumerate(factors):
        block = torch.einsum("kwa,amib->kwmib", rest, b)
        block, more = split_exponent(torch.einsum("kwmib,womv->koivb", block, a))
        exponent = exponent + more
        if k == sites - 1:
            cores.append(block[..., 0])
            break
        rows = block.flatten(0, 2).flatten(1)  # shape: (kept bond * out * in, left * right)
        weights, vectors = torch.linalg.eigh(rows @ grams[k].flatten(2).flatten(0, 1) @ rows.mH)
        weights = weights.flip(0).clamp(min=0) / max(float(weights.sum()), 1e-300) * (1 - spent)
        # Rounding errors make eigenvalues that are zero slightly positive.
        allowed = max((rel_error**2 - spent) / (sites - 1 - k), 100 * torch.finfo(dtype).eps)
        tails = (
            weights.flip(0).cumsum(0).flip(0)
        )  # the weight that is lost if a vector and later ones are cut
        rank = min(max(int((tails > allowed).sum()), 1), len(weights), caps[k] or len(weights))
        spent += float(tails[rank]) if rank < len(tails) else 0.0
        kept = vectors.flip(1)[:, :rank]
        cores.append(kept.reshape(*block.shape[:3], rank))
        rest = (kept.mH @ rows).reshape(rank, *block.shape[3:])
    each = torch.floor(exponent / sites)
    cores = [
        times_power_of_two(core, each + (exponent - each * sites if k == sites - 1 else 0))
        for k, core in enumerate(cores)
    ]
    rounding = 100 * sites * torch.finfo(dtype).eps
    found = result_dtype(kind)
    return tuple(core.to(found) for core in cores), math.sqrt(min(spent + rounding, 1.0))
