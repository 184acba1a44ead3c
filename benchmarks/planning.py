"""How long do planning and rounding take, for a layer of each shape of a language model?

    OMP_NUM_THREADS=1 python benchmarks/planning.py [--toy] [--shapes 576x576 1536x576] [--bits 4.25 2.25]

Each row is one float32 layer with correlated moments of both sides, see `rounding.py`. `plan` prices it in
all default formats and at every rank; `round` rounds it in the format chosen at some bits. `predicted` is the
loss increase of the plan, `loss_increase` that of the rounded layer under the same moments. Seconds are of
one thread, medians of the repeats after one that fills caches of shapes. Writes the record `planning.json`.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tensornet as tn
from tensornet.compression import prepare
from tensornet.compression.sensitivity import layer_sensitivity
from tensornet.nn.targets import find_targets

sys.path.insert(0, str(Path(__file__).parent))
from harness import RECORDS, paired_medians, record
from rounding import moment

SHAPES = ("576x576", "192x576", "1536x576", "576x1536")


def measure(rows: int, columns: int, budgets: Sequence[float], repeats: int) -> dict[str, Any]:
    """Measure one row: seconds of planning and rounding at each budget, predicted and exact loss increase."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(columns, rows, bias=False))
    stats = tn.CalibrationStats({"0": moment(rows, 1)}, {"0": moment(columns, 2)}, 1, loss=0.0)
    config = tn.CompressionConfig(bits_per_weight=max(budgets))
    prepared = prepare(model, config, stats)
    plans = {bits: prepared.plan(bits_per_weight=bits) for bits in budgets}
    made: dict[float, nn.Module] = {}

    def rounded(bits: float) -> None:
        made[bits] = copy.deepcopy(model)
        tn.apply_plan(made[bits], plans[bits], stats)

    calls: dict[str, Any] = {"plan": lambda: prepare(model, config, stats)}
    calls |= {f"round {bits}": lambda bits=bits: rounded(bits) for bits in budgets}
    times = paired_medians(calls, repeats, warmup=1, clock=time.thread_time)
    (target,) = (x for x in find_targets(model, config) if not x.skip)
    sensitivity = layer_sensitivity(target, "curvature", stats, config.damping)
    assert sensitivity is not None
    found = {}
    for bits, plan in plans.items():
        with torch.no_grad():
            error = target.matrix - made[bits][0].to_matrix()  # type: ignore[index, operator]
        found[str(bits)] = {
            "format": plan.layers[0].storage.number_format.name,
            "predicted": plan.predicted_loss_increase,
            "loss_increase": sensitivity.forecast.cost(error),
        }
    seconds = {name: round(timing.median, 3) for name, timing in times.items()}
    return {"shape": f"{rows}x{columns}", "seconds": seconds, "losses": found}


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run the benchmark and write its record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--toy", action="store_true", help="one tiny layer, to see that it runs")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    parser.add_argument("--bits", type=float, nargs="+", default=[4.25, 2.25])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--records", type=Path, default=RECORDS)
    options = parser.parse_args(arguments)
    shapes, repeats = (["48x64"], 1) if options.toy else (options.shapes, options.repeats)
    before, rows = torch.get_num_threads(), []
    torch.set_num_threads(1)
    try:
        for shape in shapes:
            height, width = map(int, shape.split("x"))
            rows.append(measure(height, width, options.bits, repeats))
            print(rows[-1], flush=True)
    finally:
        torch.set_num_threads(before)
    summary = {"seconds": round(sum(sum(row["seconds"].values()) for row in rows), 3)}
    return record("planning", rows, folder=options.records, summary=summary)


if __name__ == "__main__":
    main()
