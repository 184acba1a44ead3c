"""Calibrate a model that does not fit into memory, block by block, with activations on disk.

In the forward phase, each block runs on all batches before the next block starts. In the backward phase, the
blocks run again in reverse order, each on its stored inputs. So memory only contains the weights and moments
of a single block, and the activations of a single batch. The result is that of `tensornet.calibrate`.
"""

import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from tqdm.auto import tqdm

from tensornet.calibration.batches import BatchLike, as_batch
from tensornet.calibration.blockwise import ChainRun, outer_stacks
from tensornet.calibration.calibrate import MomentRecorder, checked_losses, mean_loss, observed
from tensornet.calibration.coherence import HeldTokens
from tensornet.calibration.losses import TokenLosses, default_losses, label_losses, sampled_losses
from tensornet.calibration.stats import CalibrationStats, weight_samples
from tensornet.compression.config import CompressionConfig
from tensornet.errors import TargetError
from tensornet.io import Slice, load_slice, read_header, write_shard, write_tensors
from tensornet_hf.lazy_model import LazyModel, open_model

#: Prefix of temporary folders with activations, in the folder of the statistics file.
SPILL = ".calibration."
#: Configuration that selects all linear layers except the head; its budget is not used.
LINEAR_LAYERS = CompressionConfig(max_bond=1)


def calibrate_checkpoint(
    src: str | Path | LazyModel,
    batches: Iterable[BatchLike],
    path: str | Path,
    *,
    config: CompressionConfig | None = None,
    loss_fn: TokenLosses = label_losses,
    source: str = "calibration data",
    progress: bool = False,
) -> CalibrationStats:
    """Collect second moments of inputs and gradients for the layers in a model's blocks, block by block.

    The model must have a single stack of blocks, so encoder-decoder models are not supported. The folder of
    `path` needs disk space for the moments, and for a float32 hidden state of every token and block.

    Args:
        src: folder of the model, or the opened folder (see `tensornet_hf.lazy_model.open_model`).
        batches: batches of inputs (see `tensornet.calibrate`). Gradients are computed for all batches.
        path: file to which the statistics are written; the returned object reads from this file as needed.
        config: selects the layers, which must be inside the blocks; by default all linear layers there.
        loss_fn, source: see `tensornet.calibrate`.
        progress: show a progress bar.

    Raises:
        TargetError: there is no batch, a selected layer is outside the blocks, or the model does not have
            exactly one stack of blocks.
        FormatError: the folder is damaged.
        NonFiniteError: inputs or gradients of a layer are not finite; the message names the layer.

    Example:
        >>> batches = torch.randint(100, (2, 4, 32)).unbind()
        >>> _ = th.calibrate_checkpoint(th.embedded.gpt2_path(), batches, "stats.safetensors", progress=False)
        >>> tn.CalibrationStats.load("stats.safetensors").tokens
        256
    """
    path = Path(path)
    lazy = src if isinstance(src, LazyModel) else open_model(src)
    model = lazy.model
    stack, blocks = find_blocks(model)
    given = [as_batch(batch, model, torch.device("cpu")) for batch in batches]
    if not given:
        raise TargetError("Calibration got no batches. Pass at least one, or better 30 of 1,000 tokens each.")
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
                f"{', '.join(x.name for x in outside)} of {type(model).__name__} is outside the blocks "
                f"({stack}). Without loading the model, statistics can only be collected inside the blocks. "
                "Exclude the layer, or load the model (on the command line, leave out --workers)."
            )
        fingerprint: dict[str, tuple[float, ...]] = {}

        # Run the model up to the first block, to record its input and the arguments of all blocks.
        chain = ChainRun(model, blocks, given, _OnDisk(spill))
        inside = {id(module) for name in blocks for module in model.get_submodule(name).modules()}
        rest = [module for module in model.modules() if id(module) not in inside]
        with lazy.loaded([*rest, *chain.block.modules()]):
            chain.enter(skip=True)

        # Forward phase: run one block after another, and save its outputs and the moments of its inputs.
        counts: dict[str, int] = {}
        for number in range(len(blocks)):
            recorder.start("inputs")
            with lazy.loaded(chain.block.modules()):
                inner = f"{blocks[number]}."
                fingerprint |= weight_samples(x for x in targets if x.name.startswith(inner))
                chain.advance(keep=True, before=recorder.expect)
            counts |= recorder.counts
            recorder.finish(1, None, "").save(spill / f"inputs.{number}.safetensors")
            bar.update()

        # Compute the losses from the last hidden states, and replace the states by their gradients.
        recorder.start("nothing")
        total, scored, of_tokens, states = 0.0, 0, False, chain.states
        for number, batch in enumerate(given):
            hidden = states[chain.position, number].requires_grad_()
            with chain.leaving(number, hidden), lazy.loaded(rest):
                if number == 0 and loss_fn in (label_losses, sampled_losses):
                    of_tokens = default_losses(model, batch)[1]
                each = checked_losses(loss_fn(model, batch))
                each.sum().backward()
            assert hidden.grad is not None
            states[chain.position, number] = hidden.grad
            total, scored = total + float(each.detach().sum()), scored + each.numel()
        loss = mean_loss(total, scored, loss_fn)

        # Backward phase: run each block again, differentiate, and replace its stored input by the gradient.
        for position in reversed(range(len(blocks))):
            recorder.start("gradients", counts)
            chain.position = position
            with lazy.loaded(chain.block.modules()), torch.enable_grad():
                for number, batch in enumerate(given):
                    recorder.expect(batch)
                    hidden = states[position, number].requires_grad_()
                    output = chain.run(number, hidden)
                    with recorder.differentiating():
                        output.backward(states[position + 1, number])
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
    """Return the name of a model's stack of blocks (the `ModuleList`), and the names of the blocks.

    Raises:
        TargetError: the model has no stack of blocks, or several.
    """
    found = outer_stacks(model, nn.ModuleList, least=1)
    if len(found) != 1:
        raise TargetError(
            f"{type(model).__name__} has {len(found)} stacks of blocks ({', '.join(found) or 'none'}), but "
            "calibration block by block needs exactly one. Load the model and use tensornet.calibrate; "
            "compress_checkpoint accepts its statistics too (stats=). On the command line, leave out "
            "--workers."
        )
    return next(iter(found.items()))


