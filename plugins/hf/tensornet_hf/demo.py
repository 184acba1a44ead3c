"""Demo on the embedded GPT-2: compress, evaluate, save, reload, generate, report."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import tensornet as tn
from tensornet_hf import pipeline
from tensornet_hf.checkpoint import check_free, on_device, save
from tensornet_hf.comparison import Comparison, Sampler, compare_baselines, folder_page
from tensornet_hf.embedded import calibration_text, gpt2_path, heldout_text
from tensornet_hf.inspect import weight_bytes
from tensornet_hf.report import Page, write_report
from tensornet_hf.report.page import plain

PROMPT = "And it came to pass in those days, that"
_NEW_TOKENS = 60
_TEMPERATURE = 0.7
_CALIBRATION_TOKENS = 16_384


@dataclass(frozen=True)
class Demo:
    """Result of the demo.

    Args:
        page: contents of the report.
        folder: the saved compressed model.
        report: the HTML page.
        seconds: of each step, by name.
    """

    page: Page
    folder: Path
    report: Path
    seconds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON-ready form."""
        files = {"folder": str(self.folder), "report": str(self.report)}
        return {**plain(self.page), **files, "seconds": self.seconds}


def run_demo(
    output: Path,
    *,
    bits: float = 4.25,
    seed: int = 0,
    device: torch.device | str = "cpu",
    force: bool = False,
    command: str = "tensornet demo",
    progress: bool = False,
) -> Demo:
    """Compress the embedded GPT-2 and write `model/` and `report.html` below `output`.

    Rounding to nearest, GPTQ and the truncated SVD at the same bytes are measured beside it, on text that
    neither training nor calibration saw.

    Args:
        output: folder, made if it is not there.
        bits: of a weight of the linear layers, scales included.
        seed: of the generated samples.
        device: where the models run.
        force: replace a model that is there.
        command: named in the report.
        progress: show progress bars.

    Raises:
        BudgetError: so few bits that no plan has them.
        DestinationError: `output/model` exists already.
    """
    source, folder = gpt2_path(), output / "model"
    check_free(folder, force=force, sources=(source,))
    clock = _Clock()
    model = on_device(pipeline.open_dense(source), device)
    planned, stats = _planned(model, source, bits, progress=progress)
    spectra = pipeline.plan_spectra(model, planned, progress=progress)
    clock.lap("calibrate and plan")
    comparison = compare_baselines(
        model,
        source,
        planned,
        stats,
        text=heldout_text(),
        name="30 chapters that nobody saw",
        sampler=Sampler(source, PROMPT, _NEW_TOKENS, _TEMPERATURE, seed),
        progress=progress,
    )
    clock.lap("measure the original and the plain methods")
    started = clock.last - clock.laps["calibrate and plan"]
    done = pipeline.carry_out(model, planned, stats, started=started, progress=progress)
    clock.lap("compress")
    save(model, folder, source=source, force=force)
    # Users of the folder have only transformers and one import of tensornet_hf.
    reloaded = on_device(AutoModelForCausalLM.from_pretrained(folder), device)
    clock.lap("save and load again")
    page = _page(comparison, done, reloaded, folder, spectra=spectra, command=command)
    clock.lap("measure the compressed model")
    written = write_report(page, output / "report.html")
    clock.lap("write the report")
    return Demo(page, folder, written, clock.laps)


def _planned(
    model: PreTrainedModel, source: Path, bits: float, *, progress: bool
) -> tuple[tn.CompressionPlan, tn.CalibrationStats]:
    """Calibrate and plan."""
    config = tn.CompressionConfig(bits_per_weight=bits)
    stats = pipeline.collect_stats(
        model,
        source,
        calibration_text(),
        name="the training text",
        config=config,
        tokens=_CALIBRATION_TOKENS,
        progress=progress,
    )
    return tn.plan(model, config, stats, progress=progress), stats


def _page(
    comparison: Comparison,
    done: tn.CompressionReport,
    reloaded: PreTrainedModel,
    folder: Path,
    *,
    spectra: Any,
    command: str,
) -> Page:
    """Measure the compressed model and collect the contents of the report."""
    sizes = (weight_bytes(gpt2_path()), weight_bytes(folder))
    rows = comparison.rows(done, sizes, comparison.of(reloaded))
    notes = ("The model, trained on the King James Bible, ships with the package.",)
    return folder_page(
        "The embedded GPT-2", comparison, rows, done, spectra=spectra, command=command, notes=notes
    )


class _Clock:
    """Seconds between laps."""

    def __init__(self) -> None:
        self.last = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = now - self.last
        self.last = now
