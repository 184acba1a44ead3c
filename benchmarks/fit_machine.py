"""Which constants make the cost model foresee what this machine takes?

    python benchmarks/fit_machine.py [--toy] [--threads 1] [--seconds 0.3]

Every way to apply a layer is timed for layers of many shapes, none of them one of the other benchmarks',
and the constants of `tensornet.Machine` are fitted to the logarithms of the times. A way that takes far
longer than the fastest matters less. `half_size` stays as it is: it belongs to the kernels of the library
that multiplies. Prints the constants and how good the choices are that follow from them; writes no record.
Measure on a quiet machine: a busy one makes all that goes through memory look slower.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import least_squares

sys.path.insert(0, str(Path(__file__).parent))
from forward import strategies
from harness import paired_medians
from speed import Case, clock_for, options_of, rounds, with_threads

from tensornet.contraction.cost import dense_seconds
from tensornet.contraction.machine import Machine, default_machine
from tensornet.contraction.operator import OperatorPlan

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
FITTED = ("peak", "bandwidth", "overhead", "copy_element", "copy_run", "copy_far")

#: A constant that little depends on stays near where it was: so much of a residual for a factor of e.
_STAY = 0.1


#: The dense layer, beside the routes of `OperatorPlan.seconds`.
DENSE = -2


def predict(plan: OperatorPlan, route: int, tokens: int, machine: Machine) -> float:
    """Seconds by the cost model."""
    if route == DENSE:
        return dense_seconds(*plan.shape, tokens, machine)
    return plan.seconds(route, tokens, machine)


@dataclass(frozen=True)
class Timed:
    """Seconds of every way to apply a layer to so many tokens, by route; a dense layer counts as `DENSE`."""

    plan: OperatorPlan
    tokens: int
    seconds: dict[int, float]

    @property
    def fastest(self) -> float:
        """Seconds of the fastest way without a kept matrix."""
        return min(value for route, value in self.seconds.items() if route != DENSE)


@torch.no_grad()
def measure(case: Case, tokens: int, threads: int, seconds: float) -> Timed:
    """Time all ways that are not predicted to take more than six times the fastest."""
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
    """The constants that foresee these times best, by least squares of logarithms."""
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


def choices(timed: Sequence[Timed], machine: Machine) -> list[float]:
    """Time of the way that the model chooses over the time of the fastest."""
    ratios = []
    for row in timed:
        ways = [route for route in row.seconds if route != DENSE]
        chosen = min(ways, key=lambda route: predict(row.plan, route, row.tokens, machine))
        ratios.append(row.seconds[chosen] / row.fastest)
    return ratios


def main(arguments: Sequence[str] | None = None) -> Machine:
    """Measure, fit, print."""
    options = options_of(__doc__, arguments)
    shapes, tokens = (SHAPES[:2], (1, 16)) if options.toy else (SHAPES, TOKENS)
    timed: list[Timed] = []

    def work(threads: int) -> list[dict[str, Any]]:
        for out_dims, in_dims, bond in shapes:
            case = Case(f"{out_dims} {in_dims} {bond}", out_dims, in_dims, bond)
            timed.extend(measure(case, count, threads, options.seconds) for count in tokens)
        return []

    with_threads(options.threads[:1], work)
    shipped = default_machine("cpu")
    fitted = fit(timed, shipped)
    for name, machine in {"shipped": shipped, "fitted": fitted}.items():
        ratios = choices(timed, machine)
        print(f"{name}: {machine}")
        above = sum(ratio > 1.1 for ratio in ratios)
        print(f"  chosen over fastest: largest {max(ratios):.2f}, {above} of {len(ratios)} above 1.10")
    return fitted


if __name__ == "__main__":
    main()
