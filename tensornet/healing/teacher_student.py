"""Paired runs of a compressed model and its dense teacher, one group of layers after another."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tensornet.calibration.batches import Batch, run_model
from tensornet.calibration.blockwise import ChainRun, Stop, find_chains
from tensornet.calibration.calibrate import mirrored, upper_gram
from tensornet.calibration.masks import token_mask

NEVER_REACHED = "the data never reached it"


@dataclass
class PairedMoments:
    """Sums over tokens of `x x^T`, `x x'^T` and `x' x'^T`, with dense inputs x and compressed inputs x'."""

    dense: Tensor
    mixed: Tensor
    real: Tensor
    tokens: int = 0

    @classmethod
    def zeros(cls, like: Tensor) -> "PairedMoments":
        """Create empty sums for inputs of this width."""
        width = like.shape[-1]
        dense, mixed, real = (like.new_zeros(width, width) for _ in range(3))
        return cls(dense, mixed, real)

    def add(self, dense: Tensor, real: Tensor) -> None:
        """Add the inputs of both models, shape `(tokens, in)` each."""
        # The step is a difference of two moments: rounded to 16 bits, it would be noise.
        with torch.autocast(real.device.type, enabled=False):
            self.dense += upper_gram(dense)
            self.mixed += dense.T @ real
            self.real += upper_gram(real)
        self.tokens += len(real)

    def mirrored(self) -> "PairedMoments":
        """Return the sums with both symmetric ones whole; until then `add` fills their upper halves."""
        return PairedMoments(mirrored(self.dense), self.mixed, mirrored(self.real), self.tokens)


@dataclass(frozen=True)
class Group:
    """Layers that read the same tensor, and the chain and block in which they lie, if any."""

    names: tuple[str, ...]
    place: tuple[str, int] | None


@dataclass
class PairedRun:
    """Runs of both models on the same batches, block by block where they are chains.

    Args:
        model: compressed; its layers may change between two calls of `moments`.
        teacher: dense.
        batches: keyword arguments of the models.
    """

    model: nn.Module
    teacher: nn.Module
    batches: Sequence[Batch]
    chains: dict[str, tuple[str, ...]] = field(init=False)
    at: tuple[str, ChainRun, ChainRun] | None = None

    def __post_init__(self) -> None:
        both = [find_chains(x, self.batches[0]) for x in (self.model, self.teacher)]
        self.chains = {name: blocks for name, blocks in both[0].items() if both[1].get(name) == blocks}

    def groups(self, names: Sequence[str]) -> list[Group]:
        """List groups of layers in execution order; neighbours that read the same tensor form a group."""
        seen: list[tuple[str, Tensor]] = []  # the tensors are kept, so that no other takes their address

        def hook(name: str) -> Callable[[Tensor], None]:
            def note(x: Tensor) -> None:
                if all(name != other for other, _ in seen):
                    seen.append((name, x))

            return note

        with _hooked({self.model.get_submodule(name): hook(name) for name in names}):
            run_model(self.model, self.batches[0])
        groups: list[Group] = []
        for index, (name, x) in enumerate(seen):
            place = self._place(name)
            if index and seen[index - 1][1] is x and groups[-1].place == place:
                groups[-1] = Group((*groups[-1].names, name), place)
            else:
                groups.append(Group((name,), place))
        return groups

    def moments(self, group: Group) -> PairedMoments | str:
        """Compute the moments of the inputs of a group, or return the reason why they are unknown."""
        first = group.names[0]
        total: PairedMoments | None = None
        for number, batch in enumerate(self.batches):
            dense, real = (self._input(side, first, group.place, number, batch) for side in (1, 0))
            if len(dense) != len(real):
                return f"{len(dense)} tokens reached it in the dense model, {len(real)} in the compressed one"
            if len(real):
                total = total or PairedMoments.zeros(real)
                total.add(dense, real)
        return NEVER_REACHED if total is None else total.mirrored()

    def _input(
        self, side: int, name: str, place: tuple[str, int] | None, number: int, batch: Batch
    ) -> Tensor:
        """Record the inputs of a layer of one model (0: compressed, 1: dense), shape `(tokens, in)`."""
        found: list[Tensor] = []
        model = (self.model, self.teacher)[side]

        def keep(x: Tensor) -> None:
            mask = token_mask(batch, x.shape[:-1])
            found.append((x.reshape(-1, x.shape[-1]) if mask is None else x[mask]).float())
            if place is not None:  # a block is run no further than needed
                raise Stop

        at = None if place is None else self._chain(*place)[side]  # runs blocks, so before anything is hooked
        with _hooked({model.get_submodule(name): keep}), suppress(Stop):
            run_model(model, batch) if at is None else at.run(number)
        return torch.cat(found) if found else torch.empty(0, 0)

    def _chain(self, chain: str, index: int) -> tuple[ChainRun, ChainRun]:
        """Advance both models to a block and return their runs."""
        if self.at is None or self.at[0] != chain:
            runs = [ChainRun(x, self.chains[chain], self.batches) for x in (self.model, self.teacher)]
            for run in runs:
                run.enter()
            self.at = (chain, runs[0], runs[1])
        for run in self.at[1:]:
            while run.position < index:
                run.advance()
        return self.at[1], self.at[2]

    def _place(self, name: str) -> tuple[str, int] | None:
        """Find the chain and block in which a layer lies, or None."""
        for chain, blocks in self.chains.items():
            for index, block in enumerate(blocks):
                if name == block or name.startswith(f"{block}."):
                    return chain, index
        return None


@contextmanager
def _hooked(hooks: Mapping[nn.Module, Callable[[Tensor], None]]) -> Iterator[None]:
    """Call a function with the inputs of each module inside the block."""

    def before(function: Callable[[Tensor], None]) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            (x,) = (*args, *kwargs.values())  # some models name the only argument
            function(x)

        return hook

    handles = [
        module.register_forward_pre_hook(before(function), with_kwargs=True)
        for module, function in hooks.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
