"""Compression of mixture models in which the experts of a stack may share a core.

A stack consists of one matrix, such as the up projection, of every expert in a mixture. The low-rank networks
of a stack may share a projection of the inputs, a basis of the outputs or a base matrix
(`shared_low_rank.py`). When the budget is allocated, a stack counts as one layer. Its candidates are the best
separate networks of every total size, and the shared networks of every rank and number format. Parameters or
bytes saved by sharing go to the layers where they lower the predicted loss most.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from tensornet.calibration.batches import BatchLike
from tensornet.calibration.stats import CalibrationStats
from tensornet.compression.allocate import (
    Candidate,
    choose_candidates,
    curve_of,
    hull_steps,
    lower_hull,
    uniform,
)
from tensornet.compression.apply import LayerCache, NewLayers, apply_plan
from tensornet.compression.candidates import find_candidates, layer_formats, relative_gap
from tensornet.compression.compress import gather
from tensornet.compression.config import CompressionConfig, check_config
from tensornet.compression.loss_increase import LossIncrease, measure, record_losses, warn_of_loss
from tensornet.compression.plan import CompressionPlan, LayerPlan, scheme_name
from tensornet.compression.report import model_size
from tensornet.compression.sensitivity import layer_sensitivity
from tensornet.compression.survey import Survey
from tensornet.compression.surveying import survey_model
from tensornet.compression.write import compress_blocks
from tensornet.errors import BudgetError, TargetError
from tensornet.linalg.weighted_svd import Weighting
from tensornet.nn.extension import ProvidedData
from tensornet.nn.linear import linear_from_stored
from tensornet.nn.storage import Storage
from tensornet.nn.targets import Target, check_model, find_targets
from tensornet.nn.unfuse import PartMatrix, unfused
from tensornet.topology import Topology
from tensornet_moe.shared_low_rank import PATTERNS, fit_stored, shared_candidates

#: Separate networks are chosen if shared ones lower the loss, or the size, by at most this fraction.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class SharedStack:
    """Report on a stack of experts whose networks share one core.

    Args:
        names: names of the experts' layers.
        pattern: `"in"`, `"out"` or `"base"`.
        topology: network of one expert.
        storage: number formats of the cores of this network.
        params_before, params_after: number of parameters of all experts; the shared core counts once.
        bytes_before, bytes_after: bytes of all experts; the shared core counts once.
        loss_increase: predicted loss increase, not yet corrected by measured losses.
        errors: measured relative Frobenius error of each expert.
    """

    names: tuple[str, ...]
    pattern: str
    topology: Topology
    storage: Storage
    params_before: int
    params_after: int
    bytes_before: int
    bytes_after: int
    loss_increase: float
    errors: tuple[float, ...]

    def __str__(self) -> str:
        return (
            f"{self.names[0]} and {len(self.names) - 1} more  shared {self.pattern}, "
            f"{scheme_name(self.topology, self.storage)}, "
            f"{self.bytes_before:,} -> {self.bytes_after:,} bytes, "
            f"errors {min(self.errors):.4f} to {max(self.errors):.4f}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Convert to a JSON-ready form."""
        return asdict(self) | {"topology": self.topology.to_dict(), "storage": self.storage.to_dict()}


