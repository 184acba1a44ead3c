"""Question: how well does a real language model work at a given size, and was that predicted?

SmolLM2-135M-Instruct, calibrated on the Python tutorials, judged on the Debian handbook: perplexity over 40
evenly spread windows of 512 tokens. All methods use the same moments, except that those which name two texts
take half of their windows from the Linux kernel's documentation. `TABLE` holds the rows; those that the
record has already are skipped, so a run can be cut short and repeated:

    OMP_NUM_THREADS=1 python benchmarks/quality.py CACHE

`CACHE` holds models, texts and statistics (see `real_data.py`). Forward passes run in bfloat16, of the dense
model as well. Ten minutes of healing are ten minutes of processor time, since the machine has other users.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from harness import RECORDS, record
from real_data import prepare_models, read_text, token_windows
from torch import Tensor, nn

import tensornet as tn
from tensornet.calibration import sampled_losses
from tensornet.compression import Prepared, prepare
from tensornet.compression.report import model_size
from tensornet.healing import refine
from tensornet.topologies import LowRankFamily

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
    "svd": Method("truncated SVD of the weights", {"objective": "weight", "topology": "low_rank"}),
    "mpo": Method("MPO of the weights, 3 sites", {"objective": "weight", "topology": "mpo", "sites": 3}),
    "svd_llm": Method(
        "SVD whitened by inputs (SVD-LLM)",
        {"objective": "activation", "pivoted": False},
    ),
    "svd_llm_pivoted": Method("the same, gauge fixed", {"objective": "activation", "pivoted": True}),
    "curvature": Method("low rank by curvature, gauge free", {"objective": "curvature", "pivoted": False}),
    "ours": Method("low rank by curvature (ours)", {"objective": "curvature"}),
    "ours_two_texts": Method(
        "low rank by curvature of two texts (ours)", {"objective": "curvature"}, ("calibration", "kernel")
    ),
    "mpo2": Method("MPO, 2 sites, ours", {"objective": "curvature", "topology": "mpo", "sites": 2}),
    "mpo2_balanced": Method(
        "MPO, 2 sites, ours, balanced legs",
        {"objective": "curvature", "topology": "mpo", "sites": 2, "dims": "balanced"},
    ),
}


@dataclass(frozen=True)
class Job:
    """One row of the table: a method at a keep ratio, and the step that comes `after` compression."""

    method: str
    layers: str
    ratio: float
    after: str = ""  # or "refined", "healed", "refined, healed"


def jobs(method: str, layers: str, *percents: int, after: str = "") -> list[Job]:
    """List rows that differ in size only."""
    return [Job(method, layers, percent / 100, after) for percent in percents]


#: In the order in which they are measured: what matters most comes first.
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
    *jobs("mpo2_balanced", "mlp", 80),
]


@dataclass
class Bench:
    """Model, texts, and intermediate results that rows share."""

    cache: Path
    windows: int
    calibration: int
    heal_seconds: float
    refine_windows: int
    length: int = 512
    prepared: dict[tuple[str, str], Prepared] = field(default_factory=dict)
    moments: dict[tuple[str, ...], tn.CalibrationStats] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder, _ = prepare_models(self.cache)
        self.heldout = self.text("heldout", self.windows)
        share_svds()

    def model(self) -> Any:
        """Load the dense model in float32."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()

    def text(self, use: str, count: int | None, length: int | None = None) -> Tensor:
        """Return evenly spread windows of one text, tokenized once and kept in the cache."""
        length = length or self.length
        from safetensors.torch import load_file, save_file
        from transformers import AutoTokenizer

        path = self.cache / f"{use}-{length}.safetensors"
        if not path.is_file():
            tokenizer = AutoTokenizer.from_pretrained(self.folder)
            text = read_text(self.cache / "texts", use)
            save_file({"windows": token_windows(tokenizer, text, length=length)}, path)
        windows = load_file(path)["windows"]
        return windows if count is None or count >= len(windows) else windows[spread(len(windows), count)]

    def stats(self, method: str) -> tn.CalibrationStats:
        """Return the moments on the texts of a method, read once."""
        texts = METHODS[method].texts
        if texts not in self.moments:
            self.moments[texts] = self.statistics(texts)
        return self.moments[texts]

    def statistics(self, texts: Sequence[str] = ("calibration",)) -> tn.CalibrationStats:
        """Return moments on texts with equally many windows of each, collected once and kept in the cache."""
        names = "" if tuple(texts) == ("calibration",) else "-" + "-".join(texts)
        path = self.cache / f"moments{names}-{self.calibration}.safetensors"
        if not path.is_file():
            torch.manual_seed(0)
            each = self.calibration // len(texts)
            source = " and ".join(f"{each} x {self.length} tokens of {SOURCE_NAMES[name]}" for name in texts)
            batches = torch.cat([self.text(name, each) for name in texts]).split(2)
            tn.calibrate(
                self.model(),
                batches,
                loss_fn=sampled_losses,
                source=source,
                autocast=torch.bfloat16,
                progress=True,
            ).save(path)
        return tn.CalibrationStats.load(path)

    def measure(self, job: Job) -> dict[str, Any]:
        """Measure one row: compress, refit or heal if asked, judge."""
        model = self.model()
        row: dict[str, Any] = {
            "method": job.method,
            "layers": job.layers,
            "ratio": job.ratio,
            "after": job.after,
        }
        if job.method != "dense":
            start = time.process_time()
            plan = self.prepare(job, model).plan(param_ratio=job.ratio)
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
            "sample": self.sample(model),
        }

    def prepare(self, job: Job, model: nn.Module) -> Prepared:
        """Compute all candidates with predicted losses, once for all sizes of a method."""
        key = (job.method, job.layers)
        whole = self.prepared.get((job.method, "all"))
        if key not in self.prepared and whole is not None:
            self.prepared[key] = part_of(whole, LAYERS[job.layers])
        if key not in self.prepared:
            config = tn.CompressionConfig(
                target_modules=LAYERS[job.layers], param_ratio=job.ratio, **METHODS[job.method].options
            )
            self.prepared[key] = prepare(model, config, self.stats(job.method))
        return self.prepared[key]

    def heal(self, model: nn.Module) -> dict[str, Any]:
        """Heal for a fixed time on a third text."""
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
        """Refit the layers in order, on windows of the calibration texts that calibration did not use."""
        start = time.process_time()
        texts = METHODS[method].texts
        each = self.refine_windows // len(texts)
        parts = [self.unused(name, len(texts)) for name in texts]
        parts = [part[spread(len(part), each)] for part in parts]
        chosen = torch.stack(parts, 1).flatten(0, 1)  # texts by turns: the last batches judge
        report = refine(model, self.model(), chosen.split(2), self.stats(method), autocast=torch.bfloat16)
        return {
            "refine_tokens": chosen.numel(),
            "refine_seconds": time.process_time() - start,
            "refine_distances": report.distances,
            "refine_kept": report.kept,
        }

    def unused(self, name: str, texts: int) -> Tensor:
        """Return the windows of a text that calibration on this many texts left, or all if it left none."""
        windows = self.text(name, None)
        free = torch.ones(len(windows), dtype=torch.bool)
        free[spread(len(windows), self.calibration // texts)] = False
        return windows[free] if bool(free.any()) else windows

    def sample(self, model: nn.Module) -> str:
        """Continue the prompt greedily: perplexity alone would not show loops and noise."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        ids = tokenizer(PROMPT, return_tensors="pt").input_ids
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)  # type: ignore[operator]
        text = str(tokenizer.decode(made[0], skip_special_tokens=True))
        return " ".join(text.split()).replace("`", "'")  # goes into tables


def main(arguments: Sequence[str] | None = None, table: Sequence[Job] = TABLE) -> Path:
    """Measure the rows that are missing, and add each to the record at once."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cache", type=Path)
    parser.add_argument("--windows", type=int, default=40, help="held-out windows")
    parser.add_argument("--calibration", type=int, default=64, help="calibration windows")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--heal-seconds", type=float, default=600.0)
    parser.add_argument("--refine-windows", type=int, default=32)
    parser.add_argument("--out", type=Path, default=RECORDS, help="folder of the record")
    given = parser.parse_args(arguments)
    path = given.out / "quality.json"
    rows = json.loads(path.read_text())["rows"] if path.is_file() else []
    missing = [job for job in table if not any(is_row_of(row, job) for row in rows)]
    if not missing:
        return path
    bench = Bench(
        given.cache,
        given.windows,
        given.calibration,
        given.heal_seconds,
        given.refine_windows,
        given.length,
    )
    for job in missing:
        row = bench.measure(job)
        rows.append(row)
        record("quality", rows, folder=given.out, prompt=PROMPT, threads=torch.get_num_threads())
        print(json.dumps({k: v for k, v in row.items() if k != "sample"}), flush=True)
    return path


def is_row_of(row: dict[str, Any], job: Job) -> bool:
    """Return True if a recorded row is the result of a job."""
    return all(row.get(key) == getattr(job, key) for key in ("method", "layers", "ratio", "after"))


@torch.inference_mode()
def mean_loss(model: nn.Module, windows: Tensor) -> float:
    """Compute the mean loss of the tokens of windows, with forward passes in bfloat16."""
    total, count = 0.0, 0
    for batch in windows.split(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float().flatten(0, 1)
        total += float(nn.functional.cross_entropy(logits, batch[:, 1:].flatten(), reduction="sum"))
        count += batch[:, 1:].numel()
    return total / count


def part_of(whole: Prepared, pattern: str | None) -> Prepared:
    """Restrict a preparation to the layers that match a pattern."""
    assert pattern is not None
    kept = [k for k, target in enumerate(whole.targets) if fnmatch(target.name, pattern)]
    chosen = {
        name: tuple(getattr(whole, name)[k] for k in kept if getattr(whole, name))
        for name in ("targets", "candidates", "spectra")
    }
    return replace(whole, **chosen)


def spread(length: int, count: int) -> Tensor:
    """Return evenly spread positions."""
    return torch.linspace(0, length - 1, min(count, length)).long()


def share_svds() -> None:
    """Compute the whitened SVD of a weight once: all sizes of a method truncate the same one.

    The library keeps none, since for a large model they are larger than the model.
    """
    module = import_module("tensornet.topologies.low_rank")  # its package exports a function of that name
    original: Callable[..., Any] = module.weighted_svd
    ladder: Callable[..., Any] = LowRankFamily.ladder
    known: dict[tuple[Any, ...], Any] = {}

    def key_of(matrix: Tensor, weighting: Any) -> tuple[Any, ...]:
        sides = (weighting.rows, weighting.columns)
        return tuple(
            None if x is None else (*x.shape, float(x.double().sum()), float(x.flatten()[0]))
            for x in (matrix, *sides)
        )

    def remembering(self: LowRankFamily, matrix: Tensor, weightings: Any, **options: Any) -> Any:
        key = key_of(matrix, weightings[0])
        if key not in known:
            known[key] = original(matrix, weightings[0])
        return ladder(self, matrix, weightings, **options)

    def looked_up(matrix: Tensor, weighting: Any, **options: Any) -> Any:
        found = None if options else known.get(key_of(matrix, weighting))
        return found if found is not None else original(matrix, weighting, **options)

    module.weighted_svd, LowRankFamily.ladder = looked_up, remembering  # type: ignore[attr-defined, method-assign]


if __name__ == "__main__":
    main()
