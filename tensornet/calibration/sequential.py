"""Models as chains of blocks: each block reads the hidden state that the one before it has left.

Whoever keeps hidden states can go through a model one block at a time, at the price of one forward pass,
where running the whole model for every block would cost as many passes as there are blocks. What is a chain
is not told by names of architectures: the model is run once and the tensors are watched.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tensornet.calibration.batches import Batch, run_model


class Stop(Exception):
    """Ends a forward pass of which nothing more is wanted."""


@dataclass(frozen=True)
class Call:
    """What a block is called with, and where among that its hidden state stands.

    Args:
        args, kwargs: of the call, None in place of the hidden state.
        slot: index among `args`, or name among `kwargs`.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    slot: int | str

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The hidden state that the block makes of this one."""
        if isinstance(self.slot, str):
            return hidden_of(block(*self.args, **{**self.kwargs, self.slot: hidden}))
        args = (*self.args[: self.slot], hidden, *self.args[self.slot + 1 :])
        return hidden_of(block(*args, **self.kwargs))


def hidden_of(output: Any) -> Tensor:
    """The hidden state among what a block returns: the output itself, or the first of a tuple.

    Raises:
        TypeError: it is something else.
    """
    first = output[0] if isinstance(output, tuple) and output else output
    if not isinstance(first, Tensor):
        raise TypeError(
            f"a block returned {type(output).__name__}, not a tensor or a tuple that begins with one"
        )
    return first


@torch.no_grad()
def find_chains(model: nn.Module, batch: Batch) -> dict[str, tuple[str, ...]]:
    """Stacks of modules that are chains, by name, each as the names of its blocks.

    Candidates are the outermost `nn.ModuleList` and `nn.Sequential` of at least two modules; a chain is one
    whose modules run once each, in order, each on the very tensor that the one before it has returned.

    Args:
        model: in eval mode.
        batch: keyword arguments of the model; it is run once.
    """
    stacks = _stacks(model)
    made: dict[str, list[Tensor | None]] = {stack: [] for stack in stacks}
    broken: set[str] = set()

    def before(stack: str, index: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            last = made[stack][-1] if made[stack] else None
            slot = _slot(args, kwargs, last if index else None)
            if len(made[stack]) != index or slot is None:
                broken.add(stack)

        return hook

    def after(stack: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            try:
                made[stack].append(hidden_of(output))
            except TypeError:
                broken.add(stack)
                made[stack].append(None)

        return hook

    handles = []
    for stack, blocks in stacks.items():
        for index, name in enumerate(blocks):
            block = model.get_submodule(name)
            handles.append(block.register_forward_pre_hook(before(stack, index), with_kwargs=True))
            handles.append(block.register_forward_hook(after(stack)))
    try:
        run_model(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return {
        stack: blocks
        for stack, blocks in stacks.items()
        if stack not in broken and len(made[stack]) == len(blocks)
    }


@dataclass
class ChainRun:
    """A chain that is gone through block by block, for several batches at once.

    Args:
        model: that the chain is part of.
        names: its blocks.
        batches: keyword arguments of the model.
        position: block that `hidden` is the input of.
        hidden: by batch.
        calls: by batch and block.
    """

    model: nn.Module
    names: Sequence[str]
    batches: Sequence[Batch]
    position: int = 0
    hidden: list[Tensor] = field(default_factory=list)
    calls: list[list[Call]] = field(default_factory=list)

    @torch.no_grad()
    def enter(self) -> None:
        """Run the model up to the last block, to learn what all blocks are called with."""
        for batch in self.batches:
            calls: list[Call] = []
            last: list[Tensor] = []
            with self._watched(calls, last), suppress(Stop):
                run_model(self.model, batch)
            self.calls.append(calls)

    @torch.no_grad()
    def run(self, number: int) -> Tensor:
        """The output of the block at `position` for one batch."""
        block = self.model.get_submodule(self.names[self.position])
        return self.calls[number][self.position].run(block, self.hidden[number])

    def advance(self) -> None:
        """Go on to the next block."""
        self.hidden = [self.run(number) for number in range(len(self.batches))]
        self.position += 1

    @contextmanager
    def _watched(self, calls: list[Call], last: list[Tensor]) -> Iterator[None]:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            slot = _slot(args, kwargs, last[0] if last else None)
            assert slot is not None, "find_chains saw this block read what the one before it returned"
            if not last:
                self.hidden.append(kwargs[slot] if isinstance(slot, str) else args[slot])
            calls.append(_call(args, kwargs, slot))
            if len(calls) == len(self.names):
                raise Stop

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            last[:] = [hidden_of(output)]

        handles = []
        for name in self.names:
            block = self.model.get_submodule(name)
            handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(block.register_forward_hook(after))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _stacks(model: nn.Module) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for name, module in model.named_modules():
        inside = any(outer == "" or name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 1 and not inside:
            found[name] = tuple(f"{name}.{key}".lstrip(".") for key in module._modules)
    return found


def _slot(args: tuple[Any, ...], kwargs: Mapping[str, Any], wanted: Tensor | None) -> int | str | None:
    """Where a tensor stands among arguments; the first tensor if it does not matter which."""
    places: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    for key, value in places:
        if isinstance(value, Tensor) if wanted is None else value is wanted:
            return key
    return None


def _call(args: tuple[Any, ...], kwargs: Mapping[str, Any], slot: int | str) -> Call:
    return Call(
        tuple(None if key == slot else value for key, value in enumerate(args)),
        {key: None if key == slot else value for key, value in kwargs.items()},
        slot,
    )