class _PhaseRecorder(MomentRecorder):
    """Recorder of moments that observes inputs in the forward phase and gradients in the backward phase."""

    phase = "nothing"

    def start(self, phase: str, counts: Mapping[str, int] | None = None) -> None:
        """Clear all moments, and start to record `"inputs"`, `"gradients"` or `"nothing"`.

        Args:
            phase: what to record.
            counts: number of tokens that each layer received, if only gradients are recorded.
        """
        siblings = self.siblings
        super().__init__()
        self.phase, self.siblings, self.counts = phase, siblings, dict(counts or {})

    def see_input(self, name: str, x: Tensor) -> None:
        """Record an input in the forward phase."""
        if self.phase == "inputs":
            super().see_input(name, x)

    def see_indices(self, name: str, indices: Tensor, rows: int) -> None:
        """Ignore embeddings, which are outside the blocks."""

    def hold(self, name: str, x: Tensor) -> list[HeldTokens]:
        """In the backward phase, copy some tokens of a layer's input for `see_gradient`."""
        return super().hold(name, x) if self.phase == "gradients" else []

    def see_gradient(self, name: str, gradient: Tensor, held: Sequence[HeldTokens] = ()) -> None:
        """Record a gradient in the backward phase."""
        if self.phase == "gradients":
            super().see_gradient(name, gradient, held)


class _OnDisk:
    """Mapping from `(block, batch)` to a hidden state or gradient in a file; see `blockwise.States`."""

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


def _join(folder: Path, path: Path, facts: Mapping[str, Any]) -> None:
    """Join the statistics of all blocks into a file, without loading them; `facts` are further entries."""
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
