"""How fast are tensor-network layers in inference and training, and how many bytes do they need?

    python benchmarks/forward.py [--toy] [--threads 1 2] [--seconds 1] [--passes 3]

The layers of a row are timed in turn in one process, so that weights are not in the cache, as in a model of
many layers. Every row has the bytes and milliseconds of these layers:

- `dense`: `nn.Linear`;
- `auto`: our layer with the default strategy, which stores only the cores;
- `factorized` and `reconstructed`: tltorch's layer with the same ranks, if it is installed.

Goals: a low-rank layer takes at most 1.05 times as long as a dense layer; the route that `auto` chooses takes
at most 10 % longer than the fastest route. Chains take longer than dense layers. Bytes are those of all
tensors that are reachable from the layer after the pass. Rows with `training` are forward and backward passes
of `dense` and `auto`; `bytes_for_backward` counts the activations that a forward pass stores. `over_needed`
is the time of the step relative to the time that its floating-point operations would take at the speed of one
plain matrix product. Goal: at most 1.15.

With one thread processor time is measured, otherwise wall time. Other users of the machine then slow some
rows for tens of seconds, small products more than large ones. So with several threads all rows are measured
in several passes; a row reports the pass in which all its layers together were fastest. Writes
`forward.json`.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from harness import (
    RECORDS,
    clock_for,
    geometric_mean,
    held_bytes,
    paired_medians,
    record,
    rounds,
    with_threads,
)

import tensornet as tn
from tensornet.contraction.cost import default_machine
from tensornet.contraction.plan import RECONSTRUCT, contract_with_input


@dataclass(frozen=True)
class Case:
    """Chain in the shape of a transformer layer.

    Args:
        name: name of the case in the table.
        out_dims: sizes of the out-legs.
        in_dims: sizes of the in-legs.
        max_bond: largest bond.
    """

    name: str
    out_dims: tuple[int, ...]
    in_dims: tuple[int, ...]
    max_bond: int

    def layer(self, **options: Any) -> tn.nn.MPOLinear:
        topology = tn.topologies.mpo(out_dims=self.out_dims, in_dims=self.in_dims, max_bond=self.max_bond)
        return tn.nn.MPOLinear(topology.in_features, topology.out_features, topology=topology, **options)


#: Low rank is a chain of two sites with dims `(out, 1) x (1, in)`; plans mostly choose it for trained layers.
CASES = (
    Case("768x768, low rank 192 (50 %)", (768, 1), (1, 768), 192),
    Case("768x768, low rank 307 (80 %)", (768, 1), (1, 768), 307),
    Case("3072x768, low rank 307 (50 %)", (3072, 1), (1, 768), 307),
    Case("768x768, 3 sites, bond 59 (40 %)", (8, 8, 12), (12, 8, 8), 59),
    Case("768x768, 3 sites, bond 16 (3 %)", (8, 8, 12), (12, 8, 8), 16),
    Case("3072x768, 3 sites, bond 59 (20 %)", (12, 16, 16), (12, 8, 8), 59),
    Case("3072x768, 2 sites, bond 64 (6 %)", (48, 64), (32, 24), 64),
    Case("768x3072, 5 sites, bond 64 (5 %)", (4, 4, 4, 4, 3), (4, 4, 4, 8, 6), 64),
    Case("1024x4096, 4 sites, bond 32 (2 %)", (4, 4, 8, 8), (8, 8, 8, 8), 32),
)
TOKENS, TRAINING_TOKENS = (1, 4, 16, 64, 256, 1024, 4096), 2048
TOY, TOY_TOKENS, TOY_TRAINING_TOKENS = (Case("24x16, 3 sites, bond 4", (2, 3, 4), (4, 2, 2), 4),), (1, 8), 16
#: Implementations of tltorch's layer; empty if tltorch is not installed.
RIVALS = ("factorized", "reconstructed") if find_spec("tltorch") else ()


def rival(case: Case, bonds: Sequence[int], implementation: str) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import tltorch

    options = {"factorization": "blocktt", "implementation": implementation, "bias": True, "n_layers": 1}
    return tltorch.FactorizedLinear(case.in_dims, case.out_dims, rank=list(bonds), **options)


def strategies(layer: tn.nn.MPOLinear, x: Tensor) -> dict[int, Callable[[], Tensor]]:
    """Return functions that apply the layer to `x`, one for each route."""

    def contract(route: int) -> Tensor:
        return contract_with_input(layer.plan, layer.cores, x, route=route, bias=layer.bias)

    ways: dict[int, Callable[[], Tensor]] = {
        k: lambda k=k: contract(k) for k in range(len(layer.plan.applies))
    }
    return {**ways, RECONSTRUCT: lambda: nn.functional.linear(x, layer.to_matrix(), layer.bias)}


@torch.no_grad()
def measure(case: Case, tokens: int, threads: int, seconds: float) -> dict[str, Any]:
    """Measure the bytes of all layers, and the time of a forward pass of each."""
    auto = case.layer().eval()
    bonds = list(auto.topology.bond_dims.values())
    sides: dict[str, nn.Module] = {
        "dense": nn.Linear(auto.in_features, auto.out_features),
        "auto": auto,
        **{name: rival(case, bonds, name) for name in RIVALS},
    }
    x, machine = torch.randn(tokens, auto.in_features), default_machine("cpu")
    calls = {name: lambda layer=layer: layer(x) for name, layer in sides.items()}
    # Routes that are predicted to take more than five times as long as the chosen one are not timed.
    limit = 5 * auto.plan.seconds(auto.route(tokens), tokens, machine)
    ways = {
        str(k): way
        for k, way in strategies(auto, x).items()
        if auto.plan.seconds(k, tokens, machine) <= limit
    }
    first, second = (
        paired_medians(group, rounds(group.values(), seconds), warmup=2, clock=clock_for(threads))
        for group in (calls, ways)
    )
    chosen, best = str(auto.route(tokens)), min(time.median for time in second.values())
    theirs = min((first[name].median for name in RIVALS), default=None)
    explained = auto.explain(tokens)
    return {
        "case": case.name,
        "tokens": tokens,
        "threads": threads,
        "choice": explained.choice,
        "bytes": {name: held_bytes(layer) for name, layer in sides.items()},
        "milliseconds": {name: round(1e3 * time.median, 4) for name, time in first.items()},
        "predicted": {cost.strategy: round(cost.milliseconds, 4) for cost in explained.costs},
        "bytes_over_dense": round(held_bytes(auto) / held_bytes(sides["dense"]), 3),
        "over_dense": round(first["auto"].median / first["dense"].median, 3),
        **({"speedup_over_tltorch": round(theirs / first["auto"].median, 3)} if theirs else {}),
        "over_best_strategy": round(second[chosen].median / best, 3),
    }


def measure_training(case: Case, tokens: int, threads: int, seconds: float) -> dict[str, Any]:
    """Measure a training step: forward and backward pass, with gradients of cores, bias and input."""
    layer = case.layer()
    dense = nn.Linear(layer.in_features, layer.out_features)
    x = torch.randn(tokens, layer.in_features, requires_grad=True)
    gradient, plain = torch.randn(tokens, layer.out_features), x.detach()

    def step(module: nn.Module) -> None:
        x.grad = None
        module.zero_grad(set_to_none=True)
        module(x).backward(gradient)

    calls = {
        "product": lambda: plain @ dense.weight.detach().T,
        "dense": lambda: step(dense),
        "auto": lambda: step(layer),
    }
    times = paired_medians(calls, rounds(calls.values(), 3 * seconds), clock=clock_for(threads))
    explained = layer.explain(tokens)
    operations = 3 * explained[explained.choice].multiply_adds  # one for the forward pass, two for backward
    needed = operations * times["product"].median / (tokens * dense.weight.numel())
    return {
        "case": case.name,
        "training": True,
        "tokens": tokens,
        "threads": threads,
        "choice": explained.choice,
        "bytes": {name: held_bytes(module) for name, module in (("dense", dense), ("auto", layer))},
        "bytes_for_backward": {"dense": kept_bytes(dense, x), "auto": kept_bytes(layer, x)},
        "milliseconds": {name: round(1e3 * time.median, 4) for name, time in times.items()},
        "over_needed": round(times["auto"].median / needed, 3),
        "over_dense": round(times["auto"].median / times["dense"].median, 3),
    }


def kept_bytes(module: nn.Module, x: Tensor) -> int:
    """Count the bytes of tensors that a forward pass stores for backward, except parameters and input."""
    known = {p.untyped_storage().data_ptr() for p in (*module.parameters(), x)}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = module(x)
        found = sum(size for place, size in sizes.items() if place not in known)
    del y
    return found


def options_of(description: str, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line of this benchmark or of `fit_machine.py`."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--toy", action="store_true", help="tiny layers, to test the script")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=1.0, help="about this long for each comparison")
    parser.add_argument(
        "--passes", type=int, default=3, help="passes over all rows, if there are several threads"
    )
    parser.add_argument("--records", type=Path, default=RECORDS)
    given = parser.parse_args(arguments)
    if given.toy:
        given.threads, given.seconds = [1], 0.01
    return given


def main(arguments: Sequence[str] | None = None) -> Path:
    given = options_of(__doc__, arguments)
    cases, counts, trained = (
        (TOY, TOY_TOKENS, TOY_TRAINING_TOKENS) if given.toy else (CASES, TOKENS, TRAINING_TOKENS)
    )

    def work(threads: int) -> list[dict[str, Any]]:
        found: dict[tuple[str, int, bool], list[dict[str, Any]]] = {}
        for _ in range(1 if threads == 1 else given.passes):
            rows = [measure(case, n, threads, given.seconds) for case, n in itertools.product(cases, counts)]
            rows += [measure_training(case, trained, threads, given.seconds) for case in cases]
            for row in rows:
                found.setdefault((row["case"], row["tokens"], "training" in row), []).append(row)
                print({k: v for k, v in row.items() if k != "predicted"}, flush=True)
        return [
            min(rows, key=lambda row: geometric_mean(row["milliseconds"].values())) for rows in found.values()
        ]

    rows = with_threads(given.threads, work)
    forward = [row for row in rows if "training" not in row]
    low = [row["over_dense"] for row in forward if "low rank" in row["case"]]
    summary = {
        "bytes_over_dense_largest": max(row["bytes_over_dense"] for row in forward),
        "over_dense_largest_of_low_ranks": max(low, default=None),
        "over_dense_geometric_mean": round(geometric_mean(row["over_dense"] for row in forward), 3),
        "over_best_strategy_largest": max(row["over_best_strategy"] for row in forward),
        "over_best_strategy_above_1.10": sum(row["over_best_strategy"] > 1.1 for row in forward),
        "training_over_needed_largest": max(row["over_needed"] for row in rows if "training" in row),
    }
    if RIVALS:
        ratios = [row["speedup_over_tltorch"] for row in forward]
        summary["speedup_over_tltorch_geometric_mean"] = round(geometric_mean(ratios), 3)
        summary["speedup_over_tltorch_smallest"] = min(ratios)
    print(summary)
    return record("forward", rows, folder=given.records, summary=summary)


if __name__ == "__main__":
    main()
