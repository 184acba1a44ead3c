"""What does compressing a real language model cost, in seconds, memory, bytes and perplexity?

SmolLM2-135M-Instruct is compressed at several budgets, saved, loaded again and evaluated on text of another
source than it was calibrated on; each budget beside the plain truncated SVD of the same size. See
`real_data.py` for where the model and the texts come from (nothing of it is committed).

    python benchmarks/real_model.py --cache CACHE [--ratios 0.8 0.6] [--windows 40]

`--toy` does the same with the embedded GPT-2 and its text, in seconds and without a download.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness import RECORDS, record
from real_data import prepare_models, read_text, token_windows
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import tensornet as tn
import tensornet_hf as th
from tensornet.streaming.worker import peak_memory
from tensornet_hf.embedded import calibration_text, gpt2_path, heldout_text
from tensornet_hf.text.perplexity import perplexity

SEED = 0


@dataclass(frozen=True)
class Setting:
    """One model with its texts.

    Args:
        folder: of the dense model.
        calibration: windows of token ids, shape `(count, length)`.
        heldout: windows of token ids, shape `(count, context)`.
        prompt: for the samples.
    """

    folder: Path
    calibration: Tensor
    heldout: Tensor
    prompt: str


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run the benchmark and write its record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cache", type=Path, help="folder for the model and the texts")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.8, 0.6], help="shares to keep")
    parser.add_argument("--calibration", type=int, default=64, help="calibration windows of 512 tokens")
    parser.add_argument("--gradients", type=int, default=32, help="of these, also differentiated")
    parser.add_argument("--windows", type=int, default=40, help="held-out windows of 512 tokens")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--toy", action="store_true", help="the embedded GPT-2, one small budget")
    options = parser.parse_args(arguments)
    if options.cache is None and not options.toy:
        parser.error("--cache is needed, or --toy")
    torch.set_num_threads(options.threads)
    torch.manual_seed(SEED)
    setting = _toy() if options.toy else _smollm2(options.cache, options.calibration, options.windows)
    ratios = [0.5] if options.toy else options.ratios
    rows = measure(setting, ratios, gradient_windows=2 if options.toy else options.gradients)
    return record(
        "real_model",
        rows,
        folder=options.records,
        question=(__doc__ or "").splitlines()[0],
        model="embedded GPT-2" if options.toy else "SmolLM2-135M-Instruct, every linear layer but the head",
        heldout_tokens=setting.heldout.numel(),
        calibration_tokens=setting.calibration.numel(),
        threads=options.threads,
        seed=SEED,
    )


def measure(setting: Setting, ratios: Sequence[float], *, gradient_windows: int) -> list[dict[str, Any]]:
    """Measure one row for the dense model, then two for each budget: this library and plain SVD."""
    model = _load_dense(setting.folder)
    rows = [_row("dense", 1.0, model, setting, folder=setting.folder)]
    start = time.perf_counter()
    stats = tn.calibrate(
        model,
        list(setting.calibration.split(2)),
        fisher="sampled",
        gradient_batches=gradient_windows // 2,
        progress=True,
    )
    calibrated = time.perf_counter() - start
    for ratio in ratios:
        for name, config, statistics in (
            ("curvature", tn.CompressionConfig(param_ratio=ratio, objective="curvature"), stats),
            ("plain SVD", _plain_svd(ratio), None),
        ):
            del model
            gc.collect()
            model = _load_dense(setting.folder)
            report = tn.compress(model, config, calibration=statistics)
            with tempfile.TemporaryDirectory() as scratch:
                folder = th.save_model(model, Path(scratch) / "model", source=setting.folder)
                start = time.perf_counter()
                model = th.load(folder)
                seconds = {
                    "calibrate_s": calibrated if statistics is not None else 0.0,
                    "compress_s": report.seconds,
                    "load_s": time.perf_counter() - start,
                }
                row = _row(name, ratio, model, setting, folder=folder)
            predicted = report.plan.predicted_loss_increase if statistics is not None else None
            rows.append(row | seconds | {"predicted_rise": predicted, "kept": report.param_ratio})
    return rows


def _plain_svd(ratio: float) -> tn.CompressionConfig:
    return tn.CompressionConfig(param_ratio=ratio, topology="low_rank", objective="weight")


def _row(
    method: str, ratio: float, model: PreTrainedModel, setting: Setting, *, folder: Path
) -> dict[str, Any]:
    context = setting.heldout.shape[1]
    start = time.perf_counter()
    result = perplexity(model, setting.heldout.reshape(-1), context=context, batch_size=2, progress=True)
    return {
        "method": method,
        "param_ratio": ratio,
        "parameters": sum(p.numel() for p in model.parameters()),
        "file_bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        "perplexity": result.perplexity,
        "evaluate_s": time.perf_counter() - start,
        # Of the whole process so far, so a later row can only say what its predecessors did not exceed.
        "peak_memory_mb": peak_memory() / 2**20,
        "sample": _sample(model, setting),
    }


@torch.no_grad()
def _sample(model: PreTrainedModel, setting: Setting) -> str:
    tokenizer = AutoTokenizer.from_pretrained(setting.folder)
    inputs = tokenizer(setting.prompt, return_tensors="pt")
    torch.manual_seed(SEED)
    tokens = model.generate(**inputs, max_new_tokens=40, do_sample=True, temperature=0.7, top_k=40)
    return tokenizer.decode(tokens[0], skip_special_tokens=True)


def _load_dense(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _smollm2(cache: Path, calibration: int, windows: int) -> Setting:
    folder, _ = prepare_models(cache)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = cache / "texts"
    return Setting(
        folder=folder,
        calibration=token_windows(tokenizer, read_text(texts, "calibration"), length=512, count=calibration),
        heldout=token_windows(tokenizer, read_text(texts, "heldout"), length=512, count=windows),
        prompt="The most important thing about a garden is",
    )


def _toy() -> Setting:
    tokenizer = AutoTokenizer.from_pretrained(gpt2_path())
    return Setting(
        folder=gpt2_path(),
        calibration=token_windows(tokenizer, calibration_text()[:20_000], length=128, count=6),
        heldout=token_windows(tokenizer, heldout_text()[:20_000], length=128, count=6),
        prompt="And the LORD said unto",
    )


if __name__ == "__main__":
    sys.stdout.write(f"{main()}\n")
