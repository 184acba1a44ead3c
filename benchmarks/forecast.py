"""Question: is the loss increase predicted, on text like that of the forecast and on other text?

The price of a plan knows the calibration text alone. `PreparedPlan.measured` corrects it by losses on a
validation text at three sizes. Here that is done with each of three sources in turn, 40 windows of 512 tokens
of each, and held against the losses on 40 other windows of each source: the Debian handbook (those of
`quality.py`), the PostgreSQL manual, and the Python tutorials, windows of which also served for calibration.

    OMP_NUM_THREADS=1 python benchmarks/forecast.py CACHE

`CACHE` as for `quality.py`. Forward passes run in bfloat16, of the dense model as well.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import RECORDS, record
from quality import Bench, Job, spread
from torch import Tensor, nn

import tensornet as tn
from tensornet.calibration import label_losses
from tensornet.compression import PreparedPlan
from tensornet.compression.forecast import Forecast, light_copy, mean_loss

#: Uses of text in `real_data.SOURCES`.
SOURCES = ("heldout", "training", "calibration")


def main(arguments: Sequence[str] | None = None) -> Path:
    """Measure loss increases on every source, and predict them from every source."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cache", type=Path)
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--calibration", type=int, default=64, help="calibration windows")
    parser.add_argument("--windows", type=int, default=40, help="windows to measure on, and to judge by")
    parser.add_argument("--shares", nargs="+", type=float, default=[0.9, 0.75, 0.6])
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.9, 0.8, 0.6, 0.4])
    parser.add_argument("--methods", nargs="+", default=["ours"])
    parser.add_argument("--layers", nargs="+", default=["mlp", "all"])
    parser.add_argument("--out", type=Path, default=RECORDS, help="folder of the record")
    given = parser.parse_args(arguments)
    bench = Bench(given.cache, given.windows, given.calibration, 0.0, 1, given.length)
    model = bench.model()
    texts = {source: disjoint(bench, source, given.windows) for source in SOURCES}
    losses = partial(losses_on, texts=texts)
    dense = losses(model)
    path, rows = given.out / "forecast.json", []
    for method in given.methods:
        for layers in given.layers:
            prepared = bench.prepare(Job(method, layers, min(given.shares)), model)
            rises = {
                share: rises_at(prepared, share, model, bench.stats(method), losses, dense)
                for share in sorted({*given.shares, *given.ratios}, reverse=True)
            }
            for ratio in given.ratios:
                price = prepared.plan(param_ratio=ratio).predicted_loss_increase
                assert price is not None
                row = {"method": method, "layers": layers, "ratio": ratio, "price": price}
                for source in SOURCES:
                    points = [(rises[s]["price"], rises[s][f"{source} measured"]) for s in given.shares]
                    row[f"foreseen {source}"] = Forecast.through(points).rise(price)
                    row[f"rise {source}"] = rises[ratio][f"{source} judged"]
                rows.append(row)
                print(row, flush=True)
            path = record("forecast", rows, folder=given.out, windows=given.windows, length=given.length)
    return path


def disjoint(bench: Bench, source: str, count: int) -> tuple[Tensor, Tensor]:
    """Select evenly spread windows to measure on, and others to judge by (those of `quality.py`).

    Windows of the calibration text that served for calibration are in neither.
    """
    windows = bench.text(source, None)
    free = torch.ones(len(windows), dtype=torch.bool)
    if source == "calibration":
        free[spread(len(windows), bench.calibration)] = False
    judged = spread(len(windows), count) if source == "heldout" else free.nonzero()[:, 0][1::2]
    judged = judged[spread(len(judged), count)]
    free[judged] = False
    left = free.nonzero()[:, 0]
    return windows[left[spread(len(left), count)]], windows[judged]


def losses_on(model: nn.Module, *, texts: dict[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Compute the mean losses on both parts of every source, as `quality.py` judges."""
    return {
        f"{source} {use}": mean_loss(model, windows.split(2), half_precision_losses)
        for source, parts in texts.items()
        for use, windows in zip(("measured", "judged"), parts, strict=True)
    }


def rises_at(
    prepared: PreparedPlan,
    share: float,
    model: nn.Module,
    stats: tn.CalibrationStats,
    losses: Any,
    dense: dict[str, float],
) -> dict[str, float]:
    """Return the predicted loss increase at a size, and the measured increases of all losses."""
    made = prepared.plan(param_ratio=share)
    small = light_copy(model)
    tn.apply_plan(small, made, stats)
    found = {name: loss - dense[name] for name, loss in losses(small).items()}
    assert made.predicted_loss_increase is not None
    return {"price": made.predicted_loss_increase, **found}


def half_precision_losses(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Compute token losses as `quality.py` judges."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return label_losses(model, batch)


if __name__ == "__main__":
    main()
