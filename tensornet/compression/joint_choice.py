"""One allocation over separate networks and shared cores: which stacks share, and the size of every layer.

A stack of experts is one item of the allocation. Its candidates are the best separate networks of every
total size, in the order in which steps along their hulls pay, and the shared forms of every rank in every
encoding; a choice takes one of them, so that the two exclude each other. What a stack that shares saves goes
to the layers for which it lowers the predicted loss most.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tensornet.compression.allocate import hull_steps
from tensornet.compression.candidates import LayerCandidates
from tensornet.compression.choose import Allocation, choose_candidates
from tensornet.compression.config import CompressionConfig
from tensornet.compression.shared_stacks import SharedChoice, Stack
from tensornet.errors import BudgetError
from tensornet.nn.encoding import Storage
from tensornet.topology import Topology

#: Values of candidates that add over the members of a stack.
_VALUES = ("params", "num_bytes", "costs", "forecasts")
#: Kinds of candidates of a stack.
SEPARATE, SHARED = "separate", "shared"
#: Separate networks stay where sharing saves no more of the loss than rounding errors are.
_ROUNDING = 1e-9

#: Index of a candidate of each target, or the shared form of its stack.
Choice = list[int | SharedChoice]


@dataclass(frozen=True)
class _Item:
    """Candidates of one stack as a whole, and the meaning of each.

    Args:
        stack: of the item.
        candidates: of the stack: separate networks along the path, one format for all, shared forms.
        start: candidate of each member at the start of the path.
        steps: `(member, candidate)` of each step of the path.
        formats: candidate of each member, for each number format that all of them have.
        shared: forms and ranks.
    """

    stack: Stack
    candidates: LayerCandidates
    start: tuple[int, ...]
    steps: tuple[tuple[int, int], ...]
    formats: tuple[tuple[int, ...], ...]
    shared: tuple[SharedChoice, ...]

    def meaning(self, index: int) -> tuple[int, ...] | SharedChoice:
        """Return the candidate of each member, or the shared form."""
        points = len(self.steps) + 1 if self.start else 0
        if index >= points + len(self.formats):
            return self.shared[index - points - len(self.formats)]
        if index >= points:
            return self.formats[index - points]
        chosen = list(self.start)
        for member, candidate in self.steps[:index]:
            chosen[member] = candidate
        return tuple(chosen)


def choose_jointly(given: Allocation, stacks: Sequence[Stack]) -> tuple[Choice, str]:
    """Choose candidates of single layers and forms of stacks in one budget, and name the tightest cap.

    To explain how this works: with both kinds of candidates one allocation finds which stacks share. Then the
    budget is spent again, with these stacks shared and all others as single layers, which is finer. No stack
    shared, and all of them, are tried as well, so that the joint choice never predicts a higher loss than the
    better of both.

    Raises:
        BudgetError: the budget cannot be kept.
    """
    found: list[tuple[float, Choice, str]] = []
    refused: list[BudgetError] = []

    def attempt(some: Sequence[Stack], kinds: Sequence[str]) -> Sequence[Stack]:
        try:
            made, bound_by = choose_kinds(given, some, kinds)
        except BudgetError as error:
            refused.append(error)
            return ()
        size, cost = totals(made, given)
        found.append((size if _saves_size(given.config) else cost, made, bound_by))
        return [each.stack for each in made if isinstance(each, SharedChoice)]

    attempt((), ())
    if stacks:
        attempt(stacks, (SHARED,))
        sharing = attempt(stacks, (SEPARATE, SHARED))
        attempt([stack for stack in stacks if any(stack is each for each in sharing)], (SHARED,))
    if not found:
        raise refused[0]
    least = min(measure for measure, _, _ in found)
    return next(each[1:] for each in found if each[0] <= least * (1 + _ROUNDING))


def choose_kinds(given: Allocation, stacks: Sequence[Stack], kinds: Sequence[str]) -> tuple[Choice, str]:
    """Choose with the given kinds of candidates for some stacks, and the layers of others alone.

    Raises:
        BudgetError: the budget cannot be kept.
    """
    targets, candidates = given.targets, given.candidates
    items = [_item(stack, given, kinds) for stack in stacks]
    inside = {place for stack in stacks for place in stack.members}
    single = [place for place in range(len(targets)) if place not in inside]
    together = [*(candidates[place] for place in single), *(item.candidates for item in items)]
    names = [targets[place].name for place in (*single, *(item.stack.members[0] for item in items))]
    chosen, bound_by = choose_candidates(replace(given, candidates=together), names)
    made: Choice = [0] * len(targets)
    for place, index in zip(single, chosen, strict=False):
        made[place] = index
    for item, index in zip(items, chosen[len(single) :], strict=True):
        meant = item.meaning(index)
        for k, place in enumerate(item.stack.members):
            made[place] = meant if isinstance(meant, SharedChoice) else meant[k]
    return made, bound_by


def totals(chosen: Choice, given: Allocation) -> tuple[float, float]:
    """Compute the size of a choice in the allocation's unit, and its predicted loss increase."""
    candidates, size, cost = given.candidates, 0.0, 0.0
    for place, choice in enumerate(chosen):
        if isinstance(choice, int):
            size += float(getattr(candidates[place], given.unit)[choice])
            cost += float(candidates[place].forecasts[choice])
        elif choice.stack.members[0] == place:
            sizes = choice.curve.num_bytes if given.unit == "num_bytes" else choice.curve.numbers
            size += float(sizes[choice.index])
            cost += float(choice.curve.forecasts[:, choice.index].sum())
    return size, cost


