"""What does two-sided rounding cost and gain, against one-sided rounding (GPTQ) and rounding to nearest?

    OMP_NUM_THREADS=1 python benchmarks/rounding.py [--toy] [--sizes 1024 4096] [--formats int4 int3 int2]

Every case rounds one float32 matrix with the three methods in turn, in one process, on one thread. `seconds`
is the whole call: scale search, factorisation of the moments, all methods tried, refit of the scales. `loops`
is the bare loop. Inputs are correlated with a spectrum that falls like `1/k`, gradients likewise, as in
trained models; the price is `1/2 tr(R E C E^T)`. Asked is that two-sided takes at most three times as long as
one-sided. Writes the record `rounding.json`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tensornet.quantization import round_weight
from tensornet.quantization.feedback import Grid, one_sided, two_sided

sys.path.insert(0, str(Path(__file__).parent))
from harness import RECORDS, paired_medians, record

METHODS = ("nearest", "one_sided", "two_sided")


def moment(size: int, seed: int) -> Tensor:
    """Build a second moment with eigenvalues `1/k`, in a random basis close to the axes."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(size, size, generator=generator) / size**0.5 + torch.eye(size)
    basis = torch.linalg.qr(mixed).Q
    return (basis / torch.arange(1.0, size + 1)) @ basis.T * size


def measure(size: int, name: str, repeats: int) -> dict[str, Any]:
    """Measure one row: seconds and losses of all methods, and seconds of the loops alone."""
    weight = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    rows, columns = moment(size, 1), moment(size, 2)
    both = {"rows": rows, "columns": columns}
    # Each with the moments it has by itself: one-sided alone must not pay for the second side.
    given = {"nearest": {"columns": columns.diagonal()}, "one_sided": {"columns": columns}, "two_sided": both}
    found = {}

    def call(method: str) -> Any:
        def run() -> None:
            options = {"rounding": method, "predict": method == "two_sided"}
            found[method] = round_weight(weight, name, **options, **given[method])  # type: ignore[arg-type]

        return run

    times = paired_medians({m: call(m) for m in METHODS}, repeats, warmup=0, clock=time.thread_time)
    couplings = (columns / columns.diagonal()).triu(1)[None] * 0.1
    grid = Grid(torch.full((1, size, size), 0.3), 8.0, 15)
    loops = paired_medians(
        {
            "one_sided": lambda: one_sided(weight[None], grid, couplings),
            "two_sided": lambda: two_sided(weight[None], grid, couplings, couplings),
        },
        repeats,
        warmup=0,
        clock=time.thread_time,
    )
    price = {m: _price(weight - found[m].dequantize(), rows, columns) for m in METHODS}
    return {
        "size": size,
        "format": name,
        "seconds": {m: round(t.median, 3) for m, t in times.items()},
        "loops": {m: round(t.median, 3) for m, t in loops.items()},
        "price": price,
        "predicted": float(found["two_sided"].predicted),
        "loss_increase": float(found["two_sided"].loss_increase),
        "ratio": round(times["two_sided"].median / times["one_sided"].median, 2),
        "loop_ratio": round(loops["two_sided"].median / loops["one_sided"].median, 2),
    }


def _price(error: Tensor, rows: Tensor, columns: Tensor) -> float:
    return 0.5 * float(((rows @ error) * (error @ columns)).sum(dtype=torch.float64))


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run the benchmark and write its record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--toy", action="store_true", help="one tiny case, to see that it runs")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--formats", nargs="+", default=["int4", "int3", "int2"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--records", type=Path, default=RECORDS)
    options = parser.parse_args(arguments)
    sizes, names, repeats = (
        ([64], ["int3"], 1) if options.toy else (options.sizes, options.formats, options.repeats)
    )
    before, rows = torch.get_num_threads(), []
    torch.set_num_threads(1)
    try:
        for size in sizes:
            for name in names:
                rows.append(measure(size, name, repeats))
                print(rows[-1], flush=True)
    finally:
        torch.set_num_threads(before)
    summary = {"largest_ratio": max(row["ratio"] for row in rows)}
    return record("rounding", rows, folder=options.records, summary=summary)


if __name__ == "__main__":
    main()
