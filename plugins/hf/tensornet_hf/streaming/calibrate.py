"""Calibrating a model that does not fit into memory: block by block, activations kept on the disk.

Forward, each block reads what the block before left for every batch; backward, the same from the end, each
block run once more from the input it had. So the weights of one block are in memory at a time, the moments
of one block, and the activations of one batch. The result is that of `tensornet.calibrate`.
"""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tensornet.calibration import CalibrationStats
from tensornet.calibration.batches import Batch, BatchLike, as_batch, run_model
from tensornet.calibration.calibrate import Recorder, observed
from tensornet.calibration.losses import TokenLosses, label_losses
from tensornet.calibration.sequential import Stop, hidden_of
from tensornet.compression import CompressionConfig
from tensornet.errors import TargetError
from tensornet.io.safetensors_header import load_slice, read_header
from tensornet.io.safetensors_writer import write_tensors
from tensornet.progress import progress_bar
from tensornet_hf.streaming.mapped_model import mapped_model
from tensornet_hf.streaming.moments import Moments

#: How folders of activations are called, beside the statistics.
SPILL = ".calibration."
#: Observes all linear layers but the head; nothing is compressed here, so the budget means nothing.
LINEAR_LAYERS = CompressionConfig(max_bond=1)


def calibrate_checkpoint(
    src: str | Path,
    batches: Iterable[BatchLike],
    path: str | Path,
    *,
    config: CompressionConfig = LINEAR_LAYERS,
    loss_fn: TokenLosses = label_losses,
    full_up_to: int = 8192,
    source: str = "calibration data",
    spill: str | Path | None = None,
    progress: bool = False,
) -> CalibrationStats:
    """Collect second moments of inputs and gradients for every layer of the blocks of a model.

    For models with one stack of blocks: decoders, or encoders; not both. Space on the disk: the moments,
    and for every token of the batches one hidden state for each block in single precision.

    Args:
        src: folder of the model.
        batches: as for `tensornet.calibrate`; all are differentiated.
        path: the statistics are written there; the result reads them from there as they are needed.
        config: observe the layers that it selects and that lie inside blocks.
        loss_fn, full_up_to, source: as for `tensornet.calibrate`.
        spill: folder for activations, removed at the end; beside `path` if absent.
        progress: show progress bars.

    Raises:
        TargetError: no batch, no stack of blocks, or more than one.
        FormatError: the folder is damaged.
        NonFiniteError: naming the layer whose inputs or gradients are not finite.
    """
    model = mapped_model(src, spill=spill or Path(path).parent)
    for part in (model.config, model.config.get_text_config(decoder=True)):
        part.use_cache = False  # a block runs several times on the same batch
    _, blocks = find_blocks(model)
    with tempfile.TemporaryDirectory(dir=spill or Path(path).parent, prefix=SPILL) as folder:
        run = _Streamed(model, blocks, Path(folder), full_up_to)
        with observed(model, run, config):  # type: ignore[arg-type]  # passes on what it sees
            run.enter([as_batch(batch, model, torch.device("cpu")) for batch in batches])
            bar = progress_bar(total=2 * len(blocks), desc="calibrating", disable=not progress, unit="block")
            for index in range(len(blocks)):
                run.forward(index)
                bar.update()
            loss, scored = run.leave(loss_fn)
            for index in reversed(range(len(blocks))):
                run.backward(index, scored)
                bar.update()
            bar.close()
        run.moments.write(Path(path), tokens=run.tokens, loss=loss, source=source)
    return CalibrationStats.load(path)


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The stack of blocks of a model and its name.

    Raises:
        TargetError: there is none, or several.
    """
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) > 0 and not inside:
            found[name] = module
    if len(found) != 1:
        raise TargetError(
            f"{type(model).__name__} has {len(found)} stacks of blocks ({', '.join(found) or 'none'}); "
            "models with exactly one are calibrated block by block. Load it and use tensornet.calibrate, "
            "whose statistics compress_checkpoint takes as well (stats=); on the command line, leave out "
            "--workers."
        )
    return next(iter(found.items()))


@dataclass(frozen=True)
class _Call:
    """What a block is called with besides the hidden states."""

    rest: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Streamed:
    """One calibration. Stands in for the recorder of `tensornet.calibrate`, and passes on what is wanted."""

    def __init__(self, model: PreTrainedModel, blocks: nn.ModuleList, folder: Path, full_up_to: int) -> None:
        self.model, self.blocks, self.folder = model, list(blocks), folder
        self.full_up_to = full_up_to
        inside = {id(module) for block in blocks for module in block.modules()}
        self.rest = [module for module in model.modules() if id(module) not in inside]
        self.moments = Moments(folder / "moments")
        self.batches: list[Batch] = []
        self.calls: list[list[_Call]] = []  # by batch and block
        self.shape: Callable[[Tensor], Any] = lambda hidden: hidden  # what a block returns for a hidden state
        self.recorder: Recorder | None = None
        self.sees = "nothing"
        self.tokens = 0

    # What hooks call.

    def see_input(self, name: str, x: Tensor) -> None:
        """Passed on in the forward pass."""
        if self.sees == "inputs" and self.recorder is not None:
            self.recorder.see_input(name, x)

    def see_indices(self, name: str, indices: Tensor, rows: int) -> None:
        """Embeddings lie outside the blocks."""

    def see_gradient(self, name: str, gradient: Tensor) -> None:
        """Passed on in the backward pass."""
        if self.sees == "gradients" and self.recorder is not None:
            self.recorder.see_gradient(name, gradient)

    # The phases.

    @torch.no_grad()
    def enter(self, batches: Sequence[Batch]) -> None:
        """Find what the first block is given, and the arguments of every block."""
        if not batches:
            raise TargetError("Calibration got no batches; pass at least one, better 30 of 1,000 tokens.")
        self.batches = list(batches)
        for number, batch in enumerate(batches):
            self.calls.append([])
            with self._blocks_replaced(self._note_call(number)), _in_memory(self.rest), suppress(Stop):
                run_model(self.model, batch)

    @torch.no_grad()
    def forward(self, index: int) -> None:
        """Run one block on all batches; keep its outputs, and the moments of its inputs."""
        self._observe("inputs")
        block = self.blocks[index]
        with _in_memory(block.modules()):
            for number, batch in enumerate(self.batches):
                self._recorder.batch = batch
                call = self.calls[number][index]
                output = block(self._load("hidden", index, number), *call.rest, **call.kwargs)
                self._save("hidden", index + 1, number, hidden_of(output))
        self.tokens = max(self.tokens, *self._recorder.counts.values(), 0)
        self.moments.add(self._recorder.finish(1, None, ""))

    def leave(self, loss_fn: TokenLosses) -> tuple[float, int]:
        """From the last hidden states to losses, and back.

        Returns:
            Mean loss of a token, and the number of tokens that have one.
        """
        self.sees, total, scored = "nothing", 0.0, 0
        for number, batch in enumerate(self.batches):
            hidden = self._load("hidden", len(self.blocks), number).requires_grad_()
            with self._blocks_replaced(_constant(self.shape(hidden))), _in_memory(self.rest):
                each = loss_fn(self.model, batch)
                each.sum().backward()
            assert hidden.grad is not None
            self._save("gradient", len(self.blocks), number, hidden.grad)
            total, scored = total + float(each.detach().sum()), scored + each.numel()
        return total / max(scored, 1), scored

    def backward(self, index: int, scored: int) -> None:
        """Run one block again and differentiate it; keep the gradients of its input, and their moments."""
        self._observe("gradients")
        block = self.blocks[index]
        with _in_memory(block.modules()), torch.enable_grad():
            for number, batch in enumerate(self.batches):
                self._recorder.batch = batch
                hidden = self._load("hidden", index, number).requires_grad_()
                call = self.calls[number][index]
                output = hidden_of(block(hidden, *call.rest, **call.kwargs))
                output.backward(self._load("gradient", index + 1, number))
                assert hidden.grad is not None
                self._save("gradient", index, number, hidden.grad)
                self._path("gradient", index + 1, number).unlink()
                self._path("hidden", index + 1, number).unlink()
        self.moments.add(self._recorder.finish(scored, None, ""))

    @property
    def _recorder(self) -> Recorder:
        assert self.recorder is not None
        return self.recorder

    def _observe(self, what: str) -> None:
        self.recorder, self.sees = Recorder(self.full_up_to, torch.float32), what

    def _note_call(self, number: int) -> Callable[[int, Tensor, _Call], Any]:
        def note(index: int, hidden: Tensor, call: _Call) -> Any:
            if number == 0 and index == 0:
                block = self.blocks[0]
                with _in_memory(block.modules()):
                    self.shape = _like(type(block).forward(block, hidden, *call.rest, **call.kwargs))
            if index == 0:
                self._save("hidden", 0, number, hidden)
            self.calls[number].append(call)
            if index == len(self.blocks) - 1:
                raise Stop
            return self.shape(hidden)

        return note

    @contextmanager
    def _blocks_replaced(self, function: Callable[[int, Tensor, _Call], Any]) -> Iterator[None]:
        """Have `function(index, hidden, call)` called in place of each block."""
        for index, block in enumerate(self.blocks):

            def forward(*args: Any, index: int = index, **kwargs: Any) -> Any:
                hidden = args[0] if args else kwargs.pop("hidden_states")
                return function(index, hidden, _Call(args[1:], kwargs))

            block.forward = forward
        try:
            yield
        finally:
            for block in self.blocks:
                del block.forward

    def _path(self, kind: str, index: int, number: int) -> Path:
        return self.folder / f"{kind}-{index}-{number}.safetensors"

    def _save(self, kind: str, index: int, number: int, value: Tensor) -> None:
        write_tensors(self._path(kind, index, number), {"x": value.detach().float().contiguous()})

    def _load(self, kind: str, index: int, number: int) -> Tensor:
        return load_slice(read_header(self._path(kind, index, number))["x"])


@contextmanager
def _in_memory(modules: Iterable[nn.Module]) -> Iterator[None]:
    """The weights of modules in single precision inside the block, mapped from the disk outside."""
    owners = [(m, name, p) for m in modules for name, p in m._parameters.items() if p is not None]
    held: dict[int, nn.Parameter] = {}  # tied weights are held once
    for module, name, parameter in owners:
        single = held.get(id(parameter))
        if single is None:
            single = nn.Parameter(parameter.detach().float(), requires_grad=False)
        module._parameters[name] = held[id(parameter)] = single
    try:
        yield
    finally:
        for module, name, parameter in owners:
            module._parameters[name] = parameter


def _constant(value: Any) -> Callable[[int, Tensor, _Call], Any]:
    return lambda index, hidden, call: value


def _like(output: Any) -> Callable[[Tensor], Any]:
    """Makes of a hidden state what a block returns for it."""
    if isinstance(output, Tensor):
        return lambda hidden: hidden
    return lambda hidden: (hidden, *output[1:])
