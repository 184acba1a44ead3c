"""Question: what does compressing a real model take, and what comes out?

SmolLM2-135M-Instruct, all linear layers at one share of their parameters: seconds, peak memory, file sizes
and perplexity, each stage in the same process.

    python benchmarks/real_model.py CACHE --ratio 0.8
"""

from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from harness import record
from quality import judged, load, statistics, windows_of
from real_data import prepare_models

import tensornet as tn
import tensornet_hf as th


def main() -> None:
    """Compress, save, load again, judge both, and record it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cache", type=Path)
    parser.add_argument("--ratio", type=float, default=0.8)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--calibration", type=int, default=64)
    arguments = parser.parse_args()
    folder, _ = prepare_models(arguments.cache)
    heldout = windows_of(arguments.cache, folder, "heldout", 512, arguments.windows)
    row: dict[str, Any] = {"ratio": arguments.ratio}
    model = load(folder)
    row["dense"] = {**judged(model, folder, heldout), "file_bytes": file_bytes(folder)}
    start = time.perf_counter()
    stats = statistics(arguments.cache, folder, arguments.calibration)
    row["calibration_seconds"] = time.perf_counter() - start  # next to nothing where they were in the cache
    start = time.perf_counter()
    report = tn.compress(model, tn.CompressionConfig(param_ratio=arguments.ratio), calibration=stats)
    row["compression_seconds"] = time.perf_counter() - start
    row["predicted_rise"] = report.plan.predicted_loss_increase
    with TemporaryDirectory() as destination:
        model.save_pretrained(destination)
        row["file_bytes"] = file_bytes(Path(destination))
        start = time.perf_counter()
        loaded = th.load(destination).eval()
        row["load_seconds"] = time.perf_counter() - start
        row["compressed"] = judged(loaded, folder, heldout)
    row["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(record("real_model", [row]))


def file_bytes(folder: Path) -> int:
    """Size of the weight files."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


if __name__ == "__main__":
    main()
