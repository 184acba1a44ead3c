"""How long do planning and rounding of a layer take, and how much do they increase the loss?

    OMP_NUM_THREADS=1 python benchmarks/planning.py [--toy] [--shapes 576x576 1536x576] [--bits 4.25 2.25]

Each layer is a float32 matrix with random correlated moments of inputs and gradients, whose eigenvalues fall
like `1/k` as in trained models. Two records are written:

- `planning.json`: `plan` is the time of predicting the loss of a layer in all default formats and at every
  rank, `round` that of rounding the layer in the format of the plan. `predicted` is the loss increase
  according to the plan, `loss_increase` that of the rounded layer under the same moments.
- `rounding.json`: rounding to nearest, one-sided rounding (GPTQ) and two-sided rounding to one format, timed
  in turn. `seconds` is the time of the whole call: scale search, factorization of the moments, refit of the
  scales. `predicted_loss` is `1/2 tr(R E C E^T)` of the error `E`. Goal: two-sided rounding takes at
  most three times as long as one-sided rounding.

Seconds are medians of the repeats, with one thread. Bytes are those of the packed matrix.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tensornet as tn
from tensornet.compression import survey_from_stats
from tensornet.compression.sensitivity import layer_sensitivity
from tensornet.nn.targets import find_targets
from tensornet.quantization import NumberFormat, round_weight

sys.path.insert(0, str(Path(__file__).parent))
from harness import RECORDS, paired_medians, peak_mib, record, with_threads

SHAPES = ("576x576", "192x576", "1536x576", "576x1536")


def moment(size: int, seed: int) -> Tensor:
    """Make a random second moment with eigenvalues proportional to `1/k`, in a basis close to the axes."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(size, size, generator=generator) / size**0.5 + torch.eye(size)
    basis = torch.linalg.qr(mixed).Q
    return (basis / torch.arange(1.0, size + 1)) @ basis.T * size


def measure_planning(shape: str, budgets: Sequence[float], repeats: int) -> dict[str, Any]:
    """Measure one layer: seconds of planning, and seconds and losses of rounding for each budget of bits."""
    torch.manual_seed(0)
    rows, columns = map(int, shape.split("x"))
    model = nn.Sequential(nn.Linear(columns, rows, bias=False))
    stats = tn.CalibrationStats({"0": moment(rows, 1)}, {"0": moment(columns, 2)}, 1, loss=0.0)
    config = tn.CompressionConfig(bits_per_weight=max(budgets), effort="thorough")
    survey = survey_from_stats(model, config, stats)
    plans = {bits: survey.plan(bits_per_weight=bits) for bits in budgets}
    made: dict[float, Any] = {}

    def rounded(bits: float) -> None:
        made[bits] = copy.deepcopy(model)
        tn.apply_plan(made[bits], plans[bits], stats)

    calls: dict[str, Callable[[], Any]] = {"plan": lambda: survey_from_stats(model, config, stats)}
    calls |= {f"round {bits}": lambda bits=bits: rounded(bits) for bits in budgets}
    times = paired_medians(calls, repeats, clock=time.thread_time)
    (target,) = (x for x in find_targets(model, config) if not x.skip)
    sensitivity = layer_sensitivity(target, "curvature", stats)
    assert sensitivity is not None
    losses = {}
    for bits, plan in plans.items():
        with torch.no_grad():
            error = target.matrix - made[bits][0].to_matrix()
        losses[str(bits)] = {
            "format": plan.layers[0].storage.number_format.name,
            "bytes": plan.bytes_after,
            "predicted": plan.predicted_loss_increase,
            "loss_increase": sensitivity.forecast.cost(error),
        }
    seconds = {name: round(timing.median, 3) for name, timing in times.items()}
    return {"shape": shape, "seconds": seconds, "losses": losses, "peak_mib": peak_mib()}


def measure_rounding(size: int, name: str, repeats: int) -> dict[str, Any]:
    """Measure the three rounding methods on a square matrix: seconds, bytes and loss increases."""
    weight = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    rows, columns = moment(size, 1), moment(size, 2)
    # Each method gets only the moments that it uses, so that its time excludes factorizing the others.
    options: dict[str, dict[str, Any]] = {
        "nearest": {"columns": columns.diagonal()},
        "one_sided": {"columns": columns},
        "two_sided": {"rows": rows, "columns": columns},
    }
    found: dict[str, Any] = {}

    def call(method: str) -> None:
        found[method] = round_weight(weight, name, rounding=method, **options[method])  # type: ignore[arg-type]

    calls = {method: lambda method=method: call(method) for method in options}
    times = paired_medians(calls, repeats, warmup=0, clock=time.thread_time)
    errors = {method: weight - made.dequantize() for method, made in found.items()}
    return {
        "size": size,
        "format": name,
        "bytes": NumberFormat.parse(name).nbytes((size, size)),
        "seconds": {method: round(timing.median, 3) for method, timing in times.items()},
        "predicted_loss": {
            m: 0.5 * float(((rows @ e) * (e @ columns)).sum(dtype=torch.float64)) for m, e in errors.items()
        },
        "loss_increase": float(found["two_sided"].loss_increase),
        "ratio": round(times["two_sided"].median / times["one_sided"].median, 2),
        "peak_mib": peak_mib(),
    }


def main(arguments: Sequence[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--toy", action="store_true", help="one tiny layer, to test the script")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), help="layers for planning")
    parser.add_argument("--bits", type=float, nargs="+", default=[4.25, 2.25], help="budgets for planning")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 4096], help="matrices for rounding")
    parser.add_argument("--formats", nargs="+", default=["int4", "int3", "int2"], help="formats for rounding")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--records", type=Path, default=RECORDS)
    given = parser.parse_args(arguments)
    if given.toy:
        given.shapes, given.sizes, given.formats, given.repeats = ["48x64"], [64], ["int3"], 1

    def planning(threads: int) -> list[dict[str, Any]]:
        return [measure_planning(shape, given.bits, given.repeats) for shape in given.shapes]

    def rounding(threads: int) -> list[dict[str, Any]]:
        return [measure_rounding(size, name, given.repeats) for size in given.sizes for name in given.formats]

    planned, rounded = with_threads([1], planning), with_threads([1], rounding)
    print(*planned, *rounded, sep="\n")
    ratios = {"largest_ratio": max(row["ratio"] for row in rounded)}
    record("rounding", rounded, folder=given.records, threads=1, summary=ratios)
    seconds = {"seconds": round(sum(sum(row["seconds"].values()) for row in planned), 3)}
    return record("planning", planned, folder=given.records, threads=1, summary=seconds)


if __name__ == "__main__":
    main()
