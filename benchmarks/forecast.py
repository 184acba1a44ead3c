"""Question: is the loss foreseen when forecasts are measured on text of a third source?

The forecasts of `quality.py` know the calibration text alone. Here each preparation is measured at three
sizes on 10,240 tokens of the PostgreSQL manual; what is then foreseen for the sizes of `quality.py` is
recorded, to be held against the losses on the Debian handbook that are in its record.

    OMP_NUM_THREADS=1 python benchmarks/forecast.py CACHE
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from harness import RECORDS, record
from quality import Bench, Job
from torch import Tensor, nn

from tensornet.compression import label_losses

LAYERS = ("mlp", "all")


def main(arguments: Sequence[str] | None = None) -> Path:
    """Measure the forecasts of both choices of layers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cache", type=Path)
    parser.add_argument("--length", type=int, default=512, help="tokens of a calibration window")
    parser.add_argument("--calibration", type=int, default=64, help="calibration windows")
    parser.add_argument("--windows", type=int, default=40, help="windows to measure on, of half that length")
    parser.add_argument("--shares", nargs="+", type=float, default=[0.9, 0.75, 0.6])
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.9, 0.8, 0.6, 0.4])
    parser.add_argument("--out", type=Path, default=RECORDS, help="folder of the record")
    given = parser.parse_args(arguments)
    bench = Bench(given.cache, 1, given.calibration, 0.0, 1, given.length)
    text = bench.text("training", given.windows, given.length // 2).split(4)
    model = bench.model()
    path, rows = given.out / "forecast.json", []
    for layers in LAYERS:
        prepared = bench.prepare(Job("ours", layers, 0.6), model)
        measured = prepared.measured(
            model, bench.stats, text, loss_fn=half_precision_losses, shares=given.shares, progress=True
        )
        for ratio in given.ratios:
            rows.append(
                {
                    "method": "ours",
                    "layers": layers,
                    "ratio": ratio,
                    "price": prepared.plan(param_ratio=ratio).predicted_loss_increase,
                    "foreseen": measured.plan(param_ratio=ratio).predicted_loss_increase,
                }
            )
            print(rows[-1], flush=True)
        points = [list(point) for point in measured.forecast.points]
        rows[-1]["points"] = points
        path = record("forecast", rows, folder=given.out, tokens=sum(batch.numel() for batch in text))
    return path


def half_precision_losses(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """As `quality.py` judges."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return label_losses(model, batch)


if __name__ == "__main__":
    main()
