"""Choice between separate networks and networks that share a core, for stacks of weights.

A stack is a group of weights of one shape, such as the up projections of all experts of a mixture. Its
networks may share one core, for example a projection of the inputs, which is then stored once. When a budget
is allocated, a stack that shares a core counts as one layer, so that what sharing saves goes to the layers
where it lowers the predicted loss most. An extension finds the candidates and fits the networks (see
`ModelExtension.shared_candidates`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from tensornet.compression.allocate import (
    SUMMED,
    Candidate,
    SurveyedLayer,
    choose_candidates,
    curve_of,
    hull_steps,
    joined,
    uniform,
)
from tensornet.compression.config import BYTE_BUDGETS, CompressionConfig
from tensornet.errors import BudgetError, TargetError
from tensornet.nn.storage import PLAIN
from tensornet.nn.targets import Target

#: Separate networks are chosen if shared ones lower the loss, or the size, by at most this fraction.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class SharedCandidate:
    """One way to store all weights of a stack, in which their networks share a core.

    Args:
        names: names of the weights; the first of them stores the core.
        core: name of the shared core.
        candidate: topology and number formats of the network of each weight, with the size and the predicted
            loss of the whole stack.
    """

    names: tuple[str, ...]
    core: str
    candidate: Candidate


class Choice(NamedTuple):
    """The choice for every layer of a plan in which stacks may share cores.

    Args:
        chosen: index of the candidate of each layer that shares no core; 0 for all others.
        shared: the candidates of the stacks that share a core.
        bound_by: name of the tightest budget.
    """

    chosen: list[int]
    shared: list[SharedCandidate]
    bound_by: str


def candidates_of(
    stacks: Mapping[tuple[str, ...], Sequence[SharedCandidate]], targets: Sequence[Target]
) -> tuple[SharedCandidate, ...]:
    """List the candidates of all stacks that were found among the targets.

    Raises:
        TargetError: there is no stack.
    """
    if not stacks:
        raise TargetError(
            f"share_experts found no stack of experts among the {len(targets)} targeted layers, so nothing "
            "could share a core. Target the experts of a mixture that keeps them as one parameter of shape "
            "(experts, out, in), after importing tensornet_hf for those of transformers; or leave it out."
        )
    return tuple(x for candidates in stacks.values() for x in candidates)


def choose_shared(
    layers: Sequence[SurveyedLayer],
    shared: Sequence[SharedCandidate],
    config: CompressionConfig,
    untargeted: tuple[int, int, int],
) -> Choice:
    """Choose candidates for layers and stacks within one budget.

    A first allocation has shared and separate candidates for every stack, and finds the stacks that should
    share cores. Then the budget is allocated again in finer steps: exactly these stacks share cores, and
    every other layer is chosen on its own. Two more allocations are tried: in one, no stack shares cores, in
    the other, every stack does. The best of all these allocations is returned.

    Args:
        layers: the weights and their separate candidates.
        shared: the shared candidates of all stacks.
        config: the configuration.
        untargeted: see `choose_candidates`.

    Raises:
        BudgetError: the budget cannot be met.
    """
    stacks: dict[tuple[str, ...], list[SharedCandidate]] = {}
    for x in shared:
        stacks.setdefault(x.names, []).append(x)
    found: list[tuple[float, Choice]] = []
    refused: list[BudgetError] = []

    def attempt(
        some: Sequence[Sequence[SharedCandidate]], *, or_separate: bool = False
    ) -> list[Sequence[SharedCandidate]]:
        """Allocate the budget once, and return the stacks of `some` that share a core in the result."""
        try:
            made = allocate(layers, some, config, untargeted, or_separate=or_separate)
        except BudgetError as error:
            refused.append(error)
            return []
        found.append((_measure(layers, made, config), made))
        sharing = {x.names for x in made.shared}
        return [stack for stack in some if stack[0].names in sharing]

    every = list(stacks.values())
    attempt(())
    if every:
        attempt(every)
        attempt(attempt(every, or_separate=True))
    if not found:
        raise refused[0]
    least = min(measure for measure, _ in found)
    return next(made for measure, made in found if measure <= least * (1 + _ROUNDING))


def allocate(
    layers: Sequence[SurveyedLayer],
    stacks: Sequence[Sequence[SharedCandidate]],
    config: CompressionConfig,
    untargeted: tuple[int, int, int],
    *,
    or_separate: bool,
) -> Choice:
    """Choose a shared candidate for each of the stacks, and a candidate for every other layer.

    Args:
        layers, config, untargeted: see `choose_shared`.
        stacks: the shared candidates of each stack.
        or_separate: whether a stack may also get separate networks for all its weights.

    Raises:
        BudgetError: the budget cannot be met.
    """
    place = {layer.name: k for k, layer in enumerate(layers)}
    inside = {place[name] for stack in stacks for name in stack[0].names}
    single = [k for k in range(len(layers)) if k not in inside]
    unit = _unit(config)
    options = [
        _options([layers[place[name]] for name in stack[0].names], stack, unit, or_separate=or_separate)
        for stack in stacks
    ]
    totals = [[total for total, _ in some] for some in options]
    found, bound_by = choose_candidates(
        layers,
        [*(layers[k].candidates for k in single), *totals],
        config,
        "curvature",
        untargeted=untargeted,
        names=[*(layers[k].name for k in single), *(stack[0].names[0] for stack in stacks)],
    )
    made = Choice([0] * len(layers), [], bound_by)
    for k, index in zip(single, found, strict=False):
        made.chosen[k] = index
    for stack, some, index in zip(stacks, options, found[len(single) :], strict=True):
        meant = some[index][1]
        if isinstance(meant, SharedCandidate):
            made.shared.append(meant)
        else:
            for name, separate in zip(stack[0].names, meant, strict=True):
                made.chosen[place[name]] = separate
    return made


def _measure(layers: Sequence[SurveyedLayer], made: Choice, config: CompressionConfig) -> float:
    """Compute the number by which choices are compared: the loss, or the size if only the loss is limited."""
    sharing = {name for x in made.shared for name in x.names}
    alone = [
        layer.candidates[index]
        for layer, index in zip(layers, made.chosen, strict=True)
        if layer.name not in sharing
    ]
    limited = any(getattr(config, name) is not None for name in ("param_ratio", *BYTE_BUDGETS))
    what = "predicted_loss" if limited else _unit(config)
    return sum(getattr(x, what) for x in (*alone, *(x.candidate for x in made.shared)))


def _options(
    layers: Sequence[SurveyedLayer], stack: Sequence[SharedCandidate], unit: str, *, or_separate: bool
) -> list[tuple[Candidate, tuple[int, ...] | SharedCandidate]]:
    """List the ways to store a stack, as pairs of a total and what it consists of.

    The total is a candidate with the summed sizes and losses of the weights. It consists of the index of
    a candidate for each weight, or of a shared candidate.
    """
    members = [layer.candidates for layer in layers]
    found: list[tuple[Candidate, tuple[int, ...] | SharedCandidate]] = []
    if or_separate:
        # Walking along the convex hulls gives one set of separate networks for each total size.
        start, steps = hull_steps([curve_of(each, unit) for each in members])
        at, total = list(start), _together(members, start)
        found.append((total, tuple(at)))
        for member, index, _ in steps:
            old, new = members[member][at[member]], members[member][index]
            changed = {x: getattr(total, x) + getattr(new, x) - getattr(old, x) for x in SUMMED}
            total = replace(total, **changed)
            at[member] = index
            found.append((total, tuple(at)))
        uniforms = [uniform(each) for each in members]
        for name in (name for name in uniforms[0] if all(name in each for each in uniforms)):
            chosen = tuple(each[name] for each in uniforms)
            found.append((_together(members, chosen, name), chosen))
    return [*found, *((x.candidate, x) for x in stack)]


def _unit(config: CompressionConfig) -> str:
    return "num_bytes" if config.formats else "params"


def _together(
    members: Sequence[Sequence[Candidate]], chosen: Sequence[int], number_format: str = ""
) -> Candidate:
    """Add up the chosen candidates of several weights, whose networks may differ."""
    parts = [each[k] for each, k in zip(members, chosen, strict=True)]
    return joined(parts, topology=None, storage=PLAIN, error=0.0, number_format=number_format)
