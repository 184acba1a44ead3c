"""How many bits per weight does entropy coding save in the file, at the same predicted loss increase?

For every size, a plan with all formats of the library, including tables of levels and networks, is compared
with the smallest plan with `formats="entropy"` that has the same predicted loss increase. Both are applied
and saved. `file_bits` is the number of bits per weight of the layers in the safetensors file. The loss
increase and the divergence are measured on text from a different source than the calibration text.
`decode_seconds` is the processor time of decoding all layers after loading; `memory_bits` is the number of
bits per weight in memory afterwards, coded bytes and 8-bit integers together. `--every` compresses only some
of the blocks.

    OMP_NUM_THREADS=1 python benchmarks/entropy.py [--toy] [--cache CACHE] [--every 5] [--work WORK]

Writes `entropy.json`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
import subjects
from harness import RECORDS, processor_seconds, record
from subjects import Subject, tokens_of

import tensornet as tn
import tensornet_hf as th
from tensornet.compression import Prepared, measure, prepare, record_losses
from tensornet.compression.config import DEFAULT_FORMATS
from tensornet.compression.loss_increase import RecordedLosses
from tensornet.nn.storage import PackedCore
from tensornet.nn.targets import LayerSelection

SIZES = (4.25, 3.25)
TABLES = ("nl4:g32:float8", "nl3:g32:float8", "nl2:g32:float8")
MENUS: dict[str, Any] = {"all formats": (*DEFAULT_FORMATS, *TABLES), "entropy": "entropy"}


def statistics(subject: Subject, dense: nn.Module, work: Path | None) -> tn.CalibrationStats:
    """Calibrate on all windows of seed 0, or read the statistics of an earlier run."""
    path = (
        None
        if work is None
        else work / f"{subject.name}-{len(subject.layers.target_modules or ())}.safetensors"
    )
    if path is not None and path.is_file():
        return tn.CalibrationStats.load(path)
    batches = subject.calibration(0)
    options = {"config": subject.layers, "loss_fn": subject.losses, "tokens": tokens_of(batches)}
    stats = tn.calibrate(dense, batches, autocast=torch.bfloat16, **options)
    if path is not None:
        stats.save(path)
    return stats


def saved(model: Any, plan: tn.CompressionPlan, source: Path) -> dict[str, float]:
    """Save a model, and measure the bits of its layers in the file and, after loading, in memory."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        th.save(model, folder, source=source)
        size = 0
        for path in folder.glob("*.safetensors"):
            with safetensors.safe_open(str(path), "pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    if any(name.startswith(f"{layer.name}.") for layer in plan) and not name.endswith("bias"):
                        size += file.get_tensor(name).nbytes
        again = th.load(folder)
    cores = [core for core in again.modules() if isinstance(core, PackedCore) and core.number_format.rate]
    for core in cores:
        core._decoded = None  # loading has decoded it already
    start = processor_seconds()
    codes = sum(core.packed_codes().nbytes for core in cores)
    return {
        "file_bits": 8 * size / plan.params_before,
        "decode_seconds": processor_seconds() - start,
        "decoded_weights": codes,
        "memory_bits": 8 * (size + codes) / plan.params_before,
    }


def row(
    subject: Subject, dense: RecordedLosses, prepared: Prepared, plan: tn.CompressionPlan
) -> dict[str, Any]:
    """Apply a plan to a new model, measure its loss, save it, and measure the file."""
    small, start = subject.load(), processor_seconds()
    tn.apply_plan(small, plan, prepared.stats)
    seconds = processor_seconds() - start
    found = measure(small, dense)
    return {
        "planned_bits": plan.bits_per_weight,
        "predicted": plan.predicted_loss_increase,
        "loss_increase": found.mean,
        "standard_error": found.stderr,
        "kl": found.kl_mean,
        "kl_standard_error": found.kl_stderr,
        "round_seconds": seconds,
        **saved(small, plan, subject.folder),
    }


def bits_for(prepared: Prepared, loss_increase: float, most: float) -> float:
    """Find the fewest bits per weight with which the plan meets a limit on the predicted loss increase.

    Args:
        prepared: the candidates.
        loss_increase: limit of the predicted loss increase.
        most: upper end of the search, which must meet the limit; the lower end is one bit less.
    """
    low, high = most - 1, most
    while high - low > 0.001:
        middle = (low + high) / 2
        predicted = prepared.plan(bits_per_weight=middle).predicted_loss_increase
        low, high = (low, middle) if predicted <= loss_increase else (middle, high)
    return high


def run(subject: Subject, sizes: Sequence[float], work: Path | None, folder: Path) -> None:
    """Compare plans with and without entropy coding at equal predicted loss, for every size."""
    dense = subject.load()
    stats = statistics(subject, dense, work)
    losses = record_losses(dense, subject.judged, source="judged", tokens=None)
    assert losses is not None
    known: dict[str, Prepared] = {}
    seconds = {}
    for name, formats in MENUS.items():
        start = processor_seconds()
        config = tn.CompressionConfig(formats=formats, bits_per_weight=4.25, **asdict(subject.layers))
        known[name] = prepare(dense, config, stats)
        seconds[name] = processor_seconds() - start
    rows: list[dict[str, Any]] = []
    for bits in sizes:
        wanted = known["all formats"].plan(bits_per_weight=bits).predicted_loss_increase
        for name, prepared in known.items():
            size = bits if name == "all formats" else bits_for(prepared, wanted, bits)
            made = row(subject, losses, replace(prepared, made={}), prepared.plan(bits_per_weight=size))
            origin = {"model": subject.name, "rotated": subject.rotated, "layers": len(prepared.targets)}
            origin |= {"judged_tokens": tokens_of(subject.judged), "unit": subject.unit, "seed": 0}
            rows.append({**origin, "menu": name, "bits": bits, "plan_seconds": seconds[name], **made})
            print(rows[-1], flush=True)
            record("entropy", rows, folder=folder, dtype="float32")


def every_block(subject: Subject, every: int) -> Subject:
    """Restrict a subject to the linear layers of every `every`-th block."""
    names = [
        name for name, x in subject.load().named_modules() if isinstance(x, nn.Linear) and ".layers." in name
    ]
    chosen = tuple(x for x in names if int(x.split(".layers.")[1].split(".")[0]) % every == every // 2)
    return replace(subject, layers=LayerSelection(target_modules=chosen))


def main(arguments: Sequence[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--toy", action="store_true", help="two layers of the embedded model, few tokens")
    parser.add_argument("--sizes", nargs="+", type=float, default=list(SIZES))
    parser.add_argument("--every", type=int, default=1, help="compress only every n-th block")
    parser.add_argument("--cache", type=Path, help="folder of models and texts, see subjects.py")
    parser.add_argument("--work", type=Path, help="folder of calibration statistics, to continue runs")
    parser.add_argument("--records", type=Path, default=RECORDS)
    given = parser.parse_args(arguments)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if given.toy:
            few = LayerSelection(target_modules=("h.3.attn.c_proj", "h.2.attn.c_proj"))
            run(subjects.gpt2(count=8, limit=8_000, layers=few), given.sizes[:1], None, given.records)
        else:
            subject = subjects.smollm2(given.cache)
            subject = every_block(subject, given.every) if given.every > 1 else subject
            run(subject, given.sizes, given.work, given.records)
    finally:
        torch.set_num_threads(before)
    return given.records / "entropy.json"


if __name__ == "__main__":
    print(main())
