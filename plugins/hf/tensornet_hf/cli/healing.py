"""What `tensornet compress` does after it has compressed: `--refine` and `--heal`.

Healing keeps its work in a file, so that a killed run need not begin again.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import typer
from transformers import PreTrainedModel

import tensornet as tn
from tensornet import CalibrationStats, HealReport
from tensornet.healing import RefineReport
from tensornet_hf import pipeline as conversion
from tensornet_hf.checkpoint.hub import HUB
from tensornet_hf.streaming.source import digest, open_source


class HealingFile:
    """A file beside the destination, `.NAME.heal-KEY.safetensors`, that goes when the model is written.

    Args:
        destination: of the model; an address on the hub has no place beside it, and no file.
        folder: the dense model.
        options: JSON-ready, all that the healed model depends on: another command has another key.
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
        """The checkpoint to heal with; what other commands left for this destination is removed."""
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            for file in self._others if resume else [*self._others, self.path]:
                file.unlink(missing_ok=True)
        return self.path

    def end(self) -> None:
        """The model is written; the checkpoint is not needed any more."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def check_correction(refine: bool, heal: int, calibration: Path | None, int8: bool) -> None:
    """Refuse options that do not go together.

    Raises:
        typer.BadParameter: saying what to give or to leave out.
    """
    if refine and calibration is None:
        raise typer.BadParameter("--refine fits layers on the text of --calibration; give one.")
    if heal and calibration is None:
        raise typer.BadParameter("--heal trains on the text of --calibration; give one.")
    if heal and int8:
        raise typer.BadParameter("--heal trains cores, --int8 keeps them as integers; leave one of them out.")


def correct(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    folder: Path,
    text: str,
    stats: CalibrationStats | None,
    *,
    refine: bool,
    heal: int,
    file: HealingFile | None,
    resume: bool,
    progress: bool,
) -> tuple[str, ...]:
    """Refit and train a compressed model on a text, in place; returns what that did, in words."""
    notes = []
    if refine:
        notes.append(_refined(conversion.refine_on(model, teacher, folder, text, stats, progress=progress)))
    if heal and file is not None:
        checkpoint = file.begin(resume=resume)
        report = conversion.heal_on(
            model, teacher, folder, text, steps=heal, checkpoint=checkpoint, progress=progress
        )
        notes.append(_healed(report))
    return (*notes, "what was foreseen is for the model before that")


def _refined(report: RefineReport) -> str:
    before, after = report.distances
    count = f"{len(report.after)} layers refitted"
    if report.left:
        count += f", {len(report.left)} left as they were"
    change = f"distance from the dense model's outputs {before:.4f} -> {after:.4f} on text held back"
    return f"{count}: {change}" + ("" if report.kept else "; it grew, so the old cores came back")


def _healed(report: HealReport) -> str:
    """What training did, from the means over its first and its last tenth."""
    part = max(1, len(report.losses) // 10)
    if not report.losses:
        return f"healed for {report.steps:,} steps, all of them before"
    first, last = (sum(x) / part for x in (report.losses[:part], report.losses[-part:]))
    return (
        f"healed for {report.steps:,} steps, {len(report.losses):,} of them now: divergence from the dense "
        f"model {first:.4f} -> {last:.4f} nats a token"
    )
