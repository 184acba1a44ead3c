"""Calibrate a model that does not fit into memory: block by block, with activations on the disk.

In the forward phase each block runs on all batches before the next block starts. In the backward phase blocks
run in reverse order, each again from its stored input. So memory contains the weights and moments of one
block, and the activations of one batch. The result is the same as that of `tensornet.calibrate`.
"""

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from tensornet.calibration.batches import BatchLike, as_batch
from tensornet.calibration.blockwise import ChainRun, outer_stacks
from tensornet.calibration.calibrate import MomentRecorder, checked_losses, mean_loss, observed
from tensornet.calibration.coherence import HeldTokens
from tensornet.calibration.losses import TokenLosses, default_losses, label_losses, sampled_losses
from tensornet.calibration.stats import CalibrationStats, weight_samples
from tensornet.compression.config import CompressionConfig
from tensornet.errors import TargetError
from tensornet.io import Slice, load_slice, read_header, write_shard, write_tensors
from tensornet_hf.lazy_model import mapped_model

#: Prefix of the folders with activations, which are next to the statistics.
SPILL = ".calibration."
#: Selects all linear layers except the head; the budget is not used.
LINEAR_LAYERS = CompressionConfig(max_bond=1)


def calibrate_checkpoint(
    src: str | Path | PreTrainedModel,
    batches: Iterable[BatchLike],
    path: str | Path,
    *,
    config: CompressionConfig | None = None,
    loss_fn: TokenLosses = label_losses,
    source: str = "calibration data",
    progress: bool = False,
) -> CalibrationStats:
    """Collect second moments of inputs and gradients for every layer of the blocks of a model.

    This supports models with one stack of blocks: decoders or encoders, not both. The folder of `path` needs
    disk space for the moments, and for one float32 hidden state for every token and block.

    Args:
        src: folder of the model, or a model whose weights are mapped from one, see `mapped_model`.
        batches: as for `tensornet.calibrate`; all are differentiated.
        path: file for the statistics; the result reads them from it as needed.
        config: observe the layers that it selects, which must lie inside blocks; all linear layers of the
            blocks if absent.
        loss_fn, source: as for `tensornet.calibrate`.
        progress: show a progress bar.

    Raises:
        TargetError: there is no batch, a selected layer is outside the blocks, or there is not exactly one
            stack of blocks.
        FormatError: the folder is damaged.
        NonFiniteError: inputs or gradients of a layer are not finite; the message names it.

    Example:
        >>> batches = torch.randint(100, (2, 4, 32)).unbind()
        >>> _ = th.calibrate_checkpoint(th.embedded.gpt2_path(), batches, "stats.safetensors", progress=False)
        >>> tn.CalibrationStats.load("stats.safetensors").tokens
        256
    """
    path = Path(path)
    model = src if isinstance(src, PreTrainedModel) else mapped_model(src, spill=path.parent)
    stack, blocks = find_blocks(model)
    given = [as_batch(batch, model, torch.device("cpu")) for batch in batches]
    if not given:
        raise TargetError("Calibration got no batches; pass at least one, better 30 of 1,000 tokens.")
    recorder = _PhaseRecorder()
    with (
        tempfile.TemporaryDirectory(dir=path.parent, prefix=SPILL) as folder,
        observed(model, recorder, config or LINEAR_LAYERS) as targets,
        tqdm(total=2 * len(blocks), desc="calibrating", disable=not progress, unit="block") as bar,
    ):
        spill = Path(folder)
        outside = [x for x in targets if not x.name.startswith(f"{stack}.")]
        if outside and config is not None:
            raise TargetError(
                f"{', '.join(x.name for x in outside)} of {type(model).__name__} lies outside its blocks "
                f"({stack}), of which alone statistics are collected without loading the model. Exclude it, "
                "or load the model (on the command line, leave out --workers)."
            )
        fingerprint = weight_samples(x for x in targets if x not in outside)

        # Run up to the first block, to record its input and the arguments of all blocks.
        chain = ChainRun(model, blocks, given, _OnDisk(spill))
        inside = {id(module) for name in blocks for module in model.get_submodule(name).modules()}
        rest = [module for module in model.modules() if id(module) not in inside]
        with _in_memory([*rest, *chain.block.modules()]):
            chain.enter(skip=True)

        # Forward: run block after block; keep its outputs, and the moments of its inputs.
        counts: dict[str, int] = {}
        for number in range(len(blocks)):
            recorder.start("inputs")
            with _in_memory(chain.block.modules()):
                chain.advance(keep=True, before=recorder.expect)
            counts |= recorder.counts
            recorder.finish(1, None, "").save(spill / f"inputs.{number}.safetensors")
            bar.update()

        # Compute the losses from the last hidden states, and replace the states by their gradients.
        recorder.start("nothing")
        total, scored, of_tokens, states = 0.0, 0, False, chain.states
        for number, batch in enumerate(given):
            hidden = states[chain.position, number].requires_grad_()
            with chain.leaving(number, hidden), _in_memory(rest):
                if number == 0 and loss_fn in (label_losses, sampled_losses):
                    of_tokens = default_losses(model, batch)[1]
                each = checked_losses(loss_fn(model, batch))
                each.sum().backward()
            assert hidden.grad is not None
            states[chain.position, number] = hidden.grad
            total, scored = total + float(each.detach().sum()), scored + each.numel()
        loss = mean_loss(total, scored, loss_fn)

        # Backward: run each block again, differentiate it, and replace its input by the gradient.
        for position in reversed(range(len(blocks))):
            recorder.start("gradients")
            chain.position = position
            with _in_memory(chain.block.modules()), torch.enable_grad():
                for number, batch in enumerate(given):
                    recorder.expect(batch)
                    hidden = states[position, number].requires_grad_()
                    chain.run(number, hidden).backward(states[position + 1, number])
                    assert hidden.grad is not None
                    states[position, number] = hidden.grad
                    del states[position + 1, number]
            inputs = CalibrationStats.load(spill / f"inputs.{position}.safetensors").columns
            recorder.finish(scored, None, "", inputs).save(spill / f"gradients.{position}.safetensors")
            bar.update()

        facts = {"tokens": max(counts.values(), default=0), "loss": loss, "source": source, "scored": scored}
        _join(spill, path, {**facts, "of_tokens": of_tokens, "counts": counts, "fingerprint": fingerprint})
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


