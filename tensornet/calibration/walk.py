"""Walk over a model block by block; each block reads the hidden state that the previous block returned.

Hidden states between blocks are stored, so a walk over all blocks costs one pass, not one pass per block, and
only the weights of one block must be in memory. Chains of blocks are found by running the model once and
comparing the tensors that its modules receive and return. A model without such a chain is one block.
"""

import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves  # no public function walks over nested tuples and dicts
from tqdm.auto import tqdm

from tensornet._util import memory_held
from tensornet.calibration.batches import Batch, Stop, run_model, small_batch
from tensornet.calibration.calibrate import fast_dtype, large_matrices
from tensornet.calibration.moment_sums import has_bfloat16
from tensornet.errors import TargetError
from tensornet.nn.extension import extensions
from tensornet.nn.targets import Target


@dataclass(frozen=True)
class Call:
    """Arguments of one call of a block, and the position of the hidden state among them.

    Args:
        args, kwargs: arguments of the call.
        slot: position of the hidden state, an index in `args` or a name in `kwargs`.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    slot: int | str

    @property
    def hidden(self) -> Tensor:
        """Hidden state among the arguments."""
        found: Tensor = self.kwargs[self.slot] if isinstance(self.slot, str) else self.args[self.slot]
        return found

    def with_hidden(self, hidden: Tensor | None) -> "Call":
        """Return a copy of the call with another hidden state."""
        if isinstance(self.slot, str):
            return replace(self, kwargs={**self.kwargs, self.slot: hidden})
        return replace(self, args=(*self.args[: self.slot], hidden, *self.args[self.slot + 1 :]))

    def with_slot(self, slot: int | str) -> "Call":
        """Return a copy whose hidden state is the argument at `slot`; return `self` if no tensor is there."""
        places = dict([*enumerate(self.args), *self.kwargs.items()])
        return replace(self, slot=slot) if isinstance(places.get(slot), Tensor) else self

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """Run a block on `hidden` and the other arguments of this call, and return the new hidden state."""
        call = self.with_hidden(hidden)
        return hidden_of(block(*call.args, **call.kwargs))


def hidden_of(output: Any) -> Tensor:
    """Return the hidden state in the output of a block: the output itself, or the first item of a tuple.

    Raises:
        TypeError: the output is neither a tensor nor a tuple that begins with a tensor.
    """
    first = output[0] if isinstance(output, tuple) and output else output
    if not isinstance(first, Tensor):
        raise TypeError(
            f"a block returned {type(output).__name__}, not a tensor or a tuple that begins with a tensor"
        )
    return first


@torch.no_grad()
def find_chains(model: nn.Module, batch: Batch) -> dict[str, tuple[str, ...]]:
    """Find the containers in a model whose modules run as a chain of blocks.

    Candidates are the outermost `nn.ModuleList` and `nn.Sequential` with at least two modules. In a chain,
    every module runs once, in order, on the same tensor object that the previous module returned.

    Args:
        model: the model, in eval mode; it is run once.
        batch: keyword arguments of the model.

    Returns:
        The names of the blocks of each chain, by the name of the container.
    """
    stacks = outer_stacks(model)
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


class Loaded(Protocol):
    """Function that returns a context in which the weights of modules are in memory."""

    def __call__(
        self, modules: Iterable[nn.Module], *, dtype: torch.dtype | None = torch.float32
    ) -> AbstractContextManager[Any]:
        """Return the context.

        Args:
            modules: the modules, without their children.
            dtype: dtype of floating-point weights; None keeps the stored dtypes.
        """


def in_memory(
    modules: Iterable[nn.Module], *, dtype: torch.dtype | None = torch.float32
) -> AbstractContextManager[None]:
    """Return the `Loaded` context of a model whose weights are in memory: nothing is loaded."""
    return nullcontext()


@dataclass
class Walk:
    """Run the blocks of a chain one after the other; each block runs on all batches before the next one.

    Args:
        model: the model that contains the chain.
        names: names of the blocks; empty if the model is one block.
        batches: keyword arguments of the model for each batch.
        states: mapping in which `states[k, n]` is the hidden state of batch `n` before block `k`. Another
            mapping than a dict may store the tensors on disk.
        loaded: context in which the weights of given modules are in memory.
        position: index of the next block to run.
        calls: `calls[n][k]` is the call of block `k` on batch `n`, without its hidden state.
        losses: the losses of the tokens of each batch, as far as they were computed.
    """

    model: nn.Module
    names: Sequence[str]
    batches: Sequence[Batch]
    states: Any = field(default_factory=dict)
    loaded: Loaded = in_memory
    position: int = 0
    calls: list[list[Call]] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    _first: list[Any] = field(default_factory=list)  # output of the first block, by batch

    @property
    def block(self) -> nn.Module:
        """Block at `position`."""
        return self.model.get_submodule(self.names[self.position])

    @property
    def ends(self) -> list[nn.Module]:
        """Modules outside of the blocks, such as embeddings and the head."""
        inside = {id(x) for name in self.names for x in self.model.get_submodule(name).modules()}
        return [x for x in self.model.modules() if id(x) not in inside]

    @property
    def hidden(self) -> list[Tensor]:
        """Hidden states that the block at `position` reads, by batch."""
        return [self.states[self.position, number] for number in range(len(self.batches))]

    @torch.no_grad()
    def enter(self, *, skip: bool = False) -> None:
        """Run the model up to its last block on all batches, to record the arguments of all blocks.

        Args:
            skip: whether to run only the first block, and to use its output as the output of all blocks. This
                is for models too large to be run as a whole. Arguments that depend on the other blocks are
                then not recorded.

        Raises:
            TargetError: a block does not read the hidden state that the previous block returned.
        """
        for number, batch in enumerate(self.batches if self.names else ()):
            calls: list[Call] = []
            outputs: list[Any] = []
            step = partial(self._note, calls, outputs, skip)
            with replaced_blocks(self.model, self.names, step), suppress(Stop):
                run_model(self.model, batch)
            if len(calls) > 1:  # the slot of the first block is a guess, that of the second block is known
                calls[0] = calls[0].with_slot(calls[1].slot)
            self.states[0, number] = calls[0].hidden.clone()
            self.calls.append([call.with_hidden(None) for call in calls])
            self._first.append(outputs[0])

    def follow(self, other: "Walk") -> None:
        """Take the arguments of all blocks from another walk over the same blocks and batches."""
        self.calls, self._first = other.calls, other._first

    def run(self, number: int, hidden: Tensor | None = None) -> Tensor:
        """Run the block at `position` on one batch, and return the new hidden state without storing it.

        Args:
            number: index of the batch.
            hidden: hidden state that the block reads; by default, the stored one.
        """
        hidden = self.states[self.position, number] if hidden is None else hidden
        for extension in extensions():
            extension.next_batch(self.block, self.batches[number])
        # The block may change its input in place, but not the stored hidden state.
        return self.calls[number][self.position].run(self.block, hidden.clone())

    @torch.no_grad()
    def advance(self, *, keep: bool = False) -> None:
        """Run the block at `position` on all batches, store the hidden states, and advance to the next block.

        Args:
            keep: whether to keep the hidden states that the block read.
        """
        for number in range(len(self.batches)):
            self.states[self.position + 1, number] = self.run(number)
        # An interrupted walk can go on from states on disk, since those of one block are always complete.
        for number in () if keep else range(len(self.batches)):
            del self.states[self.position, number]
        self.position += 1

    def first_hidden(self, number: int) -> Tensor:
        """Run the model on one batch up to its first block; return the hidden state, with autograd graph."""
        found: list[Tensor] = []

        def step(index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            found.append(Call(args, kwargs, self.calls[number][0].slot).hidden)
            raise Stop

        with replaced_blocks(self.model, self.names, step), suppress(Stop):
            run_model(self.model, self.batches[number])
        return found[0]

    def differentiates_arguments(self) -> bool:
        """Return True if blocks get differentiable arguments besides the hidden state on the first batch."""
        found: list[bool] = []

        def step(index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            call = Call(args, kwargs, self.calls[0][index].slot).with_hidden(None)
            leaves = tree_leaves((call.args, dict(call.kwargs)))
            found.append(any(isinstance(x, Tensor) and x.requires_grad for x in leaves))
            if index == len(self.names) - 1:
                raise Stop
            return self._first[0]

        with torch.enable_grad(), replaced_blocks(self.model, self.names, step), suppress(Stop):
            run_model(self.model, self.batches[0])
        return any(found)

    @contextmanager
    def leaving(self, number: int, hidden: Tensor | None) -> Iterator[None]:
        """Return a context in which the model skips all blocks and continues with `hidden` as their output.

        The model must be run on the batch with index `number`. A model that is one block skips nothing.
        """
        if not self.names:
            yield
            return
        first = self._first[number]

        def step(*args: Any, **kwargs: Any) -> Any:
            # A copy: with reentrant checkpointing, the tensor itself would become its own input.
            copied = hidden if hidden is None else hidden.clone()
            return (copied, *first[1:]) if isinstance(first, tuple) else copied

        with replaced_blocks(self.model, self.names, step):
            yield

    def _note(
        self,
        calls: list[Call],
        outputs: list[Any],
        skip: bool,
        index: int,
        forward: Callable[..., Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        slot = _slot(args, kwargs, hidden_of(outputs[-1]) if outputs else None)
        if len(calls) != index or slot is None:
            raise TargetError(
                f"{self.names[index]} of {type(self.model).__name__} does not read what the previous block "
                "returned, so blocks cannot be run one by one. Load the model and use tensornet.compress."
            )
        calls.append(Call(args, kwargs, slot))
        if index and index == len(self.names) - 1:
            raise Stop
        outputs.append(outputs[0] if skip and outputs else forward(*args, **kwargs))
        if index == len(self.names) - 1:
            raise Stop
        return outputs[-1]


def find_blocks(model: nn.Module, batch: Batch, loaded: Loaded = in_memory) -> tuple[str, ...]:
    """Return the names of the blocks over which a model can be walked; empty if the model is one block.

    The model must have a single chain of blocks. Running the blocks one by one, with the arguments that they
    get if all but the first are skipped, must give the output of the whole chain. Gradients must reach the
    layers outside of the blocks by the hidden state alone. A model whose weights are
    not in memory is not run; it must have a single `nn.ModuleList` of blocks.

    Args:
        model: the model, in eval mode; it is run twice.
        batch: keyword arguments of the model; a single row is enough.
        loaded: see `Walk`.
    """
    if loaded is not in_memory:
        stacks = outer_stacks(model, nn.ModuleList, least=1)
        return next(iter(stacks.values())) if len(stacks) == 1 else ()
    chains = find_chains(model, batch)
    if len(chains) != 1:
        return ()
    (names,) = chains.values()
    last: list[Tensor] = []
    keep = model.get_submodule(names[-1]).register_forward_hook(
        lambda module, args, output: last.append(hidden_of(output).clone())
    )
    try:
        with torch.no_grad():
            run_model(model, batch)
    finally:
        keep.remove()
    walk = Walk(model, names, [batch])
    walk.enter(skip=True)
    while walk.position < len(names):
        walk.advance()
    found, expected = walk.states[walk.position, 0].float(), last[0].float()
    # Values that are not finite are equal here; the walk then names the layer that receives them.
    scale = float(expected.nan_to_num(0, 0, 0).abs().max())
    same = torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * scale, equal_nan=True)
    return names if same and not walk.differentiates_arguments() else ()


@contextmanager
def block_bar(what: str, visits: int, tokens: int, *, progress: bool) -> Iterator[Callable[[], None]]:
    """Show a progress bar over visits of blocks, with the speed in tokens and the memory of this process.

    Args:
        what: what is done, in front of the bar.
        visits: number of visits of blocks.
        tokens: number of tokens that run through every visited block.
        progress: whether to show the bar.

    Yields:
        Function to call after each visit.
    """
    start = time.perf_counter()
    with tqdm(total=visits, desc=what, disable=not progress, unit="block") as bar:

        def visited() -> None:
            speed = tokens * (bar.n + 1) / visits / max(time.perf_counter() - start, 1e-9)
            bar.set_postfix_str(f"{speed:,.0f} tokens/s {memory_held()}".strip(), refresh=False)
            bar.update()

        yield visited if progress else lambda: None


def walk_dtype(model: nn.Module, loaded: Loaded, device: torch.device) -> torch.dtype | None:
    """Return the dtype of matrix products in a walk, or None for that of the weights.

    Weights that are loaded for a walk are float32. Small models are calibrated in float32 from every source.
    """
    if loaded is in_memory:
        return fast_dtype(model)
    return torch.bfloat16 if has_bfloat16(device) and large_matrices(model) else None


def blocks_to_walk(
    model: nn.Module, targets: Iterable[Target], batch: Batch, loaded: Loaded
) -> tuple[str, ...]:
    """Find the blocks of a model (see `find_blocks`); none if layers of two blocks use the same weight.

    A model that does not run on the batch, which only a loss function may be able to read, is one block too.
    """
    row = small_batch(batch, model) if loaded is in_memory else batch
    if row is None:
        return ()
    names = find_blocks(model, row, loaded)
    shared = any(len({block_of(name, names) for name in target.names}) > 1 for target in targets)
    return () if shared else names


def block_of(name: str, blocks: Container[str]) -> str:
    """Return the name of the block that contains a module or is this module; empty without such a block."""
    while name and name not in blocks:
        name = name.rpartition(".")[0]
    return name


@contextmanager
def replaced_blocks(model: nn.Module, names: Sequence[str], step: Callable[..., Any]) -> Iterator[None]:
    """Return a context in which `step(index, forward, *args, **kwargs)` replaces the `forward` of each block.

    `index` is the position of the block in `names`, and `forward` is the replaced method.
    """
    blocks = [model.get_submodule(name) for name in names]
    before = [vars(block).get("forward") for block in blocks]  # None unless other code has replaced `forward`
    for index, block in enumerate(blocks):
        block.forward = partial(step, index, block.forward)
    try:
        yield
    finally:
        for block, own in zip(blocks, before, strict=True):
            if own is None:
                del block.forward
            else:
                block.forward = own


def outer_stacks(
    model: nn.Module, kinds: Any = (nn.ModuleList, nn.Sequential), *, least: int = 2
) -> dict[str, tuple[str, ...]]:
    """Map the name of each outermost container with at least `least` modules to the names of its modules."""
    found: dict[str, tuple[str, ...]] = {}
    for name, module in model.named_modules():
        inside = any(outer == "" or name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, kinds) and len(module) >= least and not inside:
            found[name] = tuple(f"{name}.{key}".lstrip(".") for key, _ in module.named_children())
    return found


def _slot(args: tuple[Any, ...], kwargs: Mapping[str, Any], wanted: Tensor | None) -> int | str | None:
    """Find the position of `wanted` among arguments; if `wanted` is None, that of the first tensor."""
    places: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    for key, value in places:
        if isinstance(value, Tensor) if wanted is None else value is wanted:
            return key
    return None
