"""Calibrate a model that does not fit into memory: block by block, with activations on the disk.

Forward, each block runs on all batches before the next does; backward, the same from the end, each block run
once more from its input. So memory holds the weights and moments of one block, and the activations of one
batch. The result is that of `tensornet.calibrate`.
"""

import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

import tensornet as tn
from tensornet.calibration.batches import Batch, BatchLike, as_batch
from tensornet.calibration.blockwise import ChainRun, outer_stacks
from tensornet.calibration.calibrate import MomentRecorder, checked_losses, mean_loss, observed
from tensornet.calibration.coherence import HeldTokens
from tensornet.calibration.losses import TokenLosses, default_losses, label_losses, sampled_losses
from tensornet.calibration.stats import STATS_VERSION, CalibrationStats
from tensornet.compression.config import CompressionConfig
from tensornet.errors import TargetError
from tensornet.io import (
    Slice,
    load_slice,
    read_header,
    write_shard,
    write_tensors,
)
from tensornet.nn.targets import find_targets
from tensornet_hf.lazy_model import mapped_model, open_source
from tensornet_hf.streaming import digest, staging
from tensornet_hf.text import calibration_data

#: Prefix of folders of activations, beside the statistics.
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
        NonFiniteError: inputs or gradients of a layer are not finite; the message names it.

    Example:
        >>> batches = torch.randint(100, (2, 4, 32)).unbind()
        >>> _ = th.calibrate_checkpoint(th.embedded.gpt2_path(), batches, "stats.safetensors", progress=False)
        >>> tn.CalibrationStats.load("stats.safetensors").tokens
        256
    """
    model = mapped_model(src, spill=spill or Path(path).parent)
    for part in (model.config, model.config.get_text_config(decoder=True)):
        part.use_cache = False  # a block runs several times on the same batch
    _, blocks = find_blocks(model)
    with tempfile.TemporaryDirectory(dir=spill or Path(path).parent, prefix=SPILL) as folder:
        run = _Streamed(model, blocks, Path(folder), full_up_to)
        with observed(model, run, config):  # type: ignore[arg-type]  # passes on what it sees
            run.enter([as_batch(batch, model, torch.device("cpu")) for batch in batches])
            bar = tqdm(total=2 * len(blocks), desc="calibrating", disable=not progress, unit="block")
            for _ in blocks:
                run.forward()
                bar.update()
            loss, scored = run.leave(loss_fn)
            for _ in blocks:
                run.backward(scored)
                bar.update()
            bar.close()
        facts = {
            "tokens": max(run.counts.values(), default=0),
            "counts": run.counts,
            "scored": scored,
            "of_tokens": run.of_tokens,
        }
        run.moments.write(Path(path), loss=loss, source=source, **facts)
    return CalibrationStats.load(path)


def find_blocks(model: nn.Module) -> tuple[str, tuple[str, ...]]:
    """Return the name of the stack of blocks of a model, and the names of the blocks.

    Raises:
        TargetError: the model has no stack of blocks, or several.
    """
    found = outer_stacks(model, nn.ModuleList, least=1)
    if len(found) != 1:
        raise TargetError(
            f"{type(model).__name__} has {len(found)} stacks of blocks ({', '.join(found) or 'none'}); "
            "models with exactly one are calibrated block by block. Load it and use tensornet.calibrate, "
            "whose statistics compress_checkpoint takes as well (stats=); on the command line, leave out "
            "--workers."
        )
    return next(iter(found.items()))


def statistics_of_text(
    folder: Path,
    destination: str | Path,
    text: str,
    *,
    name: str,
    config: CompressionConfig,
    tokens: int,
    path: Path | None = None,
    resume: bool = True,
    progress: bool = False,
) -> Path:
    """Run a model over a text block by block, and store the moments for planning.

    The file lies in the staging folder of `destination` and goes when the run that compresses is through.
    An interrupted run finds it there: it is used again for the same model, text and layers.

    Args:
        folder: of the model.
        destination: where the compressed model will be.
        text: like what the model will see; its beginning is used.
        name: how reports call the text.
        config: observe the layers it selects and that lie inside blocks.
        tokens: how much of the text to use.
        path: file to write instead.
        resume: use statistics that are there already.
        progress: show a progress bar.

    Returns:
        Path of the statistics, for `compress_checkpoint(stats=)`.

    Raises:
        TargetError: a model that cannot be run block by block, or for which text alone says too little.
        DestinationError: another run is writing the destination.
        ValueError: the text is too short.
    """
    source = open_source(folder)
    layers = (config.target_modules, config.exclude_modules)
    key = digest(
        [sorted(source.marks.items()), text, name, tokens, layers, tn.__version__, torch.__version__]
    )
    with staging(Path(destination).expanduser().absolute()) as work:
        path = path or work / f"statistics-{key[:16]}.safetensors"
        if path.is_file() and resume:
            return path
        for left in work.glob(f"{SPILL}*"):  # by a run that was killed
            shutil.rmtree(left)
        model = mapped_model(folder, spill=work)
        stack, _ = find_blocks(model)  # before anything is run
        targets = [x for x in find_targets(model, config) if not x.skip]
        if outside := [x.name for x in targets if not x.name.startswith(f"{stack}.")]:
            raise TargetError(
                f"{', '.join(outside)} of {type(model).__name__} lies outside its blocks ({stack}), of which "
                "alone statistics are collected without loading the model. Exclude it, or load the model (on "
                "the command line, leave out --workers)."
            )
        data = calibration_data(model, folder, text, tokens=tokens)
        calibrate_checkpoint(
            folder,
            data.batches,
            path,
            config=config,
            loss_fn=data.loss_fn,
            source=f"{data.tokens:,} tokens of {name}",
            progress=progress,
        )
    return path


class _OnDisk:
    """Store of hidden states and gradients in files, by block and batch; see `sequential.States`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __getitem__(self, key: tuple[int, int], /) -> Tensor:
        return load_slice(read_header(self._path(key))["x"])

    def __setitem__(self, key: tuple[int, int], value: Tensor, /) -> None:
        write_tensors(self._path(key), {"x": value.detach().float().contiguous()})

    def __delitem__(self, key: tuple[int, int], /) -> None:
        self._path(key).unlink()

    def _path(self, key: tuple[int, int]) -> Path:
        return self.folder / "{}-{}.safetensors".format(*key)