class _PhaseRecorder(MomentRecorder):
    """Recorder of inputs in the forward phase, and of gradients in the backward phase."""

    phase = "nothing"

    def start(self, phase: str) -> None:
        """Clear all records, and start to record `"inputs"`, `"gradients"` or `"nothing"`."""
        super().__init__()
        self.phase = phase

    def expect(self, batch: Mapping[str, Any]) -> None:
        """Announce the next batch."""
        self.batch = dict(batch)

    def see_input(self, name: str, x: Tensor) -> None:
        """Record an input in the forward phase."""
        if self.phase == "inputs":
            super().see_input(name, x)

    def see_indices(self, name: str, indices: Tensor, rows: int) -> None:
        """Ignore embeddings, which are outside the blocks."""

    def hold(self, name: str, x: Tensor) -> list[HeldTokens]:
        """Copy some tokens of an input, in the backward phase."""
        return super().hold(name, x) if self.phase == "gradients" else []

    def see_gradient(self, name: str, gradient: Tensor, held: Sequence[HeldTokens] = ()) -> None:
        """Record a gradient in the backward phase."""
        if self.phase == "gradients":
            super().see_gradient(name, gradient, held)


class _OnDisk:
    """Store of hidden states and gradients in files, by block and batch; see `blockwise.States`."""

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


@contextmanager
def _in_memory(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Load the weights of modules in single precision inside the block; outside of it they are mapped."""
    owners = [(module, *named) for module in modules for named in module.named_parameters(recurse=False)]
    held = {id(p): nn.Parameter(p.detach().float(), requires_grad=False) for _, _, p in owners}
    for module, name, parameter in owners:
        setattr(module, name, held[id(parameter)])  # tied weights are loaded once
    try:
        yield
    finally:
        for module, name, parameter in owners:
            setattr(module, name, parameter)


def _join(folder: Path, path: Path, facts: Mapping[str, Any]) -> None:
    """Join the statistics of single blocks to one file, byte by byte; `facts` are its other entries."""
    header: dict[str, Any] = {"rows": {}, "columns": {}, "coherence": {}}
    tensors: dict[str, Slice] = {}
    for part in sorted([*folder.glob("inputs.*"), *folder.glob("gradients.*")]):
        with safe_open(part, framework="pt") as file:
            found = json.loads(file.metadata()["calibration"])
        header["version"] = found["version"]
        for name in ("rows", "columns", "coherence"):
            header[name] |= found[name]
        tensors |= read_header(part)
    write_shard(path, tensors, {"calibration": json.dumps({**header, **facts})})
