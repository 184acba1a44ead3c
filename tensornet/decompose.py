"""Decompose a matrix into a network of any topology, in one call."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tensornet._util import check_dense, outside_autocast, refuse_transforms
from tensornet.als import fit_from_random
from tensornet.budget import Budget
from tensornet.errors import ShapeError, TopologyError
from tensornet.linalg.svd import check_finite, frobenius, result_dtype, safe_scale, scaled_back, working_dtype
from tensornet.network import TensorNetwork
from tensornet.topologies import Decomposition, TopologyFamily, topology_family, topology_names
from tensornet.topologies.factored import balance_norms
from tensornet.topology import Topology


@torch.no_grad()
@outside_autocast
def decompose(
    matrix: Tensor,
    topology: Topology | TopologyFamily | str,
    *,
    max_bond: int | Sequence[int] | None = None,
    rel_error: float | None = None,
    param_ratio: float | None = None,
    **options: Any,
) -> Decomposition:
    """Decompose a matrix into a network of any topology (not differentiable).

    Each registered family has its own algorithm. Any other topology is fitted by alternating least squares
    from random starts with a fixed seed. The result is then a local minimum, and its error is measured.

    Args:
        matrix: the matrix, shape `(out_features, in_features)`, real or complex.
        topology: a `Topology`, a registered family, or the name of a family. A `Topology` fixes all dims and
            bonds; a family chooses them within the limits below.
        max_bond: limit for all bonds, or a sequence with a limit for each bond; for families only.
        rel_error: largest relative Frobenius error; for families only.
        param_ratio: largest number of parameters, as a fraction of the dense matrix; for families only.
        options: options of the family, for example `out_dims=`, `in_dims=`, `sites=`; for families only.

    Returns:
        The network and its certificate.

    Raises:
        BudgetError: a limit is out of range, or the smallest network of the family exceeds it, or an error of
            `rel_error` is not possible within the other limits.
        NonFiniteError: the matrix contains NaN or infinity.
        ShapeError: the matrix is not a dense tensor of floating-point or complex numbers, or its shape is not
            that of the topology.
        TopologyError: the name or an option is unknown, or limits or options are given together with a
            `Topology`.

    Example:
        >>> found = tn.decompose(torch.eye(6), tn.topologies.kronecker(out_dims=(2, 3), in_dims=(2, 3)))
        >>> found.network.to_matrix().allclose(torch.eye(6), atol=1e-6)
        True
        >>> tn.decompose(torch.ones(8, 8), "mpo", rel_error=0.01).network.num_params
        12
    """
    budget = Budget(max_bond=max_bond, rel_error=rel_error, param_ratio=param_ratio)
    if isinstance(matrix, Tensor):
        refuse_transforms(matrix, "decompose")
    if not isinstance(topology, Topology):
        return topology_family(topology).decompose(matrix, budget, **options)
    if not budget.unlimited or options:
        raise TopologyError(
            "A topology fixes all dims and bonds: drop max_bond, rel_error, param_ratio and "
            f"{', '.join(options) or 'family options'}, or give the name of a family instead."
        )
    if topology.family in topology_names():
        return topology_family(topology.family).decompose_to(matrix, topology)
    check_dense(matrix, "decompose", "a matrix of shape (out, in)", 2)
    if tuple(matrix.shape) != topology.shape:
        raise ShapeError(
            f"The topology is for matrices of shape {topology.shape}, got {tuple(matrix.shape)}."
        )
    check_finite(matrix, "The matrix")
    scale, dtype = safe_scale(matrix), result_dtype(matrix.dtype)
    work = matrix.to(working_dtype(matrix.dtype)) / scale
    found = fit_from_random(work, topology)
    cores = balance_norms(found.network.cores)
    kept = TensorNetwork(topology, [core.to(dtype) for core in cores])
    total, residual = frobenius(work), frobenius(work - kept.to(work.dtype).to_matrix())
    factor = scale ** (1 / len(cores))  # distribute the scale evenly over the cores
    return Decomposition(
        TensorNetwork(topology, [scaled_back(core, factor, dtype) for core in cores]),
        residual / total if total > 0 else 0.0,
        "max_bond",
        iterations=found.sweeps,
        converged=found.converged,
    )
