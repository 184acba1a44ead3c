"""What does the fast effort lose against the thorough one, and what does it cost?

    OMP_NUM_THREADS=1 python benchmarks/effort.py [--models gpt2 minilm smollm2] [--bits 2.25 3.25 4.25 6]
        [--max-bytes 118e6 104e6 94e6] [--cache FOLDER] [--toy]

Each model is compressed with `effort="fast"` and `effort="thorough"` to the same sizes: bits per weight of
its linear layers, or bytes of a GGUF file (`--max-bytes`). Loss increases and divergences are those on
held-out text of another source than the calibration text; divergences of language models have the smaller
standard errors. `plan` gives the processor seconds of this process until the first plan is known, `write`
those of each size. The peak memory is that of a process that measures one effort alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tensornet as tn
from tensornet.compression import measure, record_losses
from tensornet.compression.write import compress_blocks
from tensornet.softmax_losses import kl_divergences
from tensornet_hf.compress import for_target

sys.path.insert(0, str(Path(__file__).parent))
import subjects
from harness import RECORDS, peak_mib, processor_seconds, record
from subjects import Batches, Subject

BITS = (2.25, 3.25, 4.25, 6.0)
EFFORTS = ("fast", "thorough")


def subject_of(name: str, cache: Path, *, toy: bool) -> Subject:
    if name == "gpt2":
        return subjects.gpt2(*((8, 20_000) if toy else (256, None)))
    return subjects.minilm(cache) if name == "minilm" else subjects.smollm2(cache, calibration=64)


@torch.no_grad()
def divergence(dense: nn.Module, small: nn.Module, batches: Batches) -> tuple[float, float]:
    """Compute the mean divergence from a dense model over all tokens, and its standard error."""
    parts = [
        kl_divergences(small(**batch).logits.flatten(0, 1), dense(**batch).logits.flatten(0, 1))
        for batch in batches
    ]
    found = torch.cat(parts).double()
    return float(found.mean()), float(found.std()) / len(found) ** 0.5


def measure_effort(
    subject: Subject, effort: Any, budget: str, sizes: Sequence[float]
) -> list[dict[str, Any]]:
    """Compress a model to several sizes, and measure its loss and the time.

    Args:
        subject: the model and its texts.
        effort: `"fast"` or `"thorough"`.
        budget: `"bits_per_weight"` of the linear layers, or `"max_bytes"` of a GGUF file.
        sizes: values of the budget.
    """
    dense = subject.load()
    batches = subject.calibration(0)
    judged = subject.validation.get("other source", subject.judged)
    before = record_losses(dense, judged, tokens=None)
    assert before is not None

    def config_of(size: float) -> tn.CompressionConfig:
        if budget == "max_bytes":
            config = tn.CompressionConfig(max_bytes=int(size), formats="gguf", effort=effort)
            return for_target("gguf", config, dense, subject.folder)
        targets, left_out = subject.layers.target_modules, subject.layers.exclude_modules
        return tn.CompressionConfig(targets, left_out, bits_per_weight=size, effort=effort)

    # Survey the model once for all sizes.
    start = processor_seconds()
    survey = tn.survey(dense, batches, config_of(sizes[0]), loss_fn=subject.losses)
    planning = processor_seconds() - start

    rows = []
    for size in sizes:
        start = processor_seconds()
        plan = survey.with_config(config_of(size)).plan()
        schemes = {x.name: (x.name, x.topology, x.storage) for x in plan}
        cache = {}
        for _, new in compress_blocks(dense, plan, batches, factors=survey.factors):
            cache |= {schemes[name]: made for name, made in new.items()}
        small = subject.load()
        tn.apply_plan(small, plan, cache=cache)
        seconds = processor_seconds() - start
        found = measure(small, before)
        kl = (None, None) if subject.encoder else divergence(dense, small, judged)
        rows.append(
            {
                "model": subject.name,
                "effort": effort,
                budget: size,
                "bits": plan.bits_per_weight,
                "bytes": plan.bytes_after,
                "networks": sum(x.topology is not None and x.topology.family != "dense" for x in plan),
                "predicted": plan.predicted_loss_increase,
                "loss_increase": found.mean,
                "standard_error": found.stderr,
                "kl": kl[0],
                "kl_standard_error": kl[1],
                "unit": subject.unit,
                "seconds": {"plan": round(planning, 1), "write": round(seconds, 1)},
                "peak_mib": peak_mib(),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main(arguments: Sequence[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["gpt2"], choices=("gpt2", "minilm", "smollm2"))
    parser.add_argument("--bits", nargs="+", type=float, default=BITS)
    parser.add_argument("--max-bytes", nargs="+", type=float, help="sizes of GGUF files, instead of --bits")
    parser.add_argument("--efforts", nargs="+", default=EFFORTS, choices=EFFORTS)
    parser.add_argument("--cache", type=Path, default=Path("cache"), help="folder of models and texts")
    parser.add_argument("--toy", action="store_true", help="a small text, one size")
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--alone", type=Path, help="measure in this process, and write the rows to a file")
    given = parser.parse_args(arguments)
    if given.alone is not None:
        torch.set_num_threads(1)
        subject = subject_of(given.models[0], given.cache, toy=given.toy)
        budget = "bits_per_weight" if given.max_bytes is None else "max_bytes"
        rows = measure_effort(subject, given.efforts[0], budget, given.max_bytes or given.bits)
        given.alone.write_text(json.dumps(rows))
        return given.alone
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for model in given.models:
            for effort in given.efforts:  # in a process of its own, whose peak memory is that of the effort
                file = Path(folder, "rows.json")
                command = [sys.executable, __file__, "--alone", str(file), "--models", model]
                command += ["--efforts", effort, "--cache", str(given.cache)]
                sizes = given.max_bytes or given.bits
                name = "--bits" if given.max_bytes is None else "--max-bytes"
                command += [name, *map(str, sizes[:1] if given.toy else sizes)] + ["--toy"] * given.toy
                subprocess.run(command, check=True)
                rows += json.loads(file.read_text())
    return record("effort", rows, folder=given.records)


if __name__ == "__main__":
    main()
