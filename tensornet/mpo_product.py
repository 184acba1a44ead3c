"""Rounded products of chains, computed by whichever of three algorithms is cheapest.

Small products are computed as a dense matrix. Products with small bonds are computed exactly and then
rounded. All others are truncated on the way, so that no core with a product of two bonds is built.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tensornet._util import outside_autocast
from tensornet.budget import caps_of_bonds
from tensornet.linalg.svd import choose_rank, result_dtype, working_dtype
from tensornet.mpo_algebra import (
    Cores,
    dense_matrix,
    multiply,
    refuse_vmap,
    round_chain,
    round_dense,
    tamed,
    times_power_of_two,
)

#: Gram matrices square the singular values, so errors below this cannot be seen in double precision.
SMALLEST_ERROR = 1e-6
#: Products of two bonds up to this size are computed, because QR is then faster than many small products.
_SMALL = 32


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
    If no product of two bonds exceeds 32, the exact product is rounded instead. If the dense product takes
    fewer operations, it is built and decomposed by TT-SVD.

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
    refuse_vmap([*left, *right])
    shapes = [(*a.shape, *b.shape) for a, b in zip(left, right, strict=True)]
    if all(v * c <= _SMALL for _, _, _, v, _, _, _, c in shapes):
        wide = [[core.to(dtype) for core in chain] for chain in (left, right)]
        rounded, error = round_chain(multiply(*wide), max_bond=max_bond, rel_error=rel_error)
        return tuple(core.to(result_dtype(kind)) for core in rounded), error
    rows, middle, columns = (math.prod(shape[leg] for shape in shapes) for leg in (1, 2, 6))
    work = sum(z * m * i * (v * c) ** 2 + w * o * m * i * v * v * z * c for w, o, m, v, z, _, i, c in shapes)
    if rows * middle * columns <= work:
        (one, first), (two, second) = dense_matrix(left), dense_matrix(right)
        out_dims, in_dims = [shape[1] for shape in shapes], [shape[6] for shape in shapes]
        product = (one @ two).reshape(*out_dims, *in_dims)
        product = product.permute([axis for k in range(sites) for axis in (k, sites + k)])
        return round_dense(
            product, first + second, max_bond=max_bond, rel_error=rel_error, dtype=result_dtype(kind)
        )

    exponent: Tensor | float = 0.0
    factors = []
    for core, other in zip(left, right, strict=True):
        (a, of_a), (b, of_b) = (tamed(x.to(dtype), finite=True) for x in (core, other))
        factors.append((a, b))
        exponent = exponent + of_a + of_b

    grams = [torch.ones(1, 1, 1, 1, dtype=dtype, device=left[0].device)]
    for a, b in reversed(factors[1:]):
        grams.append(tamed(_gram_before(a, b, grams[-1]))[0])

    rest = torch.ones(1, 1, 1, dtype=dtype, device=left[0].device)  # shape: (kept bond, left, right)
    cores: list[Tensor] = []
    spent = 0.0
    for k, ((a, b), gram) in enumerate(zip(factors, reversed(grams), strict=True)):
        block, more = tamed(_block_after(rest, a, b))  # shape: (kept bond, out, in, left, right)
        exponent = exponent + more
        if k == sites - 1:
            cores.append(block[..., 0])
            break
        rows = block.flatten(0, 2).flatten(1)
        tall = rows.shape[0] > rows.shape[1]
        Q, R = torch.linalg.qr(rows) if tall else (None, rows)
        weights, vectors = torch.linalg.eigh(R @ gram.flatten(2).flatten(0, 1) @ R.mH)
        energies = [max(weight, 0.0) for weight in weights.tolist()]
        unit = (1 - spent) / max(math.fsum(energies), 1e-300)
        # Rounding errors make eigenvalues that are zero slightly positive.
        allowed = max((rel_error**2 - spent) / (sites - 1 - k), 100 * torch.finfo(dtype).eps)
        rank, lost = choose_rank(energies, caps[k] or len(energies), allowed / unit)
        spent += lost * unit
        kept = vectors[:, -rank:].flip(1)
        cores.append((kept if Q is None else Q @ kept).reshape(*block.shape[:3], -1))
        rest = (kept.mH @ R).reshape(-1, *block.shape[3:])
    each = exponent // sites
    cores = [
        times_power_of_two(core, each + (exponent - each * sites if k == sites - 1 else 0.0))
        for k, core in enumerate(cores)
    ]
    rounding = 100 * sites * torch.finfo(dtype).eps
    found = result_dtype(kind)
    return tuple(core.to(found) for core in cores), math.sqrt(min(spent + rounding, 1.0))


def _gram_before(a: Tensor, b: Tensor, gram: Tensor) -> Tensor:
    """Compute the Gram matrix of the product at the bond before a site from that at the bond after it.

    Args:
        a: core of the left factor, shape `(w, o, m, v)`.
        b: core of the right factor, shape `(z, m, i, c)`.
        gram: shape `(v, c, v, c)`; the second pair of bonds is that of the conjugate.

    Returns:
        Shape `(w, z, w, z)`.
    """
    (w, o, m, v), (z, _, i, c) = a.shape, b.shape
    half = b.flatten(0, 2) @ gram.transpose(0, 1).reshape(c, -1)  # shape: (z * m * i, v * v * c)
    half = half.reshape(z, m, i, v, v, c).permute(1, 3, 0, 2, 4, 5).reshape(m * v, -1)
    half = (a.reshape(w * o, m * v) @ half).reshape(w, o, z, i, v, c)
    half = half.permute(0, 2, 3, 5, 1, 4).reshape(-1, o * v) @ a.conj().permute(1, 3, 0, 2).reshape(o * v, -1)
    half = half.reshape(w, z, i, c, w, m).permute(0, 1, 4, 5, 2, 3).reshape(-1, m * i * c)
    return (half @ b.flatten(1).mH).reshape(w, z, w, z)


def _block_after(rest: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Multiply the projected first sites `(kept bond, w, z)` by both cores of the next site.

    The shapes of `a` and `b` are those of `_gram_before`.

    Returns:
        Shape `(kept bond, o, i, v, c)`.
    """
    (w, o, m, v), (_, _, i, c) = a.shape, b.shape
    block = (rest.flatten(0, 1) @ b.flatten(1)).reshape(-1, w, m, i, c).permute(0, 3, 4, 1, 2)
    block = block.reshape(-1, w * m) @ a.transpose(1, 2).reshape(w * m, -1)
    return block.reshape(-1, i, c, o, v).permute(0, 3, 1, 4, 2)