@dataclass(frozen=True)
class ExpertsReport:
    """Result of `compress_experts`.

    Args:
        stacks: the stacks whose experts share a core.
        plan: plan of all other targeted weights, with their certified errors.
        model_params_before, model_params_after: number of parameters of the whole model.
        model_bytes_before, model_bytes_after: bytes of the whole model in memory.
        predicted_loss_increase: predicted increase of the loss per token, over all layers and stacks.
        seconds: wall time.
        measured: loss increase measured on a few rows of the calibration batches; None without batches.

    Example:
        >>> from tensornet_moe import ExpertsReport
        >>> report = ExpertsReport((), tn.CompressionPlan(()), 10, 10, 40, 20, 0.25, 1.0, None)
        >>> report.byte_ratio
        0.5
    """

    stacks: tuple[SharedStack, ...]
    plan: CompressionPlan
    model_params_before: int
    model_params_after: int
    model_bytes_before: int
    model_bytes_after: int
    predicted_loss_increase: float
    seconds: float
    measured: LossIncrease | None

    @property
    def layers(self) -> tuple[LayerPlan, ...]:
        """The layers of the plan."""
        return self.plan.layers

    @property
    def byte_ratio(self) -> float:
        """Bytes of the whole model after compression, relative to before."""
        return self.model_bytes_after / self.model_bytes_before

    @property
    def param_ratio(self) -> float:
        """Parameters of the targeted weights after compression, relative to before."""
        parts: tuple[SharedStack | LayerPlan, ...] = (*self.stacks, *self.layers)
        return sum(x.params_after for x in parts) / sum(x.params_before for x in parts)

    @property
    def bits_per_weight(self) -> float:
        """Mean number of bits per targeted weight after compression."""
        parts: tuple[SharedStack | LayerPlan, ...] = (*self.stacks, *self.layers)
        return 8 * sum(x.bytes_after for x in parts) / sum(x.params_before for x in parts)

    def __str__(self) -> str:
        measured = "" if self.measured is None else f", measured {self.measured}"
        return "\n".join(
            [
                *map(str, self.stacks),
                *([str(self.plan)] if len(self.plan) else []),
                f"predicted loss increase {self.predicted_loss_increase:.4f}{measured}",
                f"whole model: {self.model_bytes_before / 1e6:.2f} -> {self.model_bytes_after / 1e6:.2f} MB, "
                f"{self.model_params_before:,} -> {self.model_params_after:,} parameters, "
                f"{self.seconds:.1f} s",
            ]
        )

    def to_dict(self) -> dict[str, Any]:
        """Convert to a JSON-ready form, without the plan."""
        return {
            **{name: value for name, value in vars(self).items() if name not in ("plan", "stacks")},
            "stacks": [stack.to_dict() for stack in self.stacks],
            "layers": [layer.summary() for layer in self.layers],
            "byte_ratio": self.byte_ratio,
            "param_ratio": self.param_ratio,
            "bits_per_weight": self.bits_per_weight,
            "measured": None if self.measured is None else asdict(self.measured),
        }


