"""Question: how much of a real model's language is left at a given size, and was that foreseen?

SmolLM2-135M-Instruct, calibrated on the Python tutorials, judged on the Debian handbook: perplexity over
evenly spread windows of 512 tokens. All methods use the same moments. Rows are added to the record one by
one, so a run can be cut short, repeated and extended:

    python benchmarks/quality.py CACHE --rows ours svd_llm --ratios 0.8 0.6
    python benchmarks/quality.py CACHE --layers all --rows ours --heal 600

`CACHE` holds models, texts and statistics (see `real_data.py`).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness import RECORDS, record
from real_data import prepare_models, read_text, token_windows
from torch import Tensor, nn

import tensornet as tn
from tensornet.compression import sampled_losses
from tensornet.compression.report import model_size

PROMPT = "To install a package on Debian, you first need to"
LAYERS = {"mlp": "*.mlp.*", "all": None}


@dataclass(frozen=True)
class Method:
    """A row of the table: a name for people, and the options that make it."""

    title: str
    options: dict[str, Any]


METHODS = {
    "svd": Method("truncated SVD of the weights", {"objective": "weight", "topology": "low_rank"}),
    "mpo": Method("MPO of the weights, 3 sites", {"objective": "weight", "topology": "mpo", "sites": 3}),
    "svd_llm": Method(
        "SVD whitened by inputs, same share everywhere (SVD-LLM)",
        {"objective": "activation", "pivoted": False},
    ),
    "svd_llm_pivoted": Method("the same, gauge fixed", {"objective": "activation", "pivoted": True}),
    "curvature": Method("two-sided curvature, global budget", {"objective": "curvature", "pivoted": False}),
    "ours": Method("two-sided curvature, global budget, gauge fixed", {"objective": "curvature"}),
    "mpo2": Method("MPO, 2 sites, ours", {"objective": "curvature", "topology": "mpo", "sites": 2}),
    "mpo3": Method("MPO, 3 sites, ours", {"objective": "curvature", "topology": "mpo", "sites": 3}),
    "ours_int8": Method("ours, cores in int8", {"objective": "curvature", "int8": True}),
}


def main() -> None:
    """Measure the rows asked for and add them to the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cache", type=Path)
    parser.add_argument("--rows", nargs="+", choices=[*METHODS, "dense"], default=["dense", "ours"])
    parser.add_argument("--layers", choices=list(LAYERS), default="mlp")
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.9, 0.8, 0.6, 0.4])
    parser.add_argument("--windows", type=int, default=40, help="held-out windows of 512 tokens")
    parser.add_argument("--calibration", type=int, default=64, help="calibration windows of 512 tokens")
    parser.add_argument("--heal", type=float, default=0.0, help="seconds of healing after compression")
    parser.add_argument("--heal-steps", type=int, default=10_000)
    arguments = parser.parse_args()
    folder, _ = prepare_models(arguments.cache)
    heldout = windows_of(arguments.cache, folder, "heldout", 512, arguments.windows)
    if "dense" in arguments.rows:
        model = load(folder)
        add({"method": "dense", "layers": "-", "ratio": 1.0, **judged(model, folder, heldout)})
    stats = statistics(arguments.cache, folder, arguments.calibration)
    for name in arguments.rows:
        for ratio in arguments.ratios if name != "dense" else []:
            row = measure(name, ratio, arguments, folder, heldout, stats)
            add(row)
            print(json.dumps({k: v for k, v in row.items() if k != "sample"}), flush=True)


