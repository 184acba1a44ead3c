"""From a configuration to a plan: which family and which bonds for every layer."""

import math
from dataclasses import replace

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from tensornet.budget import Budget
from tensornet.compression.config import CompressionConfig, family_options
from tensornet.compression.plan import CompressionPlan, LayerPlan
from tensornet.compression.targets import Target, find_targets
from tensornet.errors import BudgetError
from tensornet.svd import check_finite, working_dtype
from tensornet.topologies import Decomposition, topology_family


@torch.no_grad()
def plan(model: nn.Module, config: CompressionConfig, *, progress: bool = False) -> CompressionPlan:
    """Decide the form of every targeted layer; the model is not changed.

    Args:
        model: any module; targets are found by `find_targets`.
        config: what to compress and how far.
        progress: show a progress bar.

    Raises:
        TargetError: nothing matches.
        NonFiniteError: naming the layer that holds NaN or infinity.
        BudgetError: naming the layer that cannot meet the budget.
    """
    targets = find_targets(model, config)
    for target in targets:
        check_finite(target.matrix, f"Layer {target.name!r}")
    bar = tqdm(targets, desc="planning", disable=not progress, unit="layer")
    return CompressionPlan(tuple(plan_layer(target, config) for target in bar))


def plan_layer(target: Target, config: CompressionConfig) -> LayerPlan:
    """Plan one layer by the Frobenius error of its weight: the best family under the budget."""
    matrix = target.matrix
    dense_params = matrix.numel()
    spectrum = singular_values(matrix)
    best: Decomposition | None = None
    refusals = []
    for family in config.families:
        try:
            options = family_options(family, config)
            found = topology_family(family).decompose(matrix, config.budget, **options)
        except BudgetError as error:
            refusals.append(f"{family}: {error}")
            continue
        if best is None or _better(found, best, config.budget):
            best = found
    if best is None:
        raise BudgetError(f"Layer {target.name!r} cannot meet the budget. " + " ".join(refusals))
    dense = LayerPlan(
        target.name, (matrix.shape[0], matrix.shape[1]), None, "dense", 0.0, 0.0, tuple(spectrum.tolist())
    )
    if not config.budget.unlimited and best.network.num_params >= dense_params:
        return dense
    return replace(
        dense,
        topology=best.network.topology,
        bound_by=best.bound_by,
        error=best.error,
        baseline_error=low_rank_error(spectrum, dense.shape, best.network.num_params),
    )


def singular_values(matrix: Tensor) -> Tensor:
    """Singular values in descending order, in double precision, by the smaller Gram matrix."""
    work = matrix.to(working_dtype(matrix.dtype))
    if work.shape[0] > work.shape[1]:
        work = work.mH
    return torch.linalg.eigvalsh(work @ work.mH).flip(0).clamp_min(0).sqrt()


def low_rank_error(spectrum: Tensor, shape: tuple[int, int], params: int) -> float:
    """Relative error of the truncated SVD that has at most this many parameters (rank at least 1)."""
    rank = max(1, params // (shape[0] + shape[1]))
    energies = spectrum.square()
    total = float(energies.sum())
    return math.sqrt(float(energies[rank:].sum()) / total) if total > 0 else 0.0


def _better(new: Decomposition, old: Decomposition, budget: Budget) -> bool:
    """With an error promise the smaller network wins, with a size cap the more accurate one."""
    if budget.rel_error is not None:
        kept_new, kept_old = new.error <= budget.rel_error, old.error <= budget.rel_error
        if kept_new and kept_old:
            return new.network.num_params < old.network.num_params
        if kept_new != kept_old:
            return kept_new
    return new.error < old.error