@torch.inference_mode(False)  # parameters made in inference mode could not be trained
@torch.no_grad()
def compress_experts(
    model: nn.Module,
    config: CompressionConfig,
    *,
    calibration: Iterable[BatchLike] | ProvidedData | None = None,
    progress: bool = True,
) -> ExpertsReport:
    """Compress a model in place, as `tensornet.compress` does, but allow experts to share a core.

    A stack consists of one matrix of every expert in a mixture. It gets either separate networks or networks
    that share a core: a projection of the inputs, a basis of the outputs, or a base matrix. The option with
    the smallest predicted loss is chosen. One budget limits the stacks and all other layers together. The
    experts of a stack share nothing if calibration found no gradient for one of them.

    Args:
        model: a model with mixtures that store their experts as one parameter `(experts, out, in)`.
        config: the options, with a budget of parameters, bytes or predicted loss.
        calibration: batches of the model's arguments (see `tensornet.calibrate`).
        progress: show progress bars.

    Raises:
        TargetError: no targeted layer is an expert, or there are no batches.
        BudgetError: the budget cannot be met, or an option cannot be combined with sharing.

    Example:
        >>> import tensornet_hf  # adds support for the mixtures of transformers
        >>> from transformers import MixtralConfig, MixtralForCausalLM
        >>> sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
        >>> heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4}
        >>> model = MixtralForCausalLM(MixtralConfig(**sizes, **heads))
        >>> ids = torch.randint(32, (8, 32))
        >>> config = tn.CompressionConfig("*experts*", param_ratio=0.6)
        >>> batches = [{"input_ids": ids, "labels": ids}]
        >>> report = tm.compress_experts(model, config, calibration=batches, progress=False)
        >>> report.param_ratio <= 0.6
        True
    """
    start = time.perf_counter()
    check_model(model)
    _check_options(config)
    params_before, bytes_before = model_size(model)

    # Survey the model. In every block, also find the shared candidates of the stacks.
    data = gather(model, config, calibration)
    if not data.batches:
        raise TargetError(
            "compress_experts compares separate and shared networks by their predicted loss, which needs "
            "gradients: pass calibration=batches, or use tensornet.compress."
        )
    config = replace(config, objective="curvature", effort="thorough")
    with unfused(model):
        selected = [x for x in find_targets(model, config) if not x.skip]
    if not stacks_of(selected):
        raise TargetError(
            f"compress_experts found no stack of experts among the {len(selected)} targeted layers: nothing "
            "could share a core. Target the experts of a mixture that keeps them as one parameter of "
            "shape (experts, out, in), or use tensornet.compress."
        )
    found: list[tuple[tuple[str, ...], StackCandidates]] = []

    def find(
        targets: Sequence[Target], config: CompressionConfig, *, stats: CalibrationStats
    ) -> list[list[Candidate]]:
        found.extend(find_stacks(targets, stats, config))
        return list(find_candidates(targets, config, "curvature", stats))

    survey = survey_model(
        model, data.batches, config, loss_fn=data.loss_fn, source=data.source, find=find, progress=progress
    )

    # Choose among all candidates, and plan all layers.
    place = {layer.name: k for k, layer in enumerate(survey.layers)}
    stacks = [
        tuple(replace(x, members=tuple(place[name] for name in names)) for x in candidates)
        for names, candidates in sorted(found, key=lambda pair: place[pair[0][0]])
    ]
    chosen, bound_by = choose_jointly(survey, stacks)
    plan = survey.planned([choice if isinstance(choice, int) else 0 for choice in chosen], bound_by)
    sharing = {choice.members: choice for choice in chosen if isinstance(choice, SharedCandidate)}
    layers = list(plan.layers)
    for choice in sharing.values():
        for k in choice.members:
            layers[k] = replace(
                layers[k], topology=choice.candidate.topology, storage=choice.candidate.storage
            )
    plan = replace(plan, layers=tuple(layers))

    # Compress block by block, and replace all layers.
    before = record_losses(model, data.batches, source=data.source)
    schemes = {layer.name: (layer.name, layer.topology, layer.storage) for layer in plan}
    joint = {
        tuple(survey.layers[k].name for k in choice.members): partial(_fit, choice)
        for choice in sharing.values()
    }
    cache: LayerCache = {}
    for _, new in compress_blocks(
        model, plan, data.batches, factors=survey.factors, joint=joint, progress=progress
    ):
        cache |= {schemes[name]: made for name, made in new.items()}
    errors = apply_plan(model, plan, cache=cache)
    reports = [
        _report(choice, names, plan, errors) for names, choice in zip(joint, sharing.values(), strict=True)
    ]
    alone = [k for k, choice in enumerate(chosen) if isinstance(choice, int)]
    plan = replace(plan, layers=tuple(plan.layers[k] for k in alone))

    # Measure and report.
    params_after, bytes_after = model_size(model)
    predicted = totals_of(chosen, survey)[1]
    measured = None if before is None else measure(model, before)
    if measured is not None:
        warn_of_loss(measured, predicted, config.loss_increase)
    return ExpertsReport(
        stacks=tuple(reports),
        plan=plan.with_errors(errors),
        model_params_before=params_before,
        model_params_after=params_after,
        model_bytes_before=bytes_before,
        model_bytes_after=bytes_after,
        predicted_loss_increase=predicted,
        seconds=time.perf_counter() - start,
        measured=measured,
    )


