"""Shared parts of the three speed benchmarks: chains in shapes of transformer layers, options, means."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from harness import RECORDS

import tensornet as tn


@dataclass(frozen=True)
class Case:
    """Chain in the shape of a transformer layer.

    Args:
        name: shown in the table.
        out_dims: out-legs.
        in_dims: in-legs.
        max_bond: cap on every bond.
    """

    name: str
    out_dims: tuple[int, ...]
    in_dims: tuple[int, ...]
    max_bond: int

    def layer(self, *, package: ModuleType = tn, **options: Any) -> tn.nn.MPOLinear:
        """Build a random layer, of another checkout's `package` if one is given."""
        legs = {"out_dims": self.out_dims, "in_dims": self.in_dims}
        topology = package.topologies.mpo(**legs, max_bond=self.max_bond)
        shape = topology.in_features, topology.out_features
        return package.nn.MPOLinear(*shape, topology=topology, **options)


CASES = (
    Case("768x768, 3 sites, bond 59 (40 %)", (8, 8, 12), (12, 8, 8), 59),
    Case("768x768, 3 sites, bond 16 (3 %)", (8, 8, 12), (12, 8, 8), 16),
    Case("3072x768, 3 sites, bond 59 (20 %)", (12, 16, 16), (12, 8, 8), 59),
    Case("3072x768, 2 sites, bond 64 (6 %)", (48, 64), (32, 24), 64),
    Case("768x3072, 5 sites, bond 64 (5 %)", (4, 4, 4, 4, 3), (4, 4, 4, 8, 6), 64),
    Case("1024x4096, 4 sites, bond 32 (2 %)", (4, 4, 8, 8), (8, 8, 8, 8), 32),
)
TOY = (Case("24x16, 3 sites, bond 4", (2, 3, 4), (4, 2, 2), 4),)
TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
TOY_TOKENS = (1, 8)


def options_of(
    description: str, arguments: Sequence[str] | None, **defaults: int | str
) -> argparse.Namespace:
    """Parse the command line of a speed benchmark, with further options and their defaults."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--toy", action="store_true", help="one tiny case, to see that it runs")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=1.0, help="about this long for each comparison")
    parser.add_argument("--records", type=Path, default=RECORDS)
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    return parser.parse_args(arguments)


def rounds(functions: Iterable[Callable[[], Any]], seconds: float) -> int:
    """Choose the number of repeats, 3 to 51, that take about this many seconds."""
    start = time.perf_counter()
    for function in functions:
        function()
    return max(3, min(51, int(seconds / max(time.perf_counter() - start, 1e-9)) | 1))


def clock_for(threads: int) -> Callable[[], float]:
    """Choose processor time for one thread, so that a busy machine distorts nothing; else the wall clock."""
    return time.thread_time if threads == 1 else time.perf_counter


def with_threads(counts: Sequence[int], work: Callable[[int], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Collect the rows of `work(threads)` for each number of threads; restore the number afterwards."""
    before, rows = torch.get_num_threads(), []
    try:
        for threads in counts:
            torch.set_num_threads(threads)
            rows += work(threads)
    finally:
        torch.set_num_threads(before)
    return rows


def geometric_mean(values: Iterable[float]) -> float:
    """Compute the geometric mean, the right one for ratios."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def median(values: Iterable[float]) -> float:
    """Return the middle value, the lower of two."""
    ordered = sorted(values)
    return ordered[(len(ordered) - 1) // 2]
