"""How fast is a layer that holds only its cores, and how many bytes does it hold after a forward pass?

    python benchmarks/forward.py [--toy] [--threads 1 2] [--seconds 1] [--passes 3] [--before FOLDER]

Every row has bytes and milliseconds of all sides, timed in turn in one process, so that each finds its
weights as cold as in a model of many layers:

- `dense`: `nn.Linear`;
- `auto`: the layer as it comes, which contracts or rebuilds and holds its cores alone;
- `cached`: the same with `strategy="cached"`, memory for speed;
- `factorized` and `reconstructed`: tltorch's layer with the same ranks, where it is installed;
- `before`: `auto` of another checkout of the project, where `--before` names its folder.

Asked: a low rank takes at most 1.05 times as long as dense without holding anything; what `auto` chose is
within 10 % of its fastest way. Chains take longer than dense, and the table says how much. Bytes are those of
all tensors that can be reached from the layer once the pass is over.

With one thread processor time is compared, with more the wall clock. Then other users of the machine slow
some rows for tens of seconds, small products more than large ones; so all rows are measured in several passes
(one, for one thread), and of each row that pass counts in which all sides together, by the geometric mean,
were fastest. Writes the record `forward.json`.
"""

from __future__ import annotations

import importlib
import itertools
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from harness import held_bytes, paired_medians, record
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

from tensornet.contraction.cost import default_machine
from tensornet.contraction.plan import RECONSTRUCT, contract_with_input
from tensornet.nn import MPOLinear

#: A low rank is a chain of two sites, `(out, 1) x (1, in)`: what the planner takes for pretrained layers.
LOW_RANKS = (
    Case("768x768, low rank 192 (50 %)", (768, 1), (1, 768), 192),
    Case("768x768, low rank 307 (80 %)", (768, 1), (1, 768), 307),
    Case("3072x768, low rank 307 (50 %)", (3072, 1), (1, 768), 307),
)


#: tltorch's implementations; nothing where it is not installed.
RIVALS = ("factorized", "reconstructed") if find_spec("tltorch") else ()


def rival(case: Case, bonds: Sequence[int], implementation: str) -> nn.Module:
    """Build tltorch's layer with the same ranks."""
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


def another_checkout(folder: str) -> ModuleType:
    """Import the package `tensornet` of another checkout beside this one."""
    ours = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "tensornet"}
    sys.path.insert(0, folder)
    try:
        package = importlib.import_module("tensornet")
        importlib.import_module("tensornet.nn")
    finally:
        sys.path.remove(folder)
        for name in [name for name in sys.modules if name.split(".")[0] == "tensornet"]:
            del sys.modules[name]
        sys.modules.update(ours)
    return package


def strategies(layer: MPOLinear, x: Tensor) -> dict[int, Callable[[], Tensor]]:
    """Return every way to apply the layer without a kept matrix, by route."""

    def contract(candidate: int) -> Tensor:
        return contract_with_input(layer.plan, layer.cores, x, candidate=candidate, bias=layer.bias)

    ways: dict[int, Callable[[], Tensor]] = {
        k: lambda k=k: contract(k) for k in range(len(layer.plan.applies))
    }
    return {**ways, RECONSTRUCT: lambda: torch.nn.functional.linear(x, layer.to_matrix(), layer.bias)}