def _check_options(config: CompressionConfig) -> None:
    """Raise BudgetError for options that cannot be combined with shared networks."""
    check_config(config)
    apart = {
        "max_bond": config.max_bond is not None,
        "rel_error": config.rel_error is not None,
        "topology": bool(config.fixed),
        "objective": config.objective not in ("auto", "curvature"),
    }
    if conflicts := [name for name, is_set in apart.items() if is_set]:
        raise BudgetError(
            "compress_experts chooses shared cores only by their size and predicted loss, in the number "
            f"formats of formats=: drop {', '.join(conflicts)}, or use tensornet.compress."
        )


# --- stacks and their candidates ------------------------------------------------------------------


@dataclass(frozen=True)
class SharedCandidate:
    """Candidate for a whole stack, in which the networks of all experts share one core.

    Args:
        members: indices of the experts in the list of targets.
        pattern: a key of `tensornet_moe.shared_low_rank.PATTERNS`.
        candidate: topology and number formats of one expert, with the size and predicted loss of the stack.
    """

    members: tuple[int, ...]
    pattern: str
    candidate: Candidate


#: Shared candidates of one stack; not empty.
StackCandidates = tuple[SharedCandidate, ...]


def stacks_of(targets: Sequence[Target]) -> list[list[int]]:
    """Group targeted experts into stacks, as lists of indices of the targets."""
    stacks: dict[tuple[object, ...], list[int]] = {}
    for place, target in enumerate(targets):
        owner, number, matrix = ["", "", *target.name.rsplit(".", 2)][-3:]
        if len(target.names) == 1 and isinstance(target.modules[0], PartMatrix) and number.isdigit():
            kind = (matrix, target.matrix.shape, target.matrix.dtype)
            stacks.setdefault((owner, *kind), []).append(place)
    return [members for members in stacks.values() if len(members) > 1]


def find_stacks(
    targets: Sequence[Target], stats: CalibrationStats, config: CompressionConfig
) -> list[tuple[tuple[str, ...], StackCandidates]]:
    """Predict the losses of all ways to share a core in each stack of experts.

    Args:
        targets: the targeted weights of a block.
        stats: statistics with gradients.
        config: options of the compression.

    Returns:
        The names of the experts of each stack, and the candidates of the stack.
    """
    found = []
    for members in stacks_of(targets):
        group = [targets[k] for k in members]
        known = [layer_sensitivity(target, "curvature", stats, config.damping) for target in group]
        weights = [sensitivity for sensitivity in known if sensitivity is not None]
        if len(weights) < len(group):  # without a gradient of every expert, the stack shares nothing
            continue
        matrices = [target.matrix for target in group]
        per_token = experts_per_token([target.names[0] for target in group], stats)
        formats = layer_formats(matrices, weights, config)
        pairs = [
            (pattern, candidate)
            for pattern in PATTERNS
            for candidate in shared_candidates(pattern, matrices, weights, formats, per_token=per_token)
        ]
        if not pairs:
            continue
        # Only candidates on the lower convex hull of cost over bytes, or over parameters, can be chosen.
        costs = [candidate.cost for _, candidate in pairs]
        by_bytes = lower_hull([candidate.num_bytes for _, candidate in pairs], costs)
        by_params = lower_hull([candidate.params for _, candidate in pairs], costs)
        best = [pairs[k] for k in sorted({*by_bytes, *by_params})]
        names = tuple(target.name for target in group)
        found.append((names, tuple(SharedCandidate(tuple(members), *pair) for pair in best)))
    return found


def experts_per_token(names: Sequence[str], stats: CalibrationStats) -> float:
    """Return the mean number of these experts that process a calibration token; at least 1.

    Args:
        names: names of the experts of one layer.
        stats: calibration statistics; if they have no token counts, two experts per token are assumed.
    """
    known = {name: stats.counts[name] for name in names if name in stats.counts}
    if not known:
        return float(min(2, len(names)))
    tokens = max(stats.tokens, stats.scored, 1)  # `stats.tokens` is too small if only experts were observed
    return max(1.0, sum(known.values()) / tokens)


