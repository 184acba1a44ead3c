"""Calibrate a model that does not fit into memory, block by block, with activations on disk.

Memory only contains the weights and moments of a single block, and the activations of a single batch. The
result is that of `tensornet.calibrate`.
"""

import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm.auto import tqdm

from tensornet.calibration.batches import BatchLike, as_batch
from tensornet.calibration.blockwise import moments_by_block
from tensornet.calibration.calibrate import MomentRecorder, observed
from tensornet.calibration.losses import TokenLosses, label_losses, sampled_losses, scores_next_token
from tensornet.calibration.stats import CalibrationStats, weight_samples
from tensornet.calibration.walk import Walk, find_blocks
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

    A model with several stacks of blocks, such as an encoder-decoder, is loaded as one block. The folder of
    `path` needs disk space for the moments, and for a float32 hidden state of every token and block.

    Args:
        src: folder of the model, or the opened folder (see `tensornet_hf.lazy_model.open_model`).
        batches: batches of inputs (see `tensornet.calibrate`). Gradients are computed for all batches.
        path: file to which the statistics are written; the returned object reads from this file as needed.
        config: selects the layers; by default all linear layers but the head.
        loss_fn, source: see `tensornet.calibrate`.
        progress: show a progress bar.

    Raises:
        TargetError: there is no batch, or no token has a loss.
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
    given = [as_batch(batch, model, torch.device("cpu")) for batch in batches]
    if not given:
        raise TargetError("Calibration got no batches. Pass at least one, or better 30 of 1,000 tokens each.")
    recorder = MomentRecorder()
    counts: dict[str, int] = {}
    fingerprint: dict[str, tuple[float, ...]] = {}
    with (
        tempfile.TemporaryDirectory(dir=path.parent, prefix=SPILL) as folder,
        observed(model, recorder, config or LINEAR_LAYERS) as targets,
    ):
        spill = Path(folder)
        walk = Walk(
            model,
            find_blocks(model, given[0], lazy.loaded),
            given,
            StatesOnDisk(spill / "states"),
            lazy.loaded,
        )
        visits = moments_by_block(walk, recorder, loss_fn, source=source)
        total = len(walk.names) + 1
        for name, stats in tqdm(visits, desc="calibrating", disable=not progress, unit="block", total=total):
            stats.save(spill / f"{name or 'outside'}.safetensors")
            counts |= stats.counts
            here = [x for x in targets if x.name in stats.columns or x.name in stats.rows]
            with lazy.loaded([module for x in here for module in x.modules], dtype=None):
                fingerprint |= weight_samples(here)
        facts = {
            "tokens": max(counts.values(), default=0),
            "loss": stats.loss,
            "source": source,
            "scored": stats.scored,
            "of_tokens": loss_fn in (label_losses, sampled_losses) and scores_next_token(model) is True,
            "counts": counts,
            "fingerprint": fingerprint,
        }
        _join(spill, path, facts)
    return CalibrationStats.load(path)


class StatesOnDisk:
    """Hidden states in files, as a mapping from `(block, batch)` (see `tensornet.calibration.walk.Walk`)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)

    def __getitem__(self, key: tuple[int, int], /) -> Tensor:
        return load_slice(read_header(self._path(key))["x"])

    def __setitem__(self, key: tuple[int, int], value: Tensor, /) -> None:
        write_tensors(self._path(key), {"x": value.detach().float().cpu().contiguous()})

    def __delitem__(self, key: tuple[int, int], /) -> None:
        self._path(key).unlink()

    def complete(self, batches: int) -> int:
        """Return the largest index of a block before which the states of all batches are known, or 0."""
        found = Counter(int(file.name.partition("-")[0]) for file in self.folder.glob("*-*.safetensors"))
        return max((block for block, count in found.items() if count == batches), default=0)

    def _path(self, key: tuple[int, int]) -> Path:
        return self.folder / "{}-{}.safetensors".format(*key)


def _join(folder: Path, path: Path, facts: Mapping[str, Any]) -> None:
    """Join the statistics of all blocks into a file, without loading them; `facts` are further entries."""
    header: dict[str, Any] = {"rows": {}, "columns": {}, "coherence": {}}
    tensors: dict[str, Slice] = {}
    for part in sorted(folder.glob("*.safetensors")):
        with safe_open(part, framework="pt") as file:
            found = json.loads(file.metadata()["calibration"])
        header["version"] = found["version"]
        for name in ("rows", "columns", "coherence"):
            header[name] |= found[name]
        tensors |= read_header(part)
    write_shard(path, tensors, {"calibration": json.dumps({**header, **facts})})