@torch.no_grad()
def measure(
    case: Case, tokens: int, threads: int, seconds: float, before: ModuleType | None
) -> dict[str, Any]:
    """Measure one row: bytes and milliseconds of all sides, and the ratios."""
    auto, cached = case.layer().eval(), case.layer(strategy="cached").eval()
    bonds = list(auto.topology.bond_dims.values())
    sides: dict[str, nn.Module] = {
        "dense": nn.Linear(auto.in_features, auto.out_features),
        "auto": auto,
        "cached": cached,
        **{name: rival(case, bonds, name) for name in RIVALS},
    }
    if before is not None:
        sides["before"] = case.layer(package=before).eval()
    x = torch.randn(tokens, auto.in_features)
    calls = {name: lambda layer=layer: layer(x) for name, layer in sides.items()}
    # What takes far longer than the rest is no contender.
    ways = {str(k): way for k, way in strategies(auto, x).items() if _contends(auto, k, tokens)}
    first, second = (
        paired_medians(group, rounds(group.values(), seconds), warmup=2, clock=clock_for(threads))
        for group in (calls, ways)
    )
    chosen, best = str(auto.route(tokens)), min(time.median for time in second.values())
    theirs = min((first[name].median for name in RIVALS), default=None)
    return {
        "case": case.name,
        "tokens": tokens,
        "threads": threads,
        "choice": auto.explain(tokens).choice,
        "bytes": {name: held_bytes(layer) for name, layer in sides.items()},
        "milliseconds": {name: round(1e3 * time.median, 4) for name, time in first.items()},
        "predicted": {cost.strategy: round(cost.milliseconds, 4) for cost in auto.explain(tokens).costs},
        "bytes_over_dense": round(held_bytes(auto) / held_bytes(sides["dense"]), 3),
        "over_dense": round(first["auto"].median / first["dense"].median, 3),
        **({"speedup_over_tltorch": round(theirs / first["auto"].median, 3)} if theirs else {}),
        "over_best_strategy": round(second[chosen].median / best, 3),
    }


def _contends(layer: MPOLinear, route: int, tokens: int) -> bool:
    machine = default_machine("cpu")
    seconds = [layer.plan.seconds(r, tokens, machine) for r in (route, layer.route(tokens))]
    return seconds[0] <= 5 * seconds[1]


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run the benchmark and write its record."""
    options = options_of(__doc__, arguments, before="", passes=3)
    cases, counts = (TOY, TOY_TOKENS) if options.toy else ((*LOW_RANKS, *CASES), TOKENS)
    before = another_checkout(options.before) if options.before else None

    def work(threads: int) -> list[dict[str, Any]]:
        found: dict[tuple[str, int], list[dict[str, Any]]] = {}
        for _ in range(1 if threads == 1 else options.passes):
            for case, tokens in itertools.product(cases, counts):
                row = measure(case, tokens, threads, options.seconds, before)
                found.setdefault((case.name, tokens), []).append(row)
                print({k: v for k, v in row.items() if k != "predicted"}, flush=True)
        return [
            min(rows, key=lambda row: geometric_mean(row["milliseconds"].values())) for rows in found.values()
        ]

    rows = with_threads(options.threads, work)
    low = [row["over_dense"] for row in rows if "low rank" in row["case"]]
    summary = {
        "bytes_over_dense_largest": max(row["bytes_over_dense"] for row in rows),
        "over_dense_largest_of_low_ranks": max(low, default=None),
        "over_dense_geometric_mean": round(geometric_mean(row["over_dense"] for row in rows), 3),
        "over_best_strategy_largest": max(row["over_best_strategy"] for row in rows),
        "over_best_strategy_above_1.10": sum(row["over_best_strategy"] > 1.1 for row in rows),
    }
    if RIVALS:
        ratios = [row["speedup_over_tltorch"] for row in rows]
        summary["speedup_over_tltorch_geometric_mean"] = round(geometric_mean(ratios), 3)
        summary["speedup_over_tltorch_smallest"] = min(ratios)
    if before is not None:
        ratios = [row["milliseconds"]["auto"] / row["milliseconds"]["before"] for row in rows]
        sizes = [row["bytes"]["auto"] / row["bytes"]["before"] for row in rows]
        summary["over_before_milliseconds_geometric_mean"] = round(geometric_mean(ratios), 3)
        summary["over_before_bytes_geometric_mean"] = round(geometric_mean(sizes), 3)
    print(summary)
    return record("forward", rows, folder=options.records, summary=summary)


if __name__ == "__main__":
    main()