def _item(stack: Stack, given: Allocation, kinds: Sequence[str]) -> _Item:
    """Build the candidates of one stack."""
    members = [given.candidates[place] for place in stack.members]
    tables = [torch.stack([getattr(found, name) for name in _VALUES]) for found in members]
    start: Sequence[int] = ()
    steps: Sequence[tuple[int, int]] = ()
    formats: dict[str, tuple[int, ...]] = {}
    points: list[Tensor] = []  # shape: (values, points) each
    if SEPARATE in kinds:
        start, steps = hull_steps([found.curve(given.unit) for found in members])
        points.append(_path(tables, start, steps))
        common = [name for name in members[0].uniform if all(name in found.uniform for found in members)]
        formats = {name: tuple(found.uniform[name] for found in members) for name in common}
        points += [
            torch.stack([table[:, k] for table, k in zip(tables, chosen, strict=True)]).sum(0)[:, None]
            for chosen in formats.values()
        ]
    shared = []
    if SHARED in kinds:
        for curve in stack.curves:
            shared += [SharedChoice(stack, curve, index) for index in range(len(curve.numbers))]
            values = (curve.numbers, curve.num_bytes, curve.costs.sum(0), curve.forecasts.sum(0))
            points.append(torch.stack(values))
    found = dict(zip(_VALUES, torch.cat(points, dim=1), strict=True))
    nothing = torch.zeros_like(found["params"])
    places = {name: len(steps) + 1 + k for k, name in enumerate(formats)}
    made = LayerCandidates(**found, errors=nothing, milliseconds=nothing, make=_whole, uniform=places)
    return _Item(stack, made, tuple(start), tuple(steps), tuple(formats.values()), tuple(shared))


def _path(tables: Sequence[Tensor], start: Sequence[int], steps: Sequence[tuple[int, int]]) -> Tensor:
    """Sum the values of all members at the start and after each step, shape `(values, steps + 1)`."""
    at = list(start)
    changes = [torch.stack([table[:, k] for table, k in zip(tables, at, strict=True)]).sum(0)]
    for member, candidate in steps:
        changes.append(tables[member][:, candidate] - tables[member][:, at[member]])
        at[member] = candidate
    return torch.stack(changes, dim=1).cumsum(1)


def _whole(index: int) -> tuple[Topology | None, Storage]:
    """Stand in for the topology of a candidate that is several layers; never asked for."""
    raise AssertionError(f"candidate {index} of a stack is no single layer")


def _saves_size(config: CompressionConfig) -> bool:
    """Return True if the loss is given and the size is to be least."""
    sizes = ("param_ratio", "bits_per_weight", "byte_ratio", "max_bytes")
    return all(getattr(config, name) is None for name in sizes)
