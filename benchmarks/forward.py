"""Is a layer in eval ever slower than dense, than tltorch, or than its own best strategy?

    python benchmarks/forward.py [--toy] [--threads 1 2] [--seconds 1] [--passes 3]

Three comparisons at every token count, all sides in turn in one process, so that each finds its weights as
cold as in a model of many layers:

- `"auto"` as it comes, which may keep the rebuilt matrix, against `nn.Linear`; asked is at most 1.10 times
  dense.
- `"auto"` with `cache_limit=0` against the faster of tltorch's `"factorized"` and `"reconstructed"` with the
  same ranks; asked is never slower by 5 %, and 1.5 times faster in the geometric mean.
- what `"auto"` chose with `cache_limit=0` against the fastest of all strategies; asked is within 10 %.

With many tokens the fastest way is to rebuild the matrix and multiply, for us and for tltorch, and the dense
product that both then share takes most of the time. The column "speedup bound" says how much faster than
tltorch a layer would be whose rebuilding took no time: the faster of theirs over the dense product alone,
timed in the same rounds. Where it is below 1.5 nobody who rebuilds can be 1.5 times faster, so the summary
gives the geometric mean of the rows with room for it beside that of all rows. A contraction of few tokens
with the cores may be faster than its bound: it does without the product.

With one thread processor time is compared, with more the wall clock. Then other users of the machine slow
some rows for tens of seconds, small products more than large ones; so all rows are measured in several passes
(one, for one thread), and of each row that pass counts in which all sides together, by the geometric mean,
were fastest. Writes the record `forward.json`.
"""

from __future__ import annotations

import itertools
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from harness import paired_medians, record
from speed import (
    CASES,
    TOKENS,
    TOY,
    TOY_TOKENS,
    Case,
    clock_for,
    geometric_mean,
    options_of,
    rounds,
    with_threads,
)

from tensornet.contraction.machine import default_machine
from tensornet.contraction.slicing import plan_slices, run_in_slices
from tensornet.network import contract_with_input
from tensornet.nn import MPOLinear
from tensornet.nn.strategy import RECONSTRUCT, SLICED, route_seconds

#: What is asked of the geometric mean against tltorch.
WANTED = 1.5


def rival(case: Case, bonds: Sequence[int], implementation: str) -> torch.nn.Module:
    """tltorch's layer with the same ranks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import tltorch

    return tltorch.FactorizedLinear(
        case.in_dims,
        case.out_dims,
        rank=list(bonds),
        factorization="blocktt",
        implementation=implementation,
        bias=True,
        n_layers=1,
    )


def strategies(layer: MPOLinear, x: Tensor) -> dict[int, Callable[[], Tensor]]:
    """Every way to apply the layer without a kept matrix, by route."""

    def contract(candidate: int) -> Tensor:
        return contract_with_input(layer.plan, layer.cores, x, candidate=candidate, bias=layer.bias)

    ways: dict[int, Callable[[], Tensor]] = {
        k: lambda k=k: contract(k) for k in range(len(layer.plan.applies))
    }
    for k, plan in enumerate(plan_slices(layer.topology)):
        ways[SLICED - k] = lambda plan=plan: run_in_slices(plan, layer.cores, x, layer.bias)
    return {**ways, RECONSTRUCT: lambda: torch.nn.functional.linear(x, layer.to_matrix(), layer.bias)}


@torch.no_grad()
def measure(case: Case, tokens: int, threads: int, seconds: float) -> dict[str, Any]:
    """One row: milliseconds of all sides and the three ratios."""
    auto, uncached = case.layer().eval(), case.layer(cache_limit=0).eval()
    uncached.set_cores(auto.cores)
    dense = torch.nn.Linear(auto.in_features, auto.out_features)
    bonds = list(auto.topology.bond_dims.values())
    rivals = {name: rival(case, bonds, name) for name in ("factorized", "reconstructed")}
    x = torch.randn(tokens, auto.in_features)
    # A row compares at most these; what takes far longer than the rest is no contender.
    ways = {k: way for k, way in strategies(uncached, x).items() if _contends(uncached, k, tokens)}
    against_dense = {"dense": lambda: dense(x), "auto": lambda: auto(x)}
    against_rivals = {
        "product": lambda: dense(x),
        "uncached": lambda: uncached(x),
        **{name: lambda layer=layer: layer(x) for name, layer in rivals.items()},
    }
    named = {str(k): way for k, way in ways.items()}
    first, second, third = (
        paired_medians(sides, rounds(sides.values(), seconds), warmup=2, clock=clock_for(threads))
        for sides in (against_dense, against_rivals, named)
    )
    chosen = str(uncached.route(tokens))
    best = min(third, key=lambda name: third[name].median)
    times = {**first, **second}
    theirs = min(second[name].median for name in rivals)
    return {
        "case": case.name,
        "tokens": tokens,
        "threads": threads,
        "choice": auto.explain(tokens).choice,
        "choice_uncached": uncached.explain(tokens).choice,
        "milliseconds": {name: round(1e3 * time.median, 4) for name, time in times.items()},
        "predicted": {cost.strategy: round(cost.milliseconds, 4) for cost in uncached.explain(tokens).costs},
        "over_dense": round(first["auto"].median / first["dense"].median, 3),
        "speedup_over_tltorch": round(theirs / second["uncached"].median, 3),
        "speedup_bound": round(theirs / second["product"].median, 3),
        "over_best_strategy": round(third[chosen].median / third[best].median, 3),
    }


def _contends(layer: MPOLinear, route: int, tokens: int) -> bool:
    machine = default_machine("cpu")
    seconds = [route_seconds(layer.plan, r, tokens, machine, 4) for r in (route, layer.route(tokens))]
    return seconds[0] <= 5 * seconds[1]


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run the benchmark and write its record."""
    options = options_of(__doc__, arguments, passes=3)
    cases, counts = (TOY, TOY_TOKENS) if options.toy else (CASES, TOKENS)

    def work(threads: int) -> list[dict[str, Any]]:
        found: dict[tuple[str, int], list[dict[str, Any]]] = {}
        for _ in range(1 if threads == 1 else options.passes):
            for case, tokens in itertools.product(cases, counts):
                row = measure(case, tokens, threads, options.seconds)
                found.setdefault((case.name, tokens), []).append(row)
                print({k: v for k, v in row.items() if k not in ("milliseconds", "predicted")}, flush=True)
        return [
            min(rows, key=lambda row: geometric_mean(row["milliseconds"].values())) for rows in found.values()
        ]

    rows = with_threads(options.threads, work)
    room = [row["speedup_over_tltorch"] for row in rows if row["speedup_bound"] >= WANTED]
    summary = {
        "over_dense_largest": max(row["over_dense"] for row in rows),
        "over_dense_geometric_mean": round(geometric_mean(row["over_dense"] for row in rows), 3),
        "speedup_over_tltorch_geometric_mean": round(
            geometric_mean(row["speedup_over_tltorch"] for row in rows), 3
        ),
        "speedup_over_tltorch_geometric_mean_where_1.5_is_possible": round(geometric_mean(room), 3)
        if room
        else None,
        "rows_where_1.5_is_possible": len(room),
        "speedup_over_tltorch_smallest": min(row["speedup_over_tltorch"] for row in rows),
        "over_best_strategy_largest": max(row["over_best_strategy"] for row in rows),
        "over_best_strategy_above_1.10": sum(row["over_best_strategy"] > 1.1 for row in rows),
    }
    print(summary)
    return record("forward", rows, folder=options.records, summary=summary)


if __name__ == "__main__":
    main()