# --- one allocation over separate and shared networks ---------------------------------------------

#: For each target, the index of the chosen candidate, or the shared networks chosen for its stack.
Choice = list[int | SharedCandidate]


def choose_jointly(survey: Survey, stacks: Sequence[StackCandidates]) -> tuple[Choice, str]:
    """Choose candidates for layers and stacks within one budget, and return which limit was reached first.

    A first allocation has shared and separate candidates for every stack, and finds the stacks that should
    share cores. Then the budget is allocated again in finer steps: exactly these stacks share cores, and
    every other layer is chosen on its own. Two more allocations are tried: in one, no stack shares cores, in
    the other, every stack does. The best of all these allocations is returned.

    Args:
        survey: the candidates of every layer.
        stacks: the stacks with their shared candidates.

    Raises:
        BudgetError: the budget cannot be met.
    """
    found: list[tuple[float, Choice, str]] = []
    refused: list[BudgetError] = []
    sizes = ("param_ratio", "bits_per_weight", "byte_ratio", "max_bytes")
    least_size = all(getattr(survey.config, name) is None for name in sizes)  # only the loss is limited

    def attempt(some: Sequence[StackCandidates], *, or_separate: bool = False) -> list[StackCandidates]:
        """Allocate the budget once, and return the stacks of `some` that share a core in the result."""
        try:
            made, bound_by = choose_sharing(survey, some, or_separate=or_separate)
        except BudgetError as error:
            refused.append(error)
            return []
        size, loss = totals_of(made, survey)
        found.append((size if least_size else loss, made, bound_by))
        sharing = {each.members for each in made if isinstance(each, SharedCandidate)}
        return [stack for stack in some if stack[0].members in sharing]

    attempt(())
    if stacks:
        attempt(stacks)
        attempt(attempt(stacks, or_separate=True))
    if not found:
        raise refused[0]
    least = min(measure for measure, _, _ in found)
    return next(each[1:] for each in found if each[0] <= least * (1 + _ROUNDING))


def choose_sharing(
    survey: Survey, stacks: Sequence[StackCandidates], *, or_separate: bool = False
) -> tuple[Choice, str]:
    """Choose shared networks for the given stacks, and a candidate for every other layer.

    Args:
        survey: the candidates of every layer.
        stacks: the stacks with their shared candidates.
        or_separate: whether a stack may also get separate networks for all its experts.

    Raises:
        BudgetError: the budget cannot be met.
    """
    layers = survey.layers
    inside = {place for stack in stacks for place in stack[0].members}
    single = [place for place in range(len(layers)) if place not in inside]
    options = [_options(stack, survey, or_separate=or_separate) for stack in stacks]
    chosen, bound_by = choose_candidates(
        layers,
        [*(layers[place].candidates for place in single), *([each for each, _ in some] for some in options)],
        survey.config,
        "curvature",
        untargeted=survey.untargeted,
        names=[layers[place].name for place in (*single, *(stack[0].members[0] for stack in stacks))],
    )
    made: Choice = [0] * len(layers)
    for place, index in zip(single, chosen, strict=False):
        made[place] = index
    for stack, some, index in zip(stacks, options, chosen[len(single) :], strict=True):
        meant = some[index][1]
        for k, place in enumerate(stack[0].members):
            made[place] = meant if isinstance(meant, SharedCandidate) else meant[k]
    return made, bound_by


def totals_of(chosen: Choice, survey: Survey) -> tuple[float, float]:
    """Compute the size of a choice, in the unit of the budget, and its predicted loss increase."""
    parts = [
        survey.layers[place].candidates[choice] if isinstance(choice, int) else choice.candidate
        for place, choice in enumerate(chosen)
        if isinstance(choice, int) or choice.members[0] == place
    ]
    return sum(getattr(x, _unit(survey)) for x in parts), sum(x.predicted_loss for x in parts)


