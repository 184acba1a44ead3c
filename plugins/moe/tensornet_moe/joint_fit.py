"""Fitting given, different expert matrices by shared and private cores: alternating least squares.

The model `W_e ~ network(shared, private_e)` is linear in each core. One sweep solves for every core in turn;
each solve is a few steps of conjugate gradients on the least-squares problem (CGLS), which needs only the
contraction and its transpose. Environments are never formed, any topology works, no step raises the error.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tensornet.budget import Budget
from tensornet.errors import BudgetError, ShapeError, TopologyError
from tensornet.linalg.svd import check_finite, frobenius, safe_scale, working_dtype
from tensornet.network import random_cores
from tensornet.topologies import topology_family, topology_names
from tensornet.topology import Topology
from tensornet_moe.stacked import StackPlan, build_matrices, plan_stack

#: CGLS steps for one core in one sweep. More make a sweep dearer and save few sweeps.
_INNER_STEPS = 8
#: A gradient this small, relative to the one of the zero core, counts as zero.
_SOLVED = 1e-12
#: Sweeps after which the better of the starts is continued and the others are given up.
_TRIAL_SWEEPS = 3


@dataclass(frozen=True)
class JointFit:
    """Cores found for a stack of matrices.

    Args:
        topologies: one for each expert; they differ only where the fit fell back on separate experts.
        shared: names of the shared cores, empty after falling back.
        cores: shared cores by name, private ones `(E, *shape)`, or a list where the bonds differ.
        error: relative Frobenius error over all experts, `|W - W'| / |W|`, measured.
        alone_error: error of decomposing each expert alone at the same total number of parameters, the best
            of the same family and plain low rank; None if neither fits that budget.
        fell_back: whether `alone_error` was smaller, so that the separate decompositions are returned.
        sweeps: sweeps of alternating least squares.
        converged: whether the error settled before the sweep limit.
    """

    topologies: tuple[Topology, ...]
    shared: tuple[str, ...]
    cores: Mapping[str, Tensor | list[Tensor]]
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


@dataclass(frozen=True)
class SharedFit:
    """Shared and private cores found by alternating least squares.

    Args:
        cores: shared cores by name, private ones `(E, *shape)`.
        error: relative Frobenius error over the whole stack, measured.
        sweeps: sweeps of alternating least squares.
        converged: whether the error settled before the sweep limit.
    """

    cores: Mapping[str, Tensor]
    error: float
    sweeps: int
    converged: bool

    def __repr__(self) -> str:
        return (
            f"SharedFit(cores={', '.join(self.cores)}, error={self.error:.3g}, sweeps={self.sweeps}, "
            f"converged={self.converged})"
        )


@torch.no_grad()
def fit_jointly(
    weights: Tensor,
    topology: Topology,
    shared: tuple[str, ...],
    *,
    max_sweeps: int = 30,
    tolerance: float = 1e-4,
) -> JointFit:
    """Fit `weights: (E, out, in)` by shared and private cores, or by separate ones where that is better.

    Args:
        weights: given experts.
        topology: the operator of one expert.
        shared: names of shared cores.
        max_sweeps: limit of alternating least squares.
        tolerance: see `fit_shared`.

    Raises:
        ShapeError: `weights` is not a stack of matrices of the topology's shape.
        NonFiniteError: NaN or infinity in `weights`.
    """
    fit = fit_shared(weights, topology, shared, max_sweeps=max_sweeps, tolerance=tolerance)
    budget = sum(core.numel() for core in fit.cores.values())
    alone = _alone(weights.detach().to(working_dtype(weights.dtype)), topology, budget)
    how: dict[str, Any] = {
        "alone_error": None if alone is None else alone.error,
        "sweeps": fit.sweeps,
        "converged": fit.converged,
    }
    if alone is not None and alone.error < fit.error:
        return JointFit(alone.topologies, (), alone.cores, alone.error, fell_back=True, **how)
    return JointFit((topology,) * len(weights), shared, fit.cores, fit.error, fell_back=False, **how)


@torch.no_grad()
def fit_shared(
    weights: Tensor,
    topology: Topology,
    shared: tuple[str, ...],
    *,
    max_sweeps: int = 30,
    tolerance: float = 1e-4,
) -> SharedFit:
    """Fit `weights: (E, out, in)` by shared and private cores.

    Two starts are tried for a few sweeps, and the better continues: the decomposition of the mean expert
    (right where experts grew from one matrix), and each expert's own with the shared cores averaged. The
    problem is not convex: for unrelated experts the result is a local minimum.

    Args:
        weights: given matrices.
        topology: the operator of one of them.
        shared: names of shared cores.
        max_sweeps: limit of alternating least squares.
        tolerance: stop when a sweep lowers the relative error by less than this share of it.

    Raises:
        ShapeError: `weights` is not a stack of matrices of the topology's shape.
        NonFiniteError: NaN or infinity in `weights`.
    """
    if weights.ndim != 3 or tuple(weights.shape[1:]) != topology.shape or len(weights) == 0:
        raise ShapeError(
            f"Expected weights of shape (num_experts, {topology.out_features}, {topology.in_features}) for "
            f"this topology, got {tuple(weights.shape)}."
        )
    check_finite(weights, "The stack of expert matrices")
    scale = safe_scale(weights)  # squares of what is fitted neither overflow nor vanish
    target = weights.detach().to(working_dtype(weights.dtype)) / scale
    plan = plan_stack(topology, shared, len(target))
    starts = list(_starts(target, topology, shared))
    for _ in range(_TRIAL_SWEEPS):
        starts = [_sweep(plan, start, target) for start in starts]
    errors = [_error(plan, start, target) for start in starts]
    best = min(range(len(starts)), key=errors.__getitem__)
    cores, error, sweeps, converged = starts[best], errors[best], _TRIAL_SWEEPS, False
    while sweeps < max_sweeps and not converged:
        cores = _sweep(plan, cores, target)
        before, error = error, _error(plan, cores, target)
        sweeps += 1
        converged = before - error <= tolerance * before
    share = scale ** (1 / len(cores))  # every core takes an equal part of the scale
    return SharedFit({name: core * share for name, core in cores.items()}, error, sweeps, converged)


def least_squares(
    plan: StackPlan, cores: Mapping[str, Tensor], name: str, target: Tensor, steps: int
) -> Tensor:
    """Improve one core by CGLS on `|target - network|^2`, starting from its present value.

    A private core is a separate problem for each expert and gets its own step sizes.

    Args:
        plan: the stack.
        cores: all cores by name.
        name: the core to solve for.
        target: matrices, shape `(E, out, in)`.
        steps: conjugate gradient steps.

    Reference:
        Björck 1996, "Numerical Methods for Least Squares Problems", section 7.4.
    """

    def apply(core: Tensor) -> Tensor:
        return build_matrices(plan, {**cores, name: core}, len(target))

    # The network is linear in this core, so one recorded graph gives the transpose for every residual.
    with torch.enable_grad():
        probe = torch.zeros_like(cores[name], requires_grad=True)
        output = apply(probe)

    def transpose(residual: Tensor) -> Tensor:
        return torch.autograd.grad(output, probe, residual, retain_graph=True)[0]

    def energy(x: Tensor) -> Tensor:
        """Squared norm: of everything for a shared core, for each expert `(E, 1, ...)` for a private one."""
        if name in plan.shared:
            return x.square().sum()
        return x.square().flatten(1).sum(1).reshape(-1, *[1] * (x.ndim - 1))

    def fit(scale: Tensor, like: Tensor) -> Tensor:
        return scale if scale.ndim == 0 else scale.reshape(-1, *[1] * (like.ndim - 1))

    x = cores[name].clone()
    residual = target - apply(x)
    gradient = transpose(residual)
    direction, strength = gradient, energy(gradient)
    # Below this the gradient is rounding, and so would be a step along it: solved, move no more.
    floor = (_SOLVED**2 * energy(transpose(target))).clamp_min(torch.finfo(x.dtype).tiny)
    for _ in range(steps):
        image = apply(direction)
        length = energy(image).reshape(strength.shape).clamp_min(torch.finfo(x.dtype).tiny)
        step = torch.where(strength > floor, strength / length, 0)
        x = x + step * direction
        residual = residual - fit(step, residual) * image
        gradient = transpose(residual)
        before, strength = strength, energy(gradient)
        direction = gradient + torch.where(before > floor, strength / before, 0) * direction
    return x


def _sweep(plan: StackPlan, cores: Mapping[str, Tensor], target: Tensor) -> dict[str, Tensor]:
    cores = dict(cores)
    for name in plan.topology.core_names:
        cores[name] = least_squares(plan, cores, name, target, _INNER_STEPS)
    return cores


def _error(plan: StackPlan, cores: Mapping[str, Tensor], target: Tensor) -> float:
    return stack_error(target, build_matrices(plan, cores, len(target)))


def stack_error(target: Tensor, made: Tensor) -> float:
    """Measure the relative Frobenius error over a whole stack, at any scale of its elements.

    Example:
        >>> stack_error(torch.ones(2, 3, 3) * 1e-30, torch.zeros(2, 3, 3))
        1.0
    """
    scale = safe_scale(target)
    work = target.to(working_dtype(target.dtype)) / scale
    total = frobenius(work)
    return frobenius(work - made.to(work) / scale) / total if total > 0 else 0.0


def _starts(target: Tensor, topology: Topology, shared: Sequence[str]) -> list[dict[str, Tensor]]:
    count, names = len(target), topology.core_names

    def combine(experts: list[Sequence[Tensor]]) -> dict[str, Tensor]:
        stacks = [torch.stack([cores[k] for cores in experts]).to(target) for k in range(len(names))]
        return {n: s.mean(0) if n in shared else s for n, s in zip(names, stacks, strict=True)}

    if topology.family not in topology_names():  # a hand-made topology has no decomposition to start from
        generator = torch.Generator().manual_seed(0)
        return [combine([random_cores(topology, generator=generator) for _ in range(count)])]
    family = topology_family(topology.family)
    mean = family.decompose_to(target.mean(0), topology).network.cores
    each = [family.decompose_to(matrix, topology).network.cores for matrix in target]
    return [combine([mean] * count), combine(list(each))]


@dataclass(frozen=True)
class _Alone:
    topologies: tuple[Topology, ...]
    cores: Mapping[str, list[Tensor]]
    error: float


def _alone(target: Tensor, topology: Topology, parameters: int) -> _Alone | None:
    """The best separate decompositions that use at most `parameters` elements in all."""
    count, rows, columns = target.shape
    budget = Budget(param_ratio=parameters / (count * rows * columns))
    dims = {"out_dims": topology.out_dims, "in_dims": topology.in_dims}
    results = []
    for name in sorted({topology.family, "low_rank"} & set(topology_names())):
        options = {} if name == "low_rank" else dims
        try:
            networks = [topology_family(name).decompose(m, budget, **options).network for m in target]
        except (BudgetError, TopologyError):  # does not fit, or takes no dims: no rival
            continue
        error = stack_error(target, torch.stack([network.to_matrix() for network in networks]))
        cores = {
            core: [network.cores[k] for network in networks]
            for k, core in enumerate(networks[0].topology.core_names)
        }
        results.append(_Alone(tuple(network.topology for network in networks), cores, error))
    return min(results, key=lambda result: result.error, default=None)
