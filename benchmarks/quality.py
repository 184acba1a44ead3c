"""How well does a real language model work at a given number of parameters, and was that predicted?

SmolLM2-135M-Instruct is calibrated on the Python tutorials and judged on the Debian handbook, by its
perplexity over 40 evenly spread windows of 512 tokens. All methods use the same moments, except methods with
two texts: these take half of their calibration windows from the documentation of the Linux kernel. `TABLE`
lists the rows. Rows that are in the record are skipped, so a run can be interrupted and continued:

    OMP_NUM_THREADS=1 python benchmarks/quality.py CACHE
    python benchmarks/quality.py --toy      # this package's small GPT-2 and texts, in seconds
    python benchmarks/quality.py --picture docs/quality.svg

`CACHE` is the folder of models, texts and statistics (see `subjects.py`). All forward passes, also those of
the dense model, run in bfloat16. Healing takes ten minutes of processor time.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from harness import RECORDS, record
from subjects import continuation, prepare_models, read_text, spread, token_windows
from torch import Tensor, nn

import tensornet as tn
from tensornet.calibration import sampled_losses
from tensornet.compression import Survey, survey_from_stats
from tensornet.compression.report import model_size
from tensornet.healing import refine
from tensornet_hf.embedded import calibration_text, gpt2_path, heldout_text

PROMPT = "To install a package on Debian, you first need to"
LAYERS = {"mlp": "*.mlp.*", "all": None}
SOURCE_NAMES = {"calibration": "the Python tutorials", "kernel": "the kernel documentation"}


@dataclass(frozen=True)
class Method:
    """Method of compression: its display name, its options, and the texts on which it is calibrated."""

    title: str
    options: dict[str, Any]
    texts: tuple[str, ...] = ("calibration",)


METHODS = {
    "svd": Method("truncated SVD of the weights", {"method": "svd", "topology": "low_rank"}),
    "mpo": Method(
        "MPO of the weights, 3 sites",
        {"method": "svd", "topology": "mpo", "topology_options": {"sites": 3}},
    ),
    "svd_llm": Method("SVD whitened by inputs (SVD-LLM)", {"method": "gptq"}),
    "ours": Method("low rank by curvature (ours)", {}),
    "ours_two_texts": Method("low rank by curvature of two texts (ours)", {}, ("calibration", "kernel")),
    "mpo2": Method("MPO, 2 sites, ours", {"topology": "mpo", "topology_options": {"sites": 2}}),
}


@dataclass(frozen=True)
class Job:
    """One row of the table: a method, the layers, the ratio of parameters, and what follows compression."""

    method: str
    layers: str
    ratio: float
    after: str = ""  # "refined", "healed" or "refined, healed"


def jobs(method: str, layers: str, *percents: int, after: str = "") -> list[Job]:
    """Make rows that differ only in the ratio of parameters, given in percent."""
    return [Job(method, layers, percent / 100, after) for percent in percents]


#: Rows in the order in which they are measured, the most important first.
TABLE = [
    Job("dense", "-", 1.0),
    *jobs("ours", "all", 90, 80, 60, 40),
    *jobs("svd_llm", "all", 90, 80, 60, 40),
    *jobs("ours", "mlp", 90, 80, 60, 40),
    *jobs("svd_llm", "mlp", 80, 60),
    *jobs("ours", "all", 80, 60, after="refined"),
    *jobs("ours", "all", 60, after="healed"),
    *jobs("svd", "mlp", 80),
    *jobs("mpo", "mlp", 80),
    *jobs("ours", "mlp", 60, after="healed"),
    *jobs("ours_two_texts", "all", 80, 60),
    *jobs("ours_two_texts", "all", 80, 60, after="refined"),
    *jobs("ours_two_texts", "all", 60, after="refined, healed"),
    *jobs("mpo2", "mlp", 90, 80),
]
#: Rows of the toy run; together they take every step that makes the table.
TOY = [
    Job("dense", "-", 1.0),
    Job("ours", "all", 0.8),
    *(Job("ours", "mlp", 0.4, after) for after in ("", "refined", "healed")),
    Job("svd_llm", "mlp", 0.4),
    Job("svd", "mlp", 0.4),
    Job("mpo2", "mlp", 0.8),
    Job("ours_two_texts", "mlp", 0.4, "refined, healed"),
]


@dataclass
class Bench:
    """Model, texts, and intermediate results that rows share.

    Args:
        cache: folder of models, texts and statistics.
        toy: whether to use this package's small GPT-2 and texts instead of those in the folder.
        windows: number of held-out windows.
        calibration: number of calibration windows.
        heal_seconds: processor seconds of healing.
        refine_windows: number of windows on which layers are refitted.
        length: number of tokens in a window.
    """

    cache: Path
    toy: bool
    windows: int
    calibration: int
    heal_seconds: float
    refine_windows: int
    length: int
    surveys: dict[tuple[str, str], Survey] = field(default_factory=dict)
    moments: dict[tuple[str, ...], tn.CalibrationStats] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder = gpt2_path() if self.toy else prepare_models(self.cache)[0]
        self.heldout = self.text("heldout", self.windows)

    def model(self) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()

    def text(self, use: str, count: int | None, length: int | None = None) -> Tensor:
        """Return `count` evenly spread windows of a text, or all of them, and cache its tokens."""
        from safetensors.torch import load_file, save_file
        from transformers import AutoTokenizer

        length = length or self.length
        path = self.cache / f"{use}-{length}.safetensors"
        if not path.is_file():
            tokenizer = AutoTokenizer.from_pretrained(self.folder)
            if self.toy:
                text = heldout_text()[:20_000] if use == "heldout" else calibration_text()[:40_000]
            else:
                text = read_text(self.cache / "texts", use)
            save_file({"windows": token_windows(tokenizer, text, length=length)}, path)
        windows = load_file(path)["windows"]
        return windows if count is None else windows[spread(count, len(windows))]

    def stats(self, method: str) -> tn.CalibrationStats:
        """Return the statistics of a method, from the same number of windows of each of its texts."""
        texts = METHODS[method].texts
        if texts in self.moments:
            return self.moments[texts]
        names = "" if texts == ("calibration",) else "-" + "-".join(texts)
        path = self.cache / f"moments{names}-{self.calibration}.safetensors"
        if not path.is_file():
            torch.manual_seed(0)
            each = self.calibration // len(texts)
            source = " and ".join(f"{each} x {self.length} tokens of {SOURCE_NAMES[name]}" for name in texts)
            batches = torch.cat([self.text(name, each) for name in texts]).split(2)
            options = {"loss_fn": sampled_losses, "source": source, "autocast": torch.bfloat16}
            tn.calibrate(self.model(), batches, **options).save(path)
        self.moments[texts] = tn.CalibrationStats.load(path)
        return self.moments[texts]

    def measure(self, job: Job) -> dict[str, Any]:
        """Measure one row: compress the model, refit or heal it if the row says so, and judge it."""
        model = self.model()
        row: dict[str, Any] = {
            "method": job.method,
            "layers": job.layers,
            "ratio": job.ratio,
            "after": job.after,
        }
        if job.method != "dense":
            start = time.process_time()
            plan = self.plan(job, model)
            tn.apply_plan(model, plan, self.stats(job.method))
            row["kept"] = plan.params_after / plan.params_before
            row["predicted_rise"] = plan.predicted_loss_increase if not job.after else None
            row["seconds"] = time.process_time() - start
        if "refined" in job.after:
            row |= self.refine(model, job.method)
        if "healed" in job.after:
            row |= self.heal(model)
        row["loss"] = mean_loss(model, self.heldout)
        params, size = model_size(model)
        return row | {
            "perplexity": math.exp(row["loss"]),
            "tokens": self.heldout[:, 1:].numel(),
            "model_params": params,
            "model_bytes": size,
            "sample": " ".join((PROMPT + continuation(model, self.folder, PROMPT)).split()).replace("`", "'"),
        }

    def plan(self, job: Job, model: nn.Module) -> tn.CompressionPlan:
        """Plan a row; the candidates of all layers are found once for all sizes of a method."""
        config = tn.CompressionConfig(
            target_modules=LAYERS[job.layers], param_ratio=job.ratio, **METHODS[job.method].options
        )
        if config.method == "svd":  # each layer is planned alone, so there is no survey
            return tn.plan(model, config)
        key = (job.method, job.layers)
        whole = self.surveys.get((job.method, "all"))
        if key not in self.surveys and whole is not None:
            self.surveys[key] = part_of(whole, LAYERS[job.layers])
        if key not in self.surveys:
            self.surveys[key] = survey_from_stats(model, config, self.stats(job.method))
        return self.surveys[key].plan(param_ratio=job.ratio)

    def heal(self, model: nn.Module) -> dict[str, Any]:
        """Heal a model for a fixed time, on a text that is used neither for calibration nor for testing."""
        text = self.text("training", None, self.length // 2)
        order = torch.randperm(len(text), generator=torch.Generator().manual_seed(0))
        report = tn.heal(
            model,
            self.model(),
            list(text[order].split(2)),
            steps=10_000,
            max_seconds=self.heal_seconds,
            clock=time.process_time,
            autocast=torch.bfloat16,
        )
        return {
            "heal_steps": report.steps,
            "heal_tokens": report.steps * self.length,
            "heal_seconds": report.seconds,
        }

    def refine(self, model: nn.Module, method: str) -> dict[str, Any]:
        """Refit the layers on windows of the calibration texts that were not used for calibration."""
        start = time.process_time()
        texts = METHODS[method].texts
        each = self.refine_windows // len(texts)
        parts = [self.unused(name, len(texts)) for name in texts]
        parts = [part[spread(each, len(part))] for part in parts]
        # Alternate the texts, so that the last rows, by which `refine` judges, are from all of them.
        chosen = torch.stack(parts, 1).flatten(0, 1)
        report = refine(model, self.model(), chosen.split(2), self.stats(method), autocast=torch.bfloat16)
        return {
            "refine_tokens": chosen.numel(),
            "refine_seconds": time.process_time() - start,
            "refine_distances": report.distances,
            "refine_kept": report.kept,
        }

    def unused(self, name: str, texts: int) -> Tensor:
        """Return the windows of a text that were not used for calibration, or all windows if all were used.

        Args:
            name: name of the text.
            texts: number of texts over which the calibration windows are distributed.
        """
        windows = self.text(name, None)
        free = torch.ones(len(windows), dtype=torch.bool)
        free[spread(self.calibration // texts, len(windows))] = False
        return windows[free] if bool(free.any()) else windows


def main(arguments: Sequence[str] | None = None) -> Path:
    """Measure the rows that the record lacks, and record each as soon as it is measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cache", type=Path, nargs="?", help="folder of models and texts, see subjects.py")
    parser.add_argument("--toy", action="store_true", help="the embedded GPT-2 and few tokens")
    parser.add_argument("--windows", type=int, default=40, help="number of held-out windows")
    parser.add_argument("--calibration", type=int, default=64, help="number of calibration windows")
    parser.add_argument("--length", type=int, default=512, help="number of tokens in a window")
    parser.add_argument("--heal-seconds", type=float, default=600.0)
    parser.add_argument("--refine-windows", type=int, default=32)
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--picture", type=Path, help="draw the record to this file and measure nothing")
    given = parser.parse_args(arguments)
    sizes = (given.windows, given.calibration, given.heal_seconds, given.refine_windows, given.length)
    table, sizes = (TOY, (6, 24, 1.0, 8, 64)) if given.toy else (TABLE, sizes)
    path = given.records / "quality.json"
    rows = json.loads(path.read_text())["rows"] if path.is_file() else []
    if given.picture is not None:
        picture(rows, given.picture)
        return given.picture
    missing = [job for job in table if not any(is_row_of(row, job) for row in rows)]
    if not missing:
        return path
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(Path(scratch) if given.toy else given.cache, given.toy, *sizes)
        for job in missing:
            row = bench.measure(job)
            rows.append(row)
            record("quality", rows, folder=given.records, prompt=PROMPT)
            print(json.dumps({k: v for k, v in row.items() if k != "sample"}), flush=True)
    return path


