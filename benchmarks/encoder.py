"""Question: what is left of a real sentence encoder, by the cosine of its outputs and in a retrieval task?

all-MiniLM-L6-v2: the second halves of 400 paragraphs of the Debian handbook are found by their first halves.
Calibrated on paragraphs of the Python tutorials; the loss whose curvature counts is the cosine of the pooled
outputs, so the forecast is of one minus the cosine. It is also corrected by cosines measured on other
paragraphs of the handbook, and on the PostgreSQL manual. Healing takes ten minutes of processor time on that
manual. Rows that the record has already are skipped.

    OMP_NUM_THREADS=1 python benchmarks/encoder.py CACHE
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from harness import RECORDS, record
from real_data import prepare_models, read_text
from torch import Tensor, nn

import tensornet as tn
from tensornet.calibration import cosine_losses
from tensornet.compression import prepare
from tensornet.healing import refine

METHODS: dict[str, dict[str, Any]] = {
    "svd": {"objective": "weight", "topology": "low_rank"},
    "svd_llm": {"objective": "activation", "pivoted": False},
    "ours": {"objective": "curvature"},
}
LAYERS = {"all": None, "mlp": ("*.intermediate.dense", "encoder.layer.?.output.dense")}
TABLE = (("all", "ours"), ("all", "svd_llm"), ("all", "svd"), ("mlp", "ours"), ("mlp", "svd_llm"))


def main(arguments: Sequence[str] | None = None) -> Path:
    """Compress by each method at each keep ratio, and record cosines and hits."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cache", type=Path)
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.9, 0.8, 0.6, 0.4, 0.3])
    parser.add_argument("--pairs", type=int, default=400)
    parser.add_argument("--calibration", type=int, default=512, help="paragraphs")
    parser.add_argument("--validation", type=int, default=128, help="paragraphs")
    parser.add_argument("--heal-seconds", type=float, default=600.0)
    parser.add_argument("--out", type=Path, default=RECORDS, help="folder of the record")
    given = parser.parse_args(arguments)
    _, folder = prepare_models(given.cache)
    known, judged, third = (
        read_text(given.cache / "texts", use) for use in ("calibration", "heldout", "training")
    )
    pairs, unused = halves(judged, given.pairs)
    validation = {
        "foreseen here": batches(folder, spread(unused, given.validation)),
        "foreseen elsewhere": batches(folder, spread(paragraphs(third), given.validation)),
    }
    fresh = batches(folder, paragraphs(known)[given.calibration : 2 * given.calibration])
    texts = paragraphs(third)
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
    healing = batches(folder, [texts[k] for k in order], size=8)
    model = load(folder)
    observed = batches(folder, paragraphs(known)[: given.calibration])
    stats = tn.calibrate(model, observed, loss_fn=cosine_losses, source="Python tutorials")
    dense = [embed(model, folder, side) for side in pairs]
    path = given.out / "encoder.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.is_file() else []
    if not rows:
        rows = [
            {"method": "dense", "layers": "-", "ratio": 1.0, "after": "", "cosine": 1.0, "top1": hits(*dense)}
        ]

    def missing(layers: str, method: str, ratio: float, after: str = "") -> bool:
        wanted = (layers, method, ratio, after)
        return all((r["layers"], r["method"], r["ratio"], r["after"]) != wanted for r in rows)

    def add(model: nn.Module, row: dict[str, Any]) -> None:
        made = [embed(model, folder, side) for side in pairs]
        cosine = float(torch.cat([(a * b).sum(1) for a, b in zip(dense, made, strict=True)]).mean())
        rows.append({**row, "cosine": cosine, "top1": hits(*made)})
        print(rows[-1], flush=True)
        record("encoder", rows, folder=given.out)

    for layers, method in TABLE:
        afters = ("", "refined", "healed") if (layers, method) == TABLE[0] else ("",)
        ratios = [x for x in given.ratios if any(missing(layers, method, x, after) for after in afters)]
        if not ratios:
            continue
        options, patterns = METHODS[method], LAYERS[layers]
        config = tn.CompressionConfig(target_modules=patterns, param_ratio=0.6, **options)
        prepared = prepare(model, config, stats)
        forecasts = {}
        if prepared.objective == "curvature":
            forecasts = {name: prepared.measured(model, stats, x) for name, x in validation.items()}
        for ratio in ratios:
            plan = prepared.plan(param_ratio=ratio)
            price = plan.predicted_loss_increase
            row = {"method": method, "layers": layers, "ratio": ratio, "after": ""}
            foreseen = {"price": price} | {
                name: forecast.plan(param_ratio=ratio).predicted_loss_increase
                for name, forecast in forecasts.items()
            }
            small = load(folder)
            tn.apply_plan(small, plan, stats)
            if missing(layers, method, ratio):
                add(small, {**row, **foreseen, "kept": plan.params_after / plan.params_before})
            if "refined" in afters and missing(layers, method, ratio, "refined"):
                report = refine(small, model, [*observed, *fresh], stats)
                add(small, {**row, "after": "refined", "refine_kept": report.kept})
            if "healed" in afters and missing(layers, method, ratio, "healed"):
                small = load(folder)
                tn.apply_plan(small, plan, stats)
                healed = tn.heal(
                    small,
                    model,
                    healing,
                    steps=10_000,
                    max_seconds=given.heal_seconds,
                    clock=time.process_time,
                    autocast=torch.bfloat16,
                )
                add(small, {**row, "after": "healed", "heal_steps": healed.steps})
    return path


def spread(texts: Sequence[str], count: int) -> list[str]:
    """Select evenly spread texts."""
    return [texts[int(k)] for k in torch.linspace(0, len(texts) - 1, min(count, len(texts)))]


def paragraphs(text: str) -> list[str]:
    """List the paragraphs of 300 to 700 characters."""
    return [block for block in text.split("\n\n") if 300 <= len(block) <= 700]


def halves(text: str, count: int) -> tuple[tuple[list[str], list[str]], list[str]]:
    """Split evenly spread paragraphs into first and second halves; return the other paragraphs too."""
    found = paragraphs(text)
    chosen = spread(found, count)
    taken = set(chosen)
    cuts = [
        block.index(" ", len(block) // 2) if " " in block[len(block) // 2 :] else len(block) // 2
        for block in chosen
    ]
    first = [block[:cut] for block, cut in zip(chosen, cuts, strict=True)]
    second = [block[cut:] for block, cut in zip(chosen, cuts, strict=True)]
    return (first, second), [block for block in found if block not in taken] or found


def batches(folder: Path, texts: list[str], size: int = 32) -> list[dict[str, Tensor]]:
    """Tokenize texts to padded batches."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    parts = [texts[k : k + size] for k in range(0, len(texts), size)]
    return [
        dict(tokenizer(part, padding=True, truncation=True, max_length=128, return_tensors="pt"))
        for part in parts
    ]


@torch.no_grad()
def embed(model: nn.Module, folder: Path, texts: list[str]) -> Tensor:
    """Compute mean-pooled unit vectors, shape `(texts, width)`."""
    found = []
    for batch in batches(folder, texts):
        hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None].to(hidden)
        found.append(nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
    return torch.cat(found)


def hits(first: Tensor, second: Tensor) -> float:
    """Return the fraction of first halves whose nearest second half is their own."""
    return float(((first @ second.T).argmax(1) == torch.arange(len(first))).float().mean())


def load(folder: Path) -> Any:
    """Load the dense encoder in float32."""
    from transformers import AutoModel

    return AutoModel.from_pretrained(folder, dtype=torch.float32).eval()


if __name__ == "__main__":
    main()