class _Streamed:
    """State of one streamed calibration; wraps the recorder of `tensornet.calibrate`."""

    def __init__(self, model: PreTrainedModel, blocks: Sequence[str], folder: Path, full_up_to: int) -> None:
        self.model = model
        self.chain = ChainRun(model, blocks, (), _OnDisk(folder))
        inside = {id(module) for name in blocks for module in model.get_submodule(name).modules()}
        self.rest = [module for module in model.modules() if id(module) not in inside]
        self.full_up_to, self.moments = full_up_to, _Moments(folder / "moments")
        self.recorder = MomentRecorder(full_up_to, torch.float32)
        self.sees = "nothing"
        self.counts: dict[str, int] = {}
        self.of_tokens = False

    # What hooks call.

    def see_input(self, name: str, x: Tensor) -> None:
        """Forward an input to the recorder in the forward pass."""
        if self.sees == "inputs":
            self.recorder.see_input(name, x)

    def see_indices(self, name: str, indices: Tensor, rows: int) -> None:
        """Ignore embeddings, which lie outside the blocks."""

    def hold(self, name: str, x: Tensor) -> list[HeldTokens]:
        """Let the recorder hold tokens of an input, in the backward pass."""
        return self.recorder.hold(name, x) if self.sees == "gradients" else []

    def see_gradient(self, name: str, gradient: Tensor, held: Sequence[HeldTokens] = ()) -> None:
        """Forward a gradient to the recorder in the backward pass."""
        if self.sees == "gradients":
            self.recorder.see_gradient(name, gradient, held)

    # The phases.

    def enter(self, batches: Sequence[Batch]) -> None:
        """Run the model up to the last block, to record the first input and the arguments of all blocks."""
        if not batches:
            raise TargetError("Calibration got no batches; pass at least one, better 30 of 1,000 tokens.")
        self.chain.batches = list(batches)
        with _in_memory([*self.rest, *self.chain.block.modules()]):
            self.chain.enter(skip=True)

    def forward(self) -> None:
        """Run the next block on all batches; keep its outputs, and the moments of its inputs."""
        self._observe("inputs")
        with _in_memory(self.chain.block.modules()):
            self.chain.advance(keep=True, before=self._expect)
        self.counts |= self.recorder.counts
        self.moments.add(self.recorder.finish(1, None, ""))

    def leave(self, loss_fn: TokenLosses) -> tuple[float, int]:
        """Compute the losses from the last hidden states, and replace the states by their gradients.

        Returns:
            Mean loss of a token, and the number of tokens that have one.
        """
        self.sees, total, scored = "nothing", 0.0, 0
        for number, batch in enumerate(self.chain.batches):
            hidden = self.chain.states[self.chain.position, number].requires_grad_()
            with self.chain.leaving(number, hidden), _in_memory(self.rest):
                if number == 0 and loss_fn in (label_losses, sampled_losses):
                    self.of_tokens = default_losses(self.model, batch, "labels")[1]
                each = checked_losses(loss_fn(self.model, batch))
                each.sum().backward()
            assert hidden.grad is not None
            self.chain.states[self.chain.position, number] = hidden.grad
            total, scored = total + float(each.detach().sum()), scored + each.numel()
        return mean_loss(total, scored, loss_fn), scored

    def backward(self, scored: int) -> None:
        """Run the last block again, differentiate it, and replace its input by the gradient."""
        self._observe("gradients")
        chain = self.chain
        chain.position -= 1
        with _in_memory(chain.block.modules()), torch.enable_grad():
            for number, batch in enumerate(chain.batches):
                self._expect(batch)
                hidden = chain.states[chain.position, number].requires_grad_()
                chain.run(number, hidden).backward(chain.states[chain.position + 1, number])
                assert hidden.grad is not None
                chain.states[chain.position, number] = hidden.grad
                del chain.states[chain.position + 1, number]
        inputs = self.moments.columns(self.recorder.gradients)
        self.moments.add(self.recorder.finish(scored, None, "", inputs))

    def _observe(self, what: str) -> None:
        self.recorder, self.sees = MomentRecorder(self.full_up_to, torch.float32), what

    def _expect(self, batch: Batch) -> None:
        self.recorder.batch = batch


