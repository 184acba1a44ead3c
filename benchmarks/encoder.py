"""Question: what is left of a real sentence encoder, by the cosine of its outputs and in a retrieval task?

all-MiniLM-L6-v2: the second halves of 400 paragraphs of the Debian handbook are found by their first halves.
Calibrated on paragraphs of the Python tutorials; the loss whose curvature counts is the cosine of the pooled
outputs, so the forecast is of one minus the cosine.

    python benchmarks/encoder.py CACHE
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from harness import RECORDS, record
from real_data import prepare_models, read_text
from torch import Tensor, nn

import tensornet as tn
from tensornet.compression import cosine_losses

METHODS: dict[str, dict[str, Any]] = {
    "svd": {"objective": "weight", "topology": "low_rank"},
    "svd_llm": {"objective": "activation", "pivoted": False},
    "ours": {"objective": "curvature"},
}


def main(arguments: Sequence[str] | None = None) -> Path:
    """Compress by each method at each share, and record cosines and hits."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cache", type=Path)
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.9, 0.8, 0.6, 0.4])
    parser.add_argument("--pairs", type=int, default=400)
    parser.add_argument("--calibration", type=int, default=512, help="paragraphs")
    parser.add_argument("--out", type=Path, default=RECORDS, help="folder of the record")
    given = parser.parse_args(arguments)
    _, folder = prepare_models(given.cache)
    texts = given.cache / "texts"
    pairs = halves(read_text(texts, "heldout"), given.pairs)
    known = paragraphs(read_text(texts, "calibration"))[: given.calibration]
    model = load(folder)
    stats = tn.calibrate(model, batches(folder, known), loss_fn=cosine_losses, source="Python tutorials")
    dense = [embed(model, folder, side) for side in pairs]
    rows = [{"method": "dense", "ratio": 1.0, "cosine": 1.0, "top1": hits(*dense)}]
    for ratio in given.ratios:
        for name, options in METHODS.items():
            model = load(folder)
            plan = tn.plan(model, tn.CompressionConfig(param_ratio=ratio, **options), stats)
            tn.apply_plan(model, plan, stats)
            made = [embed(model, folder, side) for side in pairs]
            cosine = float(torch.cat([(a * b).sum(1) for a, b in zip(dense, made, strict=True)]).mean())
            rows.append(
                {
                    "method": name,
                    "ratio": ratio,
                    "kept": plan.params_after / plan.params_before,
                    "cosine": cosine,
                    "predicted_cosine": None
                    if plan.predicted_loss_increase is None
                    else 1 - plan.predicted_loss_increase,
                    "top1": hits(*made),
                }
            )
            print(rows[-1], flush=True)
    return record("encoder", rows, folder=given.out)


def paragraphs(text: str) -> list[str]:
    """Paragraphs of 300 to 700 characters, evenly spread over the text by their order."""
    return [block for block in text.split("\n\n") if 300 <= len(block) <= 700]


def halves(text: str, count: int) -> tuple[list[str], list[str]]:
    """First and second halves of evenly spread paragraphs, cut between words."""
    found = paragraphs(text)
    chosen = [found[int(k)] for k in torch.linspace(0, len(found) - 1, count)]
    cuts = [
        block.index(" ", len(block) // 2) if " " in block[len(block) // 2 :] else len(block) // 2
        for block in chosen
    ]
    first = [block[:cut] for block, cut in zip(chosen, cuts, strict=True)]
    return first, [block[cut:] for block, cut in zip(chosen, cuts, strict=True)]


def batches(folder: Path, texts: list[str]) -> list[dict[str, Tensor]]:
    """Padded batches of 32."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    parts = [texts[k : k + 32] for k in range(0, len(texts), 32)]
    return [
        dict(tokenizer(part, padding=True, truncation=True, max_length=128, return_tensors="pt"))
        for part in parts
    ]


@torch.no_grad()
def embed(model: nn.Module, folder: Path, texts: list[str]) -> Tensor:
    """Mean-pooled unit vectors, shape `(texts, width)`."""
    found = []
    for batch in batches(folder, texts):
        hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None].to(hidden)
        found.append(nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
    return torch.cat(found)


def hits(first: Tensor, second: Tensor) -> float:
    """Share of first halves whose nearest second half is their own."""
    return float(((first @ second.T).argmax(1) == torch.arange(len(first))).float().mean())


def load(folder: Path) -> Any:
    """The dense encoder in float32."""
    from transformers import AutoModel

    return AutoModel.from_pretrained(folder, dtype=torch.float32).eval()


if __name__ == "__main__":
    main()
