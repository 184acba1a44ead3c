"""Correction after compression: refitting and healing on a text.

Healing keeps a checkpoint beside the destination, so that a killed run need not begin again.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import tensornet as tn
from tensornet import CalibrationStats, HealReport
from tensornet.healing import RefineReport
from tensornet_hf import pipeline
from tensornet_hf.checkpoint import HUB
from tensornet_hf.lazy_model import open_source
from tensornet_hf.streaming import digest


class HealingFile:
    """Checkpoint of healing beside the destination, `.NAME.heal-KEY.safetensors`, deleted after saving.

    Args:
        destination: of the model; an upload has no checkpoint.
        folder: the dense model.
        options: JSON-ready, everything that the healed model depends on: other options have another key.
    """

    def __init__(self, destination: str, folder: Path, options: Sequence[Any]) -> None:
        self.path: Path | None = None
        self._others: list[Path] = []
        if destination.startswith(HUB):
            return
        target = Path(destination).expanduser().absolute()
        marks = sorted(open_source(folder).marks.items())
        key = digest([marks, *options, tn.__version__, torch.__version__])[:16]
        self.path = target.with_name(f".{target.name}.heal-{key}.safetensors")
        if target.parent.is_dir():
            self._others = [x for x in target.parent.glob(f".{target.name}.heal-*") if x != self.path]

    def begin(self, *, resume: bool) -> Path | None:
        """Return the checkpoint path, and delete checkpoints of other options for this destination."""
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            for file in self._others if resume else [*self._others, self.path]:
                file.unlink(missing_ok=True)
        return self.path

    def end(self) -> None:
        """Delete the checkpoint once the model is written."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def correct(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    folder: Path,
    text: str,
    stats: CalibrationStats | None,
    *,
    refine: bool,
    heal: int,
    checkpoint: Path | None,
    progress: bool,
) -> tuple[str, ...]:
    """Refit and train a compressed model on a text, in place.

    Args:
        model: compressed.
        teacher: the dense model.
        folder: holds its tokenizer.
        text: that calibration has seen the beginning of.
        stats: of that calibration.
        refine: refit the layers first.
        heal: steps of training after it.
        checkpoint: file that training resumes from.
        progress: show progress bars.

    Returns:
        Results in words.
    """
    notes = []
    if refine:
        notes.append(_refined(pipeline.refine_on(model, teacher, folder, text, stats, progress=progress)))
    if heal:
        report = pipeline.heal_on(
            model, teacher, folder, text, steps=heal, checkpoint=checkpoint, progress=progress
        )
        notes.append(_healed(report))
    return (*notes, "what was predicted is for the model before that")


def _refined(report: RefineReport) -> str:
    """Describe the result of refitting."""
    before, after = report.distances
    count = f"{len(report.after)} layers refitted"
    if report.left:
        count += f", {len(report.left)} left as they were"
    change = f"distance from the dense model's outputs {before:.4f} -> {after:.4f} on text held back"
    return f"{count}: {change}" + ("" if report.kept else "; it grew, so the old cores came back")


def _healed(report: HealReport) -> str:
    """Describe the result of training by the mean losses of the first and last tenth of the steps."""
    part = max(1, len(report.losses) // 10)
    if not report.losses:
        return f"healed for {report.steps:,} steps, all of them before"
    first, last = (sum(x) / part for x in (report.losses[:part], report.losses[-part:]))
    return (
        f"healed for {report.steps:,} steps, {len(report.losses):,} of them now: divergence from the dense "
        f"model {first:.4f} -> {last:.4f} nats a token"
    )
