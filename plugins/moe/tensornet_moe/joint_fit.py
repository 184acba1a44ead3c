"""Joint fit of several expert matrices by networks with shared and private cores.

The model `W_e ~ network(shared, private_e)` is one network with an additional leg that numbers the experts.
Private cores have this leg, shared cores do not. So `tensornet.als` can fit the model like any other network.
For low-rank networks that share one factor, a closed form is used (`shared_low_rank.py`).
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tensornet.als import Fit, fit_network
from tensornet.budget import Budget
from tensornet.errors import BudgetError, ShapeError, TopologyError
from tensornet.linalg.svd import check_finite, frobenius, safe_scale, working_dtype
from tensornet.linalg.tt_svd import pad_matrix
from tensornet.linalg.weighted_svd import Weighting
from tensornet.network import TensorNetwork, random_cores
from tensornet.topologies import TopologyFamily, topology_family, topology_names
from tensornet.topologies.low_rank import LowRankFamily
from tensornet.topology import CoreSpec, Topology
from tensornet_moe.shared_low_rank import fit_low_rank, pattern_of

#: Label of the leg that numbers the experts.
EXPERTS = "expert"
#: Conjugate gradient steps per core and sweep. Without padding and with small bonds, the first step is exact.
_STEPS = 2
#: Sweeps stop when one sweep lowers the relative error by less than this fraction of its value.
_TOLERANCE = 1e-4
#: Number of trial sweeps from each of two sets of initial cores; only the better fit is then continued.
_TRIAL_SWEEPS = 3


@dataclass(frozen=True)
class JointFit:
    """Cores fitted to a stack of expert matrices, with the errors of joint and separate decompositions.

    Args:
        topologies: topology of each expert; they differ only if separate decompositions were better.
        shared: names of the shared cores; empty if `fell_back`.
        cores: cores by name; private cores are `(E, *shape)`, or a list if the bonds differ.
        error: measured relative Frobenius error over all experts, `|W - W'| / |W|`.
        alone_error: error of separate decompositions with at most the same total number of parameters. They
            use the same family or low-rank factors, whichever is better; None if neither fits that budget.
        fell_back: True if `alone_error` was smaller, so that the separate decompositions are returned.
        sweeps: number of sweeps of alternating least squares.
        converged: whether the error converged within `max_sweeps`.
    """

    topologies: tuple[Topology, ...]
    shared: tuple[str, ...]
    cores: Mapping[str, Any]
    error: float
    alone_error: float | None
    fell_back: bool
    sweeps: int
    converged: bool

    def __repr__(self) -> str:
        alone = "None" if self.alone_error is None else f"{self.alone_error:.3g}"
        return (
            f"JointFit({len(self.topologies)} experts, shared={self.shared}, error={self.error:.3g}, "
            f"alone_error={alone}, fell_back={self.fell_back}, sweeps={self.sweeps}, "
            f"converged={self.converged})"
        )


@torch.no_grad()
def fit_jointly(
    weights: Tensor, topology: Topology, shared: tuple[str, ...], *, max_sweeps: int = 30
) -> JointFit:
    """Fit networks with shared cores to the experts, or separate networks of that size if they fit better.

    Args:
        weights: the matrices of the experts, shape `(E, out, in)`.
        topology: topology of the matrix of one expert.
        shared: names of shared cores.
        max_sweeps: largest number of sweeps of alternating least squares.

    Raises:
        ShapeError: `weights` is not a stack of matrices of the topology's shape.
        NonFiniteError: NaN or infinity in `weights`.
    """
    fit = fit_shared(weights, topology, shared, max_sweeps=max_sweeps)
    target = weights.detach().to(working_dtype(weights.dtype))
    alone = _alone(target, topology, sum(core.numel() for core in fit.cores.values()))
    if alone is None:
        return fit
    error = _error_of(target, alone)
    if error >= fit.error:
        return replace(fit, alone_error=error)
    columns = zip(*(network.cores for network in alone), strict=True)
    return replace(
        fit,
        topologies=tuple(network.topology for network in alone),
        shared=(),
        cores=dict(zip(alone[0].topology.core_names, map(list, columns), strict=True)),
        error=error,
        alone_error=error,
        fell_back=True,
    )


@torch.no_grad()
def fit_shared(
    weights: Tensor, topology: Topology, shared: tuple[str, ...], *, max_sweeps: int = 30
) -> JointFit:
    """Fit networks with shared cores to the experts.

    Arguments and exceptions are those of `fit_jointly`. For low-rank networks that share one factor, the fit
    is optimal. For all other networks, a few sweeps of alternating least squares start from two sets of
    initial cores, and the better fit is continued. The first set is the decomposition of the mean expert,
    which suits experts that were copied from one matrix. The second set consists of separate decompositions
    of all experts, with their shared cores averaged. (Topologies without a family start from random cores.)
    The problem is not convex: for unrelated experts, the result is a local minimum.
    """
    if weights.ndim != 3 or tuple(weights.shape[1:]) != topology.shape or len(weights) == 0:
        raise ShapeError(
            f"Expected weights of shape (num_experts, {topology.out_features}, {topology.in_features}) for "
            f"this topology, got {tuple(weights.shape)}."
        )
    check_finite(weights, "The stack of expert matrices")
    scale = safe_scale(weights)  # so that squares neither overflow nor underflow
    target = weights.detach().to(working_dtype(weights.dtype)) / scale
    names, sweeps, converged = topology.core_names, 0, True
    pattern = pattern_of(topology, shared[0]) if len(shared) == 1 and not target.is_complex() else None
    if pattern is not None:
        cores, error = _closed_form(pattern, target, topology, shared[0])
    else:
        # The matrices of all experts, stacked vertically, are one network with one more out-leg.
        # If no core is private, all experts get the best network for their mean.
        fitted = target if len(shared) < len(names) else target.mean(0, keepdim=True)
        whole = _stacked_topology(topology, shared, len(fitted))
        (rows, columns), padding = topology.padded_shape, Weighting()
        matrix = pad_matrix(fitted, rows, columns).reshape(-1, columns)
        if (rows, columns) != topology.shape:
            near, far = (torch.zeros(n).to(fitted) for n in (rows, columns))
            near[: topology.out_features] = far[: topology.in_features] = 1
            padding = Weighting(near.repeat(len(fitted)), far)

        def sweep(start: TensorNetwork, count: int, tolerance: float) -> Fit:
            return fit_network(matrix, start, padding, sweeps=count, steps=_STEPS, tolerance=tolerance)

        starts = [_stacked_network(whole, start, matrix) for start in _starts(fitted, topology)]
        best = min((sweep(start, _TRIAL_SWEEPS, 0.0) for start in starts), key=lambda fit: fit.cost)
        # The fit minimizes the squared error, whose relative change is twice that of the error.
        rest = sweep(best.network, max(max_sweeps - _TRIAL_SWEEPS, 0), 2 * _TOLERANCE)
        made = rest.network.to_matrix().reshape(len(fitted), rows, columns)
        made = made[:, : topology.out_features, : topology.in_features]
        error = stack_error(target, made.expand_as(target))
        cores = dict(zip(names, rest.network.cores, strict=True))
        sweeps, converged = best.sweeps + rest.sweeps, rest.converged
    part = scale ** (1 / len(names))  # the scale is spread evenly over the cores
    return JointFit(
        topologies=(topology,) * len(target),
        shared=shared,
        cores={name: core * part for name, core in cores.items()},
        error=error,
        alone_error=None,
        fell_back=False,
        sweeps=sweeps,
        converged=converged,
    )


def _closed_form(
    pattern: str, target: Tensor, topology: Topology, shared: str
) -> tuple[dict[str, Tensor], float]:
    """Fit low-rank networks that share one factor; scale both factors to equal norms at each bond index."""
    rank = max(topology.bond_dims.values())
    fits = fit_low_rank(pattern, list(target), [Weighting()] * len(target), rank)
    # The cores are tensors, since no number format is given.
    left, right = (torch.stack([cores[x] for cores in fits]) for x in topology.core_names)  # type: ignore[misc]
    error = stack_error(target, left @ right)
    sizes = left.square().sum(1).mean(0).sqrt(), right.square().sum(2).mean(0).sqrt()
    gauge = (sizes[1] / sizes[0].clamp_min(1e-300)).sqrt()
    gauge = torch.where(gauge > 0, gauge, torch.ones_like(gauge))
    parts = dict(zip(topology.core_names, (left * gauge, right / gauge[:, None]), strict=True))
    shapes = topology.core_shapes
    cores = {name: part.reshape(len(target), *shapes[name]) for name, part in parts.items()}
    return {**cores, shared: cores[shared][0]}, error


def _stacked_topology(topology: Topology, shared: Sequence[str], count: int) -> Topology:
    """Build the topology of all matrices stacked vertically; private cores get the leg `EXPERTS`."""
    outs, sizes = topology.out_labels, topology.sizes
    if len(shared) < len(topology.cores):
        outs, sizes = (EXPERTS, *outs), ((EXPERTS, count), *sizes)
    cores = tuple(
        core if core.name in shared else CoreSpec(core.name, (EXPERTS, *core.labels))
        for core in topology.cores
    )
    rows, columns = topology.padded_shape
    return Topology("", cores, sizes, outs, topology.in_labels, count * rows, columns)


def _stacked_network(whole: Topology, networks: Sequence[TensorNetwork], like: Tensor) -> TensorNetwork:
    """Average the shared cores of several networks, and stack their private cores."""
    stacks = [torch.stack(cores) for cores in zip(*(x.cores for x in networks), strict=True)]
    cores = [
        stack if EXPERTS in spec.labels else stack.mean(0)
        for spec, stack in zip(whole.cores, stacks, strict=True)
    ]
    return TensorNetwork(whole, [core.to(like) for core in cores])


def stack_error(target: Tensor, made: Tensor) -> float:
    """Compute the relative Frobenius error of a whole stack of matrices, without overflow or underflow."""
    scale = safe_scale(target)
    work = target.to(working_dtype(target.dtype)) / scale
    total = frobenius(work)
    return frobenius(work - made.to(work) / scale) / total if total > 0 else 0.0


def _starts(target: Tensor, topology: Topology) -> list[list[TensorNetwork]]:
    """List the sets of initial networks for `fit_shared`; each set has one network for every expert."""
    if topology.family in topology_names():
        decompose = topology_family(topology.family).decompose_to
        mean = decompose(target.mean(0), topology).network
        return [[mean] * len(target), [decompose(x, topology).network for x in target]]
    generator = torch.Generator().manual_seed(0)  # without a family, start from random cores
    return [[TensorNetwork(topology, random_cores(topology, generator=generator)) for _ in target]]


def _alone(target: Tensor, topology: Topology, parameters: int) -> list[TensorNetwork] | None:
    """Find the best separate decompositions with at most `parameters` elements in total, or None."""
    count, rows, columns = target.shape
    budget = Budget(param_ratio=parameters / (count * rows * columns))
    rivals: list[tuple[TopologyFamily, dict[str, Any]]] = [(LowRankFamily(), {})]
    if topology.family in topology_names():
        family = topology_family(topology.family)
        rivals.append((family, family.options_of(topology)))
    found = []
    for family, options in rivals:
        with suppress(BudgetError, TopologyError):  # the family cannot fit the budget
            found.append([family.decompose(matrix, budget, **options).network for matrix in target])
    return min(found, key=lambda networks: _error_of(target, networks), default=None)


def _error_of(target: Tensor, networks: Sequence[TensorNetwork]) -> float:
    return stack_error(target, torch.stack([network.to_matrix() for network in networks]))
