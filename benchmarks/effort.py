"""What does the fast effort lose against the thorough one, and what does it cost?

    OMP_NUM_THREADS=1 python benchmarks/effort.py [--models gpt2 minilm smollm2] [--bits 2.25 3.25 4.25 6]
        [--formats gguf] [--cache FOLDER] [--toy]

Each model is compressed with `effort="fast"` and `effort="thorough"` to the same sizes. Loss increases are
those on held-out text of another source than the calibration text; for language models, the divergence from
the dense model has the smaller standard error. `seconds` are processor seconds of this process: `plan` is
the time until the first plan is known (calibration or survey, and prices), `write` that of one further
size. The peak memory is that of a process that measures one effort alone.
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

import tensornet as tn
from tensornet.compression import measure, price, record_losses
from tensornet.compression.write import compress_blocks

sys.path.insert(0, str(Path(__file__).parent))
import subjects
from harness import RECORDS, peak_mib, processor_seconds, record
from subjects import Subject

BITS = (2.25, 3.25, 4.25, 6.0)
EFFORTS = ("fast", "thorough")


def subject_of(name: str, cache: Path, *, toy: bool) -> Subject:
    if name == "gpt2":
        return subjects.gpt2(*((8, 20_000) if toy else (256, None)))
    return subjects.minilm(cache) if name == "minilm" else subjects.smollm2(cache, calibration=64)


def measure_effort(
    subject: Subject, effort: str, bits: Sequence[float], formats: str | None
) -> list[dict[str, Any]]:
    """Compress a model to several sizes, and measure its loss and the time."""
    dense = subject.load()
    batches = subject.calibration(0)
    judged = subject.validation.get("other source", subject.judged)
    before = record_losses(dense, judged, tokens=None)
    assert before is not None
    layers = {
        "target_modules": subject.layers.target_modules,
        "exclude_modules": subject.layers.exclude_modules,
    }
    config = tn.CompressionConfig(
        bits_per_weight=bits[0],
        formats=formats,
        whole_model=False,
        effort=effort,
        **layers,  # type: ignore[arg-type]
    )

    # Find the prices once for all sizes.
    start = processor_seconds()
    stats, cache = None, {}
    if effort == "fast":
        prices = tn.survey(dense, batches, config, loss_fn=subject.losses)
    else:
        stats = tn.calibrate(dense, batches, config=config, loss_fn=subject.losses)
        prices = price(dense, config, stats)
    planning = processor_seconds() - start

    rows = []
    for size in bits:
        start = processor_seconds()
        plan = prices.plan(bits_per_weight=size)
        if stats is None:
            schemes = {x.name: (x.name, x.topology, x.storage) for x in plan}
            for _, new in compress_blocks(dense, plan, batches, factors=prices.factors):
                cache |= {schemes[name]: made for name, made in new.items()}
        small = subject.load()
        tn.apply_plan(small, plan, stats, cache=cache)
        seconds = processor_seconds() - start
        found = measure(small, before)
        rows.append(
            {
                "model": subject.name,
                "effort": effort,
                "formats": formats,
                "bits": size,
                "bits_per_weight": plan.bits_per_weight,
                "bytes": plan.bytes_after,
                "predicted": plan.predicted_loss_increase,
                "loss_increase": found.mean,
                "standard_error": found.stderr,
                "kl": found.kl_mean,
                "unit": subject.unit,
                "seconds": {"plan": round(planning, 1), "write": round(seconds, 1)},
                "peak_mib": peak_mib(),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
        cache.clear()
    return rows


def main(arguments: Sequence[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["gpt2"], choices=("gpt2", "minilm", "smollm2"))
    parser.add_argument("--bits", nargs="+", type=float, default=BITS)
    parser.add_argument("--formats", help="a menu, such as gguf")
    parser.add_argument("--efforts", nargs="+", default=EFFORTS, choices=EFFORTS)
    parser.add_argument("--cache", type=Path, default=Path("cache"), help="folder of models and texts")
    parser.add_argument("--toy", action="store_true", help="a small text, one size")
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--alone", type=Path, help="measure in this process, and write the rows to a file")
    given = parser.parse_args(arguments)
    if given.alone is not None:
        torch.set_num_threads(1)
        subject = subject_of(given.models[0], given.cache, toy=given.toy)
        rows = measure_effort(subject, given.efforts[0], given.bits, given.formats)
        given.alone.write_text(json.dumps(rows))
        return given.alone
    rows = []
    bits = given.bits[:1] if given.toy else given.bits
    with tempfile.TemporaryDirectory() as folder:
        for model in given.models:
            for effort in given.efforts:  # in a process of its own, whose peak memory is that of the effort
                file = Path(folder, "rows.json")
                command = [sys.executable, __file__, "--alone", str(file), "--models", model]
                command += ["--efforts", effort, "--cache", str(given.cache), "--bits", *map(str, bits)]
                command += ["--toy"] * given.toy + (["--formats", given.formats] if given.formats else [])
                subprocess.run(command, check=True)
                rows += json.loads(file.read_text())
    return record("effort", rows, folder=given.records)


if __name__ == "__main__":
    main()
