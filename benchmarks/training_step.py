"""Does a training step take more time than its floating-point operations need?

    python benchmarks/training_step.py [--toy] [--threads 1 2] [--seconds 3]

Forward and backward of a 3-site layer on 2048 tokens, gradients of cores, bias and input included. The
operations are those of the strategy chosen: the rebuild and the dense product, forward once and backward
twice. The time they need is measured in the same rounds, by one matrix product of the shape of the forward
pass. Asked is at most 1.15 times that; a dense layer is shown beside it. With one thread processor time is
compared, with more the wall clock. Writes the record `training_step.json`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from harness import paired_medians, record
from speed import Case, clock_for, options_of, rounds, with_threads

CASES = (
    Case("768x768, 3 sites, bond 59", (8, 8, 12), (12, 8, 8), 59),
    Case("3072x768, 3 sites, bond 84", (12, 16, 16), (12, 8, 8), 84),
    Case("3072x768, 3 sites, bond 32", (12, 16, 16), (12, 8, 8), 32),
    Case("768x3072, 3 sites, bond 84", (12, 8, 8), (12, 16, 16), 84),
    Case("1024x1024, 3 sites, bond 64", (8, 8, 16), (16, 8, 8), 64),
)


def step(layer: nn.Module, x: Tensor, gradient: Tensor) -> None:
    """Run the forward and the backward pass."""
    x.grad = None
    layer.zero_grad(set_to_none=True)
    layer(x).backward(gradient)


def measure(case: Case, tokens: int, threads: int, seconds: float) -> dict[str, Any]:
    """Measure one row: milliseconds, and the ratio to the time that the operations need."""
    layer = case.layer()
    dense = nn.Linear(layer.in_features, layer.out_features)
    x = torch.randn(tokens, layer.in_features, requires_grad=True)
    gradient = torch.randn(tokens, layer.out_features)
    weight, plain = dense.weight.detach(), x.detach()
    functions = {
        "product": lambda: plain @ weight.T,
        "dense": lambda: step(dense, x, gradient),
        "layer": lambda: step(layer, x, gradient),
    }
    times = paired_medians(functions, rounds(functions.values(), seconds), clock=clock_for(threads))
    explained = layer.explain(tokens)
    operations = 3 * explained[explained.choice].multiply_adds
    needed = operations * times["product"].median / (tokens * weight.numel())
    return {
        "case": case.name,
        "tokens": tokens,
        "threads": threads,
        "choice": explained.choice,
        "multiply_adds": operations,
        "milliseconds": {name: round(1e3 * time.median, 3) for name, time in times.items()},
        "needed_milliseconds": round(1e3 * needed, 3),
        "over_needed": round(times["layer"].median / needed, 3),
        "dense_over_needed": round(times["dense"].median / (3 * times["product"].median), 3),
        "over_dense": round(times["layer"].median / times["dense"].median, 3),
    }


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run the benchmark and write its record."""
    options = options_of(__doc__, arguments)
    cases, tokens = (CASES, 2048)
    if options.toy:
        cases, tokens = (Case("24x16, 3 sites, bond 4", (2, 3, 4), (4, 2, 2), 4),), 16

    def work(threads: int) -> list[dict[str, Any]]:
        rows = []
        for case in cases:
            rows.append(measure(case, tokens, threads, 3 * options.seconds))
            print(rows[-1], flush=True)
        return rows

    rows = with_threads(options.threads, work)
    summary = {
        "over_needed_largest": max(row["over_needed"] for row in rows),
        "dense_over_needed_largest": max(row["dense_over_needed"] for row in rows),
    }
    print(summary)
    return record("training_step", rows, folder=options.records, summary=summary)


if __name__ == "__main__":
    main()