def measure(
    name: str,
    ratio: float,
    arguments: argparse.Namespace,
    folder: Path,
    heldout: Tensor,
    stats: tn.CalibrationStats,
) -> dict[str, Any]:
    """One row: compress, judge, and heal if asked."""
    model = load(folder)
    config = tn.CompressionConfig(
        target_modules=LAYERS[arguments.layers], param_ratio=ratio, **METHODS[name].options
    )
    start = time.perf_counter()
    plan = tn.plan(model, config, stats)
    tn.apply_plan(model, plan, stats)
    row: dict[str, Any] = {
        "method": name,
        "layers": arguments.layers,
        "ratio": ratio,
        "kept": plan.params_after / plan.params_before,
        "predicted_rise": plan.predicted_loss_increase,
        "seconds": time.perf_counter() - start,
        "healed": arguments.heal,
    }
    if arguments.heal:
        text = windows_of(arguments.cache, folder, "training", 256, None)
        order = torch.randperm(len(text), generator=torch.Generator().manual_seed(0))
        batches = list(text[order].split(2))
        report = tn.heal(
            model,
            load(folder),
            batches,
            steps=arguments.heal_steps,
            max_seconds=arguments.heal,
            autocast=torch.bfloat16,
            checkpoint=arguments.cache / f"heal-{name}-{arguments.layers}-{ratio}.safetensors",
            save_every=10,
            progress=True,
        )
        row |= {"heal_steps": report.steps, "heal_tokens": report.steps * 512, "heal_seconds": report.seconds}
    return row | judged(model, folder, heldout)


@torch.no_grad()
def judged(model: nn.Module, folder: Path, heldout: Tensor) -> dict[str, Any]:
    """Perplexity, size and a sample: perplexity alone would not show loops and noise."""
    total, count = 0.0, 0
    for batch in heldout.split(2):
        logits = model(input_ids=batch).logits[:, :-1].float().flatten(0, 1)
        total += float(nn.functional.cross_entropy(logits, batch[:, 1:].flatten(), reduction="sum"))
        count += batch[:, 1:].numel()
    params, size = model_size(model)
    return {
        "perplexity": math.exp(total / count),
        "loss": total / count,
        "tokens": count,
        "model_params": params,
        "model_bytes": size,
        "sample": sample(model, folder),
    }


def sample(model: nn.Module, folder: Path) -> str:
    """A greedy continuation of the prompt."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)  # type: ignore[operator]
    text = str(tokenizer.decode(made[0], skip_special_tokens=True))
    return " ".join(text.split()).replace("`", "'")  # goes into tables


def load(folder: Path) -> Any:
    """The dense model in float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def windows_of(cache: Path, folder: Path, use: str, length: int, count: int | None) -> Tensor:
    """Windows of one text, tokenised once and kept in the cache."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer

    path = cache / f"{use}-{length}.safetensors"
    if not path.is_file():
        text = read_text(cache / "texts", use)
        save_file(
            {"windows": token_windows(AutoTokenizer.from_pretrained(folder), text, length=length)}, path
        )
    windows = load_file(path)["windows"]
    if count is None or count >= len(windows):
        return windows
    return windows[torch.linspace(0, len(windows) - 1, count).long()]


def statistics(cache: Path, folder: Path, count: int) -> tn.CalibrationStats:
    """Moments of the calibration text, collected once and kept in the cache."""
    path = cache / f"moments-{count}.safetensors"
    if path.is_file():
        return tn.CalibrationStats.load(path)
    batches = windows_of(cache, folder, "calibration", 512, count).split(2)
    torch.manual_seed(0)
    source = f"{count} x 512 tokens of the Python tutorials"
    stats = tn.calibrate(load(folder), batches, loss_fn=sampled_losses, source=source, progress=True)
    stats.save(path)
    return stats


def add(row: dict[str, Any]) -> None:
    """Put a row into the record in place of an earlier one of the same kind."""
    path = RECORDS / "quality.json"
    rows = json.loads(path.read_text())["rows"] if path.is_file() else []
    key = ("method", "layers", "ratio", "healed", "tokens")
    rows = [old for old in rows if any(old.get(k) != row.get(k) for k in key)]
    record("quality", [*rows, row], prompt=PROMPT)


if __name__ == "__main__":
    main()