def picture(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Plot perplexity against parameter ratio, and measured against predicted loss increase."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.2, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    dense = next(row for row in rows if row["method"] == "dense")
    for method, after, style, label in (
        ("svd_llm", "", "C1^--", "SVD whitened by inputs (SVD-LLM)"),
        ("ours", "", "C0o-", "low rank by the predicted loss"),
        ("ours_two_texts", "refined", "C2s-", "the same, two texts, refitted"),
        ("ours_two_texts", "refined, healed", "C3*", "the same, healed"),
    ):
        found = [x for x in rows if (x["method"], x["layers"], x["after"]) == (method, "all", after)]
        left.plot([100 * x["ratio"] for x in found], [x["perplexity"] for x in found], style, label=label)
    left.axhline(dense["perplexity"], color="0.5", linewidth=1, label="dense")
    left.set(
        yscale="log",
        xlabel="parameters of all linear layers, %",
        ylabel="perplexity",
        yticks=(30, 100, 300, 1000),
    )
    left.set_yticklabels(["30", "100", "300", "1,000"])
    left.minorticks_off()
    for layers, style, label in (("all", "C0o", "all linear layers"), ("mlp", "C1s", "MLPs")):
        found = [x for x in rows if x["layers"] == layers and x.get("predicted_rise")]
        measured = [x["loss"] - dense["loss"] for x in found]
        right.plot([x["predicted_rise"] for x in found], measured, style, label=label)
    ends = (0.03, 2.5)
    right.plot(ends, ends, color="0.5", linewidth=1, label="equal")
    right.set(xscale="log", yscale="log", xlabel="predicted loss increase, nats", ylabel="measured, nats")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=9)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "quality"}):
        figure.savefig(file, metadata={"Date": None})


def is_row_of(row: dict[str, Any], job: Job) -> bool:
    return all(row.get(key) == getattr(job, key) for key in ("method", "layers", "ratio", "after"))


@torch.inference_mode()
def mean_loss(model: nn.Module, windows: Tensor) -> float:
    """Compute the mean loss of a token in windows of tokens, with forward passes in bfloat16."""
    total, count = 0.0, 0
    for batch in windows.split(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float().flatten(0, 1)
        total += float(nn.functional.cross_entropy(logits, batch[:, 1:].flatten(), reduction="sum"))
        count += batch[:, 1:].numel()
    return total / count


def part_of(whole: Survey, pattern: str | None) -> Survey:
    """Select the candidates of the layers whose names match a pattern."""
    assert pattern is not None
    return replace(whole, layers=tuple(x for x in whole.layers if fnmatch(x.name, pattern)))


if __name__ == "__main__":
    main()
