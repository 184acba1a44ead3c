"""Demo on the embedded GPT-2: compress, evaluate, save, reload, generate, report."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import tensornet as tn
from tensornet_hf import pipeline
from tensornet_hf.checkpoint.folders import check_free
from tensornet_hf.checkpoint.inspection import weight_bytes
from tensornet_hf.checkpoint.load import on_device
from tensornet_hf.checkpoint.save import save_model
from tensornet_hf.embedded import calibration_text, gpt2_path, heldout_text
from tensornet_hf.report import BondSpectrum, ModelFacts, Page, versions, write_report
from tensornet_hf.report.page import plain
from tensornet_hf.text.perplexity import Perplexity, perplexity
from tensornet_hf.text.tokens import continue_text, load_tokenizer, token_ids, usual_context

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
    param_ratio: float = 0.5,
    seed: int = 0,
    device: torch.device | str = "cpu",
    force: bool = False,
    command: str = "tensornet demo",
    progress: bool = False,
) -> Demo:
    """Compress the embedded GPT-2 and write `model/` and `report.html` below `output`.

    The baseline is plain SVD: every layer truncated by its own singular values to the same keep ratio,
    without calibration.

    Args:
        output: folder, made if it is not there.
        param_ratio: fraction of the parameters of the linear layers to keep.
        seed: of the generated samples.
        device: where the models run.
        force: replace a model that is there.
        command: named in the report.
        progress: show progress bars.

    Raises:
        DestinationError: `output/model` exists already.
    """
    source, folder = gpt2_path(), output / "model"
    check_free(folder, force=force, sources=(source,))
    clock = _Clock()
    evaluate = _Evaluation.on(source, seed=seed, progress=progress)
    original = on_device(pipeline.open_dense(source), device)
    original_facts = evaluate(original)
    clock.lap("measure the original")

    model = on_device(pipeline.open_dense(source), device)
    done, spectra = _compress(model, source, param_ratio, clock, progress=progress)
    save_model(model, folder, source=source, force=force)
    # Users of the folder have only transformers and one import of tensornet_hf.
    reloaded = on_device(AutoModelForCausalLM.from_pretrained(folder), device)
    clock.lap("save and load again")
    facts = evaluate(reloaded)
    clock.lap("measure the compressed model")

    svd = on_device(pipeline.open_dense(source), device)
    ratio = tn.CompressionConfig(topology="low_rank", param_ratio=done.param_ratio, objective="weight")
    svd_report = tn.compress(svd, ratio, progress=progress)
    svd_facts = evaluate(svd)
    clock.lap("plain SVD at the same size")

    models = (
        ModelFacts("original", done.model_params_before, weight_bytes(source), *original_facts),
        ModelFacts("compressed", done.model_params_after, weight_bytes(folder), *facts),
        ModelFacts("plain SVD", svd_report.model_params_after, None, *svd_facts),
    )
    page = _page(models, done, spectra, command=command, seed=seed)
    written = write_report(page, output / "report.html")
    clock.lap("write the report")
    return Demo(page, folder, written, clock.laps)


@dataclass(frozen=True)
class _Evaluation:
    """Perplexity on the held-out text, and a sample."""

    tokenizer: Any
    tokens: Tensor
    seed: int
    progress: bool

    @classmethod
    def on(cls, source: Path, *, seed: int, progress: bool) -> "_Evaluation":
        tokenizer = load_tokenizer(source)
        return cls(tokenizer, token_ids(tokenizer, heldout_text()), seed, progress)

    def __call__(self, model: PreTrainedModel) -> tuple[Perplexity, str]:
        measured = perplexity(model, self.tokens, context=usual_context(model), progress=self.progress)
        sample = continue_text(
            model,
            self.tokenizer,
            PROMPT,
            max_new_tokens=_NEW_TOKENS,
            temperature=_TEMPERATURE,
            seed=self.seed,
        )
        return measured, sample


def _compress(
    model: PreTrainedModel, source: Path, param_ratio: float, clock: "_Clock", *, progress: bool
) -> tuple[tn.CompressionReport, Mapping[str, Sequence[BondSpectrum]]]:
    """Calibrate, plan and compress a model in place; return the report and the spectra of its layers."""
    config = tn.CompressionConfig(param_ratio=param_ratio)
    stats = pipeline.collect_stats(
        model,
        source,
        calibration_text(),
        name="the training text",
        config=config,
        tokens=_CALIBRATION_TOKENS,
        progress=progress,
    )
    planned = tn.plan(model, config, stats, progress=progress)
    spectra = pipeline.plan_spectra(model, planned)
    done = pipeline.carry_out(model, planned, stats, started=clock.last, progress=progress)
    clock.lap("compress")
    return done, spectra


def _page(
    models: Sequence[ModelFacts],
    done: tn.CompressionReport,
    spectra: Mapping[str, Sequence[BondSpectrum]],
    *,
    command: str,
    seed: int,
) -> Page:
    """Return the contents of the report."""
    return Page(
        title="The embedded GPT-2, compressed",
        models=models,
        report=done,
        spectra=spectra,
        prompt=PROMPT,
        made=(
            ("Command", command),
            ("Model", "tensornet_hf.embedded.gpt2_path(), trained on the King James Bible"),
            ("Held-out text", "30 chapters that neither training nor calibration saw"),
            ("Calibration", done.plan.calibration or ""),
            ("Samples", f"temperature {_TEMPERATURE:g}, seed {seed}"),
            ("Versions", versions()),
        ),
        notes=(
            "Plain SVD: every layer truncated by its own singular values to the same keep ratio, rounded "
            "down to a whole rank, without calibration.",
        ),
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
