"""Targets for rounding that correct what layers before have done wrong.

A layer reads `x` in the dense model and `x~` in the compressed model. If its output is added to a residual
stream, this is `h` in the dense model and `h~` in the compressed model. The output of the layer and this sum
come closest to those of the dense model with the matrix

    W + (W E[(x - x~) x~^T] + E[(h - h~) x~^T]) (C~ + l)^-1,        C~ = E[x~ x~^T].

Both corrections also learn what is particular to the calibration text, so only a part of them is used.

Reference:
    Li et al. 2025, "GPTAQ"; Zhang et al. 2025, "Qronos" (inputs); "LoaQ" (residual stream).
"""

import torch
from torch import Tensor

from tensornet._util import outside_autocast, remembered
from tensornet.calibration.arrival import Mismatch
from tensornet.linalg.weighted_svd import damped

#: Fractions of the corrections that are used: for the inputs, and for the residual stream.
INPUT_STRENGTH, RESIDUAL_STRENGTH = 0.5, 0.5
#: Damping of the moment of the inputs: at least this, and this number of tokens an input. With few tokens,
#: corrections mostly learn the noise of the moments.
LEAST_DAMPING, DAMPING_TOKENS = 0.02, 1.0
#: Largest change of a matrix, as a fraction of its Frobenius norm.
LARGEST_MOVE = 0.5


@torch.no_grad()
@outside_autocast
def corrected(matrix: Tensor, moment: Tensor, mismatch: Mismatch) -> Tensor | None:
    """Compute the matrix that corrects the inputs and the residual stream of a layer.

    Layers with the same moment share its factor within `tensornet._util.remembering`.

    Args:
        matrix: the weight, shape `(out, in)`.
        moment: moment `C~` of the inputs in the compressed model, shape `(in, in)`.
        mismatch: the difference from the dense model.

    Returns:
        The matrix in float32; None if it is not finite, or differs too much from the weight.
    """
    own = matrix.float()
    wanted = INPUT_STRENGTH * (own @ mismatch.inputs)
    if mismatch.residual is not None:
        wanted += RESIDUAL_STRENGTH * mismatch.residual
    damping = max(LEAST_DAMPING, DAMPING_TOKENS * len(moment) / mismatch.tokens)
    lower = _factor(moment, damping)
    if lower is None:
        return None
    change = torch.cholesky_solve(wanted.mT, lower).mT
    size = float(torch.linalg.matrix_norm(change) / torch.linalg.matrix_norm(own))
    return own + change if size <= LARGEST_MOVE else None  # NaN is not smaller


@remembered
def _factor(moment: Tensor, damping: float) -> Tensor | None:
    """Compute the Cholesky factor of a damped moment in float32; None if it is not positive definite."""
    lower, info = torch.linalg.cholesky_ex(damped(moment, damping).float())
    return None if int(info) else lower
