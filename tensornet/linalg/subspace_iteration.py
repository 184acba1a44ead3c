"""Leading left singular subspace of a wide block by subspace iteration, for ranks far below the size.

Subspace iteration started from a seeded Gaussian block. It multiplies by the Gram matrix where forming it
is cheaper, and by the block and its adjoint otherwise. It watches the captured energy and gives up, rather
than return a bad basis, if that does not settle.

Reference: Halko, Martinsson, Tropp 2011, "Finding structure with randomness", algorithm 4.4.
"""

import torch
from torch import Tensor

#: Below this size an eigendecomposition of the Gram matrix is as fast.
MIN_SIZE = 256
#: Above this fraction of the smaller dimension an eigendecomposition is as fast.
MAX_SHARE = 1 / 8
_MAX_ITERATIONS = 10
#: Singular values converge later than the energy: factor on the number of iterations if they are wanted.
_PATIENCE = 2
#: Forming the Gram matrix costs size/width iterations of the direct product; six are typical.
_GRAM_PAYS_BELOW = 12


def worth_iterating(size: int, rank: int) -> bool:
    """Return True if iteration is faster than an eigendecomposition for `rank` vectors of length `size`."""
    return size >= MIN_SIZE and rank <= MAX_SHARE * size


def iterated_basis(
    block: Tensor,
    total: Tensor,
    rank: int,
    *,
    slack: float,
    kept_slack: float | None = None,
    gram: Tensor | None = None,
) -> Tensor | None:
    """Compute an orthonormal basis of the `rank` leading left singular vectors, in descending order.

    Args:
        block: shape `(*batch, m, n)` with `m <= n`.
        total: energy of the blocks, shape `(*batch)`, double precision.
        rank: number of vectors, at most `m`.
        slack: stop when an iteration lowers the energy left outside by less than this fraction of it.
        kept_slack: and by less than this fraction of the energy inside, for accurate singular values
            themselves: next to a large rest they may be far off while the rest hardly changes.
        gram: `block @ block^H` if it is known.

    Returns:
        Basis of shape `(*batch, m, rank)`, or None if the energy has not settled.
    """
    size, width = block.shape[-2], min(block.shape[-2], rank + max(rank // 2, 8))
    if size > _GRAM_PAYS_BELOW * width:
        gram = None
    elif gram is None:
        gram = block @ block.mH
    generator = torch.Generator(device="cpu").manual_seed(0)  # the same numbers on every device
    probe = torch.randn(size, width, generator=generator, dtype=torch.float64, device="cpu").to(block)
    basis = torch.linalg.qr(_square(block, gram, probe.expand(*block.shape[:-2], size, width))).Q
    before = torch.zeros_like(total)
    for _ in range(_MAX_ITERATIONS if kept_slack is None else _PATIENCE * _MAX_ITERATIONS):
        image = _square(block, gram, basis)
        values, vectors = torch.linalg.eigh(basis.mH @ image)
        captured = values[..., -rank:].double().sum(-1)
        outside = (total - captured).clamp_min(0)
        resolution = 10 * torch.finfo(block.dtype).eps * total
        allowed = slack * outside
        if kept_slack is not None:
            allowed = torch.minimum(allowed, kept_slack * captured)
        if bool((captured - before <= allowed + resolution).all()):
            return basis @ vectors[..., -rank:].flip(-1)
        before = captured
        basis = torch.linalg.qr(image).Q
    return None


def _square(block: Tensor, gram: Tensor | None, vectors: Tensor) -> Tensor:
    """Compute `block @ block^H @ vectors`."""
    return block @ (block.mH @ vectors) if gram is None else gram @ vectors