def _unit(survey: Survey) -> str:
    return "num_bytes" if survey.config.formats else "params"


def _options(
    stack: StackCandidates, survey: Survey, *, or_separate: bool
) -> list[tuple[Candidate, tuple[int, ...] | SharedCandidate]]:
    """List the ways to store a stack, as pairs of a total and what it consists of.

    The total is a candidate with the summed sizes and losses of the experts. It consists of the index of a
    candidate for each expert, or of a shared candidate.
    """
    members = [survey.layers[place].candidates for place in stack[0].members]
    found: list[tuple[Candidate, tuple[int, ...] | SharedCandidate]] = []

    def together(chosen: Sequence[int], number_format: str = "") -> Candidate:
        parts = [each[k] for each, k in zip(members, chosen, strict=True)]
        return Candidate(
            None,
            Storage(),
            num_bytes=sum(x.num_bytes for x in parts),
            params=sum(x.params for x in parts),
            predicted_loss=sum(x.predicted_loss for x in parts),
            error=0.0,
            cost=sum(x.cost for x in parts),
            number_format=number_format,
            tensors=sum(x.tensors for x in parts),
        )

    if or_separate:
        # Walking along the experts' convex hulls gives one set of separate networks for each total size.
        start, steps = hull_steps([curve_of(each, _unit(survey)) for each in members])
        at, total = list(start), together(start)
        found.append((total, tuple(at)))
        for member, index, _ in steps:
            old, new = members[member][at[member]], members[member][index]
            total = replace(
                total,
                num_bytes=total.num_bytes + new.num_bytes - old.num_bytes,
                params=total.params + new.params - old.params,
                predicted_loss=total.predicted_loss + new.predicted_loss - old.predicted_loss,
                cost=total.cost + new.cost - old.cost,
                tensors=total.tensors + new.tensors - old.tensors,
            )
            at[member] = index
            found.append((total, tuple(at)))
        uniforms = [uniform(each) for each in members]
        for name in (name for name in uniforms[0] if all(name in each for each in uniforms)):
            chosen = tuple(each[name] for each in uniforms)
            found.append((together(chosen, name), chosen))
    return [*found, *((each.candidate, each) for each in stack)]


# --- shared networks in the model -----------------------------------------------------------------


def _fit(
    choice: SharedCandidate, targets: Sequence[Target], weightings: Sequence[Weighting]
) -> list[NewLayers]:
    """Fit networks that share a core to a stack; return the new layer and the error of each expert."""
    topology, storage = choice.candidate.topology, choice.candidate.storage
    assert topology is not None
    rank = max(topology.bond_dims.values())
    # The walk over the blocks may compute in float32, also where the model has 16 bits.
    stored = fit_stored(choice.pattern, [x.matrix for x in targets], weightings, rank, storage)
    made: list[NewLayers] = []
    for target, tensors in zip(targets, stored, strict=True):
        (part,), (kind,) = target.modules, target.kinds
        layer = linear_from_stored(topology, tensors, source=kind.name, storage=storage, like=target.matrix)
        assert isinstance(part, PartMatrix)
        layer.bias = part.bias
        made.append(([layer], relative_gap(target.matrix, layer.to_matrix())))
    return made


def _report(
    choice: SharedCandidate, names: tuple[str, ...], plan: CompressionPlan, errors: Mapping[str, float]
) -> SharedStack:
    """Report on a compressed stack."""
    layers = [plan[name] for name in names]
    assert choice.candidate.topology is not None
    return SharedStack(
        names=names,
        pattern=choice.pattern,
        topology=choice.candidate.topology,
        storage=choice.candidate.storage,
        params_before=sum(x.params_before for x in layers),
        params_after=choice.candidate.params,
        bytes_before=sum(x.bytes_before for x in layers),
        bytes_after=choice.candidate.num_bytes,
        loss_increase=choice.candidate.predicted_loss,
        errors=tuple(errors[name] for name in names),
    )
