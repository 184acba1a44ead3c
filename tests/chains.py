"""Chains of cores as dense NumPy matrices, and comparisons with them."""

from __future__ import annotations

import numpy as np
from torch import Tensor

import tensornet as tn
from tensornet.testing import laws, reference


def close(actual: Tensor, expected: np.ndarray | complex, factor: float = 1.0) -> None:
    """Compare up to rounding errors in the dtype of `actual`, which `factor` enlarges."""
    size = max(1.0, float(np.max(np.abs(expected), initial=0)))
    slack = 10 * laws.tolerance(actual.dtype) * size * factor
    np.testing.assert_allclose(reference.to_numpy(actual), expected, rtol=0, atol=slack)


def dense(operator: tn.MPO) -> np.ndarray:
    """Return the matrix without its padding."""
    rows, columns = operator.shape
    return reference.chain_matrix(operator.cores)[:rows, :columns]