@contextmanager
def _in_memory(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Hold the weights of modules in memory in single precision; outside they are mapped from the disk."""
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


class _Moments:
    """Collector of statistics that writes a few layers at a time to the disk.

    Args:
        folder: where they are kept until `write`.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        self.sides: dict[str, dict[str, str]] = {"rows": {}, "columns": {}}
        self.stored: dict[str, Slice] = {}
        self.coherence: dict[str, float] = {}

    def add(self, stats: CalibrationStats) -> None:
        """Write the moments of some layers; shared tensors stay shared."""
        self.coherence |= stats.coherence
        tensors: dict[str, Tensor] = {}
        keys: dict[int, str] = {}
        for side, moments in (("rows", stats.rows), ("columns", stats.columns)):
            for name, moment in moments.items():
                key = keys.setdefault(id(moment), f"{side}.{name}")
                tensors[key] = moment.contiguous()
                self.sides[side][name] = key
        if tensors:
            path = self.folder / f"{len(self.stored)}.safetensors"
            write_tensors(path, tensors)
            self.stored |= read_header(path)

    def columns(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read the moments of the inputs of some layers; a tensor that layers share is read once."""
        keys = {name: self.sides["columns"][name] for name in names if name in self.sides["columns"]}
        read = {key: load_slice(self.stored[key]) for key in dict.fromkeys(keys.values())}
        return {name: read[key] for name, key in keys.items()}

    def write(self, path: Path, **facts: Any) -> None:
        """Write the file that `CalibrationStats.load` reads, from the stored bytes.

        Args:
            path: of the file.
            facts: fields of `CalibrationStats` that are not moments.
        """
        header = {"version": STATS_VERSION, **facts, "coherence": self.coherence, **self.sides}
        write_shard(path, self.stored, {"calibration": json.dumps(header)})
