"""Which constants make the cost model predict the times of this machine?

    python benchmarks/fit_machine.py [--toy] [--threads 1] [--seconds 0.3]

All routes of applying a layer are timed for layers of many shapes that no other benchmark uses. The constants
of `tensornet.contraction.cost.Machine` are fitted to the logarithms of the times, with less weight for routes
that take much longer than the fastest. `half_size` is not fitted, since it depends on the kernels of the
library and not on the machine. The constants `half_peak`, `unpack_pass` and `kernel_peak` are then fitted to
times of integer layers and dense layers in bfloat16. The script prints the constants, and how much slower the
routes chosen with them are than the fastest routes. It writes no record.

Run it on an idle machine, since other work slows memory accesses more than arithmetic.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import least_squares

sys.path.insert(0, str(Path(__file__).parent))
from forward import Case, options_of, strategies
from generation import integers
from harness import clock_for, paired_medians, rounds, with_threads

from tensornet.contraction.cost import Machine, default_machine, dense_seconds
from tensornet.contraction.plan import OperatorPlan
from tensornet.nn.prepare import prepare_for_inference
from tensornet.nn.strategy import integer_seconds
from tensornet.quantization import NumberFormat

SHAPES = (
    ((16, 32), (32, 16), 32),
    ((16, 32), (32, 16), 96),
    ((8, 8, 16), (8, 16, 8), 24),
    ((8, 8, 16), (8, 16, 8), 80),
    ((32, 64), (16, 64), 48),
    ((4, 8, 8, 4), (8, 4, 4, 8), 40),
    ((12, 8, 16), (16, 16, 8), 20),
    ((12, 8, 16), (16, 16, 8), 64),
    ((4, 4, 8, 8), (4, 8, 4, 4), 48),
    ((64, 48), (48, 64), 32),
    ((5, 6, 8, 10), (6, 8, 4, 5), 36),
    ((512, 1), (16, 32), 8),
    ((16, 16), (16, 16), 20),
    ((16, 16, 16), (8, 8, 16), 30),
    ((1024, 1), (1, 1024), 128),
    ((24, 32), (1, 768), 10),
    ((9, 10, 7), (5, 8, 16), 50),
    ((4, 4, 4, 4, 4), (4, 4, 4, 4, 4), 40),
)
TOKENS = (1, 2, 4, 16, 32, 64, 256, 1024)
INTEGER_SHAPES = ((256, 512), (768, 768), (2048, 512), (1024, 2048))
FORMATS = ("int8:row", "int8", "int6", "int4", "int3", "int2")
FITTED = ("peak", "bandwidth", "overhead", "copy_element", "copy_run", "copy_far")

#: For each constant the fit adds the residual `_STAY * log(constant / default)`, which keeps the constant
#: close to its default if the times hardly depend on it.
_STAY = 0.1
#: Route number of the dense layer, in addition to the routes of `OperatorPlan.seconds`.
DENSE = -2


def predict(plan: OperatorPlan, route: int, tokens: int, machine: Machine) -> float:
    if route == DENSE:
        return dense_seconds(*plan.shape, tokens, machine)
    return plan.seconds(route, tokens, machine)


@dataclass(frozen=True)
class Timed:
    """Measured seconds of every route of a layer for one number of tokens; `DENSE` is the dense layer."""

    plan: OperatorPlan
    tokens: int
    seconds: dict[int, float]

    @property
    def fastest(self) -> float:
        """Seconds of the fastest route except `DENSE`."""
        return min(value for route, value in self.seconds.items() if route != DENSE)


@torch.no_grad()
def measure(case: Case, tokens: int, threads: int, seconds: float) -> Timed:
    """Time the dense layer, and all routes predicted to take at most six times as long as the fastest."""
    layer = case.layer().eval()
    x, machine = torch.randn(tokens, layer.in_features), default_machine("cpu")
    predicted = {k: predict(layer.plan, k, tokens, machine) for k in strategies(layer, x)}
    dense = torch.nn.Linear(layer.in_features, layer.out_features)
    ways: dict[int, Any] = {
        k: way for k, way in strategies(layer, x).items() if predicted[k] <= 6 * min(predicted.values())
    }
    named = {str(k): way for k, way in {**ways, DENSE: lambda: dense(x)}.items()}
    times = paired_medians(named, rounds(named.values(), seconds), warmup=2, clock=clock_for(threads))
    return Timed(layer.plan, tokens, {int(name): time.median for name, time in times.items()})


def fit(timed: Sequence[Timed], start: Machine) -> Machine:
    """Fit the constants to measured times by least squares of logarithms."""
    origin = np.log([max(getattr(start, name), 1e-13) for name in FITTED])

    def machine(logs: NDArray[np.float64]) -> Machine:
        values = dict(zip(FITTED, np.exp(logs).tolist(), strict=True))
        return replace(start, **values, half_peak=values["peak"])

    def residuals(logs: NDArray[np.float64]) -> NDArray[np.float64]:
        candidate, found = machine(logs), []
        for row in timed:
            for route, seconds in row.seconds.items():
                weight = min(1.0, row.fastest / seconds)
                predicted = predict(row.plan, route, row.tokens, candidate)
                found.append(weight * math.log(predicted / seconds))
        return np.array([*found, *(_STAY * (logs - origin))])

    result = least_squares(residuals, origin, loss="soft_l1", f_scale=0.15, diff_step=0.02, max_nfev=25)
    return machine(result.x)


@dataclass(frozen=True)
class TimedInteger:
    """Measured seconds of a layer on bfloat16 inputs: packed in `number_format`, or dense if it is None."""

    number_format: NumberFormat | None
    shape: tuple[int, int]
    tokens: int
    seconds: float

    def predicted(self, machine: Machine) -> float:
        if self.number_format is None:
            return dense_seconds(*self.shape, self.tokens, machine, 2)
        return integer_seconds(self.number_format, self.shape, self.tokens, machine, 2)[1]


@torch.no_grad()
def measure_integers(shape: tuple[int, int], tokens: int, threads: int, seconds: float) -> list[TimedInteger]:
    """Time several copies of a layer in each format, in turn, so that weights are not in the cache."""
    count = max(1, min(32, 2**26 // (2 * shape[0] * shape[1])))
    x = torch.randn(tokens, shape[1], dtype=torch.bfloat16)
    layers: dict[str, list[torch.nn.Module]] = {"dense": [], **{name: [] for name in FORMATS}}
    for _ in range(count):
        dense = torch.nn.Linear(shape[1], shape[0], bias=False)
        layers["dense"].append(dense.bfloat16())
        for name in FORMATS:
            layers[name].append(prepare_for_inference(integers(dense, name).eval()))

    def run(row: list[torch.nn.Module]) -> None:
        for layer in row:
            layer(x)

    ways = {name: partial(run, row) for name, row in layers.items()}
    times = paired_medians(ways, rounds(ways.values(), seconds), warmup=2, clock=clock_for(threads))
    return [
        TimedInteger(
            None if name == "dense" else NumberFormat.parse(name), shape, tokens, time.median / count
        )
        for name, time in times.items()
    ]


def fit_integers(timed: Sequence[TimedInteger], start: Machine) -> Machine:
    """Fit the constants of 16-bit products and of integer formats to measured times."""
    names = ("half_peak", "unpack_pass", "kernel_peak")
    origin = np.log([getattr(start, name) for name in names])

    def machine(logs: NDArray[np.float64]) -> Machine:
        return replace(start, **dict(zip(names, np.exp(logs).tolist(), strict=True)))

    def residuals(logs: NDArray[np.float64]) -> NDArray[np.float64]:
        candidate = machine(logs)
        found = [math.log(row.predicted(candidate) / row.seconds) for row in timed]
        return np.array([*found, *(_STAY * (logs - origin))])

    return machine(least_squares(residuals, origin, loss="soft_l1", f_scale=0.3).x)


def choices(timed: Sequence[Timed], machine: Machine) -> list[float]:
    """For each case, divide the time of the route that the cost model chooses by that of the fastest."""
    ratios = []
    for row in timed:
        ways = [route for route in row.seconds if route != DENSE]
        chosen = min(ways, key=lambda route: predict(row.plan, route, row.tokens, machine))
        ratios.append(row.seconds[chosen] / row.fastest)
    return ratios


def main(arguments: Sequence[str] | None = None) -> Machine:
    """Measure times, fit and print the machine constants, and return the fitted machine."""
    options = options_of(__doc__, arguments)
    shapes, tokens = (SHAPES[:2], (1, 16)) if options.toy else (SHAPES, TOKENS)
    shapes_of_integers = INTEGER_SHAPES[:1] if options.toy else INTEGER_SHAPES
    timed: list[Timed] = []
    integers: list[TimedInteger] = []

    def work(threads: int) -> list[dict[str, Any]]:
        for out_dims, in_dims, bond in shapes:
            case = Case(f"{out_dims} {in_dims} {bond}", out_dims, in_dims, bond)
            timed.extend(measure(case, count, threads, options.seconds) for count in tokens)
        for shape in shapes_of_integers:
            for count in tokens:
                integers.extend(measure_integers(shape, count, threads, options.seconds))
        return []

    with_threads(options.threads[:1], work)
    shipped = default_machine("cpu")
    fitted = fit_integers(integers, fit(timed, shipped))
    for name, machine in {"shipped": shipped, "fitted": fitted}.items():
        ratios = choices(timed, machine)
        print(f"{name}: {machine}")
        above = sum(ratio > 1.1 for ratio in ratios)
        gaps = [abs(math.log(row.predicted(machine) / row.seconds)) for row in integers]
        print(f"  integers: predicted times off by a factor of {math.exp(float(np.median(gaps))):.2f}")
        print(f"  chosen over fastest: largest {max(ratios):.2f}, {above} of {len(ratios)} above 1.10")
    return fitted


if __name__ == "__main__":
    main()
