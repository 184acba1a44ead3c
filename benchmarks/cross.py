"""How many values, and how much time, does cross approximation need here and in torchTT?

    python benchmarks/cross.py [--toy] [--repeats 3]

`MPO.from_function` and `torchtt.interpolate.dmrg_cross` approximate the same five functions and the same
matrix with 2^20 rows, to the same relative error, in double precision, in turn, in one process. Each error is
that of the result at random indices that neither of the two has seen. For the matrix, half of these indices
are near the diagonal, where its elements are largest. Writes the record `cross.json`.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tensornet as tn

sys.path.insert(0, str(Path(__file__).parent))
from harness import RECORDS, paired_medians, record

X = torch.linspace(-1, 1, 32, dtype=torch.float64)
_POINTS = 10_000


@dataclass(frozen=True)
class Case:
    """A function of indices, or of rows and columns, to approximate.

    Args:
        name: name of the case in the table.
        function: the function of indices `(points, sites)`; for a matrix, of rows and columns.
        dims: number of values of each site; for a matrix, sizes of the legs of its rows, and of its columns.
        rel_error: relative error that both packages are asked for.
        matrix: True for a matrix.
    """

    name: str
    function: Callable[..., Tensor]
    dims: tuple[int, ...]
    rel_error: float
    matrix: bool = False


def cusp(i: Tensor) -> Tensor:
    """Compute `exp(-10 |t - 1/3|) cos(20 t)` at the binary fraction `t` with the digits `i`."""
    t = i @ torch.ldexp(torch.tensor(1.0).double(), -torch.arange(1, i.shape[1] + 1)).unsqueeze(1)
    return (torch.exp(-10 * (t - 1 / 3).abs()) * torch.cos(20 * t))[:, 0]


def gaussian(i: Tensor) -> Tensor:
    x = X[i]
    return torch.exp(-x.square().sum(1) / 2 - x.sum(1).square() / 20)


def kernel(i: Tensor, j: Tensor) -> Tensor:
    return 1 / ((i - j).abs() + 1).double()


CASES = (
    Case("1 / (i + j + k + l + m + n + 1)", lambda i: 1 / (i.sum(1) + 1).double(), (32,) * 6, 1e-8),
    Case("sin(sum x), 10 dimensions", lambda i: torch.sin(X[i].sum(1)), (32,) * 10, 1e-8),
    Case("Gaussian, 10 dimensions", gaussian, (32,) * 10, 1e-8),
    Case("cusp at 2^30 points", lambda i: cusp(i.double()), (2,) * 30, 1e-8),
    Case("1 / (1 + |x|^2), 6 dimensions", lambda i: 1 / (1 + X[i].square().sum(1)), (32,) * 6, 1e-8),
    Case("1 / (|i - j| + 1), 2^20 rows", kernel, (2,) * 20, 1e-6, matrix=True),
)
TOY = (
    Case("sin(sum x), 4 dimensions", lambda i: torch.sin(X[i].sum(1)), (8,) * 4, 1e-8),
    Case("1 / (|i - j| + 1), 2^6 rows", kernel, (2,) * 6, 1e-6, matrix=True),
)


class Counted:
    """A function, and the number of its values."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function, self.count = function, 0

    def __call__(self, indices: Tensor) -> Tensor:
        self.count += len(indices)
        return self.function(indices)


def of_legs(case: Case) -> tuple[Callable[[Tensor], Tensor], tuple[int, ...]]:
    """Return the function of a case as a function of indices `(points, sites)`, and their numbers of values.

    The index of a site of a matrix is `in_dim * row digit + column digit`.
    """
    if not case.matrix:
        return case.function, case.dims

    def function(indices: Tensor) -> Tensor:
        rows = columns = torch.zeros_like(indices[:, 0])
        for index, dim in zip(indices.T, case.dims, strict=True):
            rows, columns = rows * dim + index // dim, columns * dim + index % dim
        return case.function(rows, columns)

    return function, tuple(dim * dim for dim in case.dims)


def fresh_indices(case: Case) -> Tensor:
    """Draw indices `(points, sites)` at which the results are compared with the function."""
    generator = torch.Generator().manual_seed(123)
    _, dims = of_legs(case)
    drawn = [torch.randint(dim, (_POINTS,), generator=generator) for dim in dims]
    if case.matrix:
        # If the first digits of row and column agree, the element is near the diagonal.
        for place, (index, dim) in enumerate(zip(drawn[:-4], case.dims, strict=False)):
            digit = torch.randint(dim, (_POINTS // 2,), generator=generator)
            drawn[place] = torch.cat([digit * (dim + 1), index[_POINTS // 2 :]])
    return torch.stack(drawn, dim=1)


def error(cores: Sequence[Tensor], case: Case) -> float:
    """Compute the relative error of cores `(left, dim, right)` at fresh indices."""
    indices = fresh_indices(case)
    passed = torch.ones(len(indices), 1, 1, dtype=torch.float64)
    for core, index in zip(cores, indices.T, strict=True):
        passed = passed @ core.transpose(0, 1)[index]
    true = of_legs(case)[0](indices)
    return float((passed[:, 0, 0] - true).norm() / true.norm())


def ours(case: Case, counted: Counted) -> list[Tensor]:
    if case.matrix:
        size = math.prod(case.dims)

        def function(rows: Tensor, columns: Tensor) -> Tensor:
            counted.count += len(rows)
            return case.function(rows, columns)

        found, _ = tn.MPO.from_function(
            function, (size, size), out_dims=case.dims, in_dims=case.dims, rel_error=case.rel_error
        )
    else:
        found, _ = tn.MPO.from_function(counted, out_dims=case.dims, rel_error=case.rel_error)
    return [core.flatten(1, 2) for core in found.cores]


def torchtt_cross(case: Case, counted: Counted) -> list[Tensor]:
    import torchtt

    torch.manual_seed(0)
    _, dims = of_legs(case)
    return list(torchtt.interpolate.dmrg_cross(counted, list(dims), eps=case.rel_error, nswp=20).cores)


def measure(case: Case, repeats: int) -> list[dict[str, Any]]:
    """Measure one row for each package."""
    packages = {"tensornet": ours}
    if find_spec("torchtt"):
        packages["torchTT"] = torchtt_cross
    function, _ = of_legs(case)
    rows, calls = [], {}
    for name, run in packages.items():
        counted = Counted(function)
        cores = [core.detach() for core in run(case, counted)]
        calls[name] = lambda run=run, counted=counted: run(case, counted)
        rows.append(
            {
                "case": case.name,
                "package": name,
                "rel_error": case.rel_error,
                "error": error(cores, case),
                "evaluations": counted.count,
                "bonds": [core.shape[2] for core in cores[:-1]],
                "bytes": 8 * sum(core.numel() for core in cores),
            }
        )
    for row, time in zip(rows, paired_medians(calls, repeats, warmup=0).values(), strict=True):
        row |= {"seconds": round(time.median, 4), "spread": [round(time.low, 4), round(time.high, 4)]}
    return rows


def main(arguments: Sequence[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--toy", action="store_true", help="two tiny cases, to test the script")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--records", type=Path, default=RECORDS)
    options = parser.parse_args(arguments)
    rows = []
    for case in TOY if options.toy else CASES:
        rows += measure(case, 1 if options.toy else options.repeats)
        for row in rows[-2:]:
            print(row, flush=True)
    return record("cross", rows, folder=options.records, dtype="float64")


if __name__ == "__main__":
    main()
