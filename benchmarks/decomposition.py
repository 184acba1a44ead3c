"""How fast is TT-SVD here, compared with torchTT, tltorch and plain `torch.linalg.svd`, at the same bonds?

    python benchmarks/decomposition.py [--toy] [--threads 1 2] [--repeats 5]

In every case, all installed packages decompose the same float32 matrix at the same bonds, in turn, in one
process. There are two kinds of matrices: Gaussian matrices, whose flat spectrum is the hardest for iterative
methods, and matrices whose singular values fall like `k^-1/2`, more like those of trained weights. Bytes and
errors are reported with the times. Goals for the speed-up over the fastest other package: a geometric mean of
5, and at least 1.5 in every case. Goal for the errors: within 1 % of those of the other packages. Writes the
record `decomposition.json`.
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
from harness import RECORDS, geometric_mean, paired_medians, record, with_threads


@dataclass(frozen=True)
class Case:
    """Shape of a matrix, and of the chain into which it is decomposed.

    Args:
        name: name of the case in the table.
        out_dims: sizes of the out-legs.
        in_dims: sizes of the in-legs.
        max_bond: largest bond; None for the exact chain.
    """

    name: str
    out_dims: tuple[int, ...]
    in_dims: tuple[int, ...]
    max_bond: int | None


MPOE_BASE = ((3, 4, 4, 4, 4), (4, 4, 8, 6, 4))
MPOE_LARGE = ((4, 4, 4, 4, 4), (4, 4, 8, 8, 4))
CASES = (
    Case("MPOE base 768x3072, 5 sites, exact", *MPOE_BASE, None),
    Case("MPOE base 768x3072, 5 sites, bond 128", *MPOE_BASE, 128),
    Case("MPOE base 768x3072, 5 sites, bond 32", *MPOE_BASE, 32),
    Case("MPOE large 1024x4096, 5 sites, bond 64", *MPOE_LARGE, 64),
    Case("768x768, 3 sites, bond 64", (8, 8, 12), (12, 8, 8), 64),
    Case("768x768, 2 sites, bond 64", (24, 32), (32, 24), 64),
    Case("1024x1024, 2 sites, bond 256", (32, 32), (32, 32), 256),
    Case("3072x768, 3 sites, bond 100", (12, 16, 16), (12, 8, 8), 100),
    Case("576x1536, 4 sites, bond 48", (4, 4, 6, 6), (8, 8, 6, 4), 48),
    Case("4096x512, 3 sites, bond 32", (16, 16, 16), (8, 8, 8), 32),
)
TOY = (
    Case("24x24, 3 sites, bond 4", (2, 3, 4), (4, 3, 2), 4),
    Case("16x36, 2 sites, exact", (4, 4), (6, 6), None),
)


def matrix(case: Case, spectrum: str) -> Tensor:
    """Draw the matrix of a case: `"gaussian"`, or `"decaying"` with singular values `k^-1/2` at every cut."""
    generator = torch.Generator().manual_seed(1)
    rows, columns = math.prod(case.out_dims), math.prod(case.in_dims)
    w = torch.randn(rows, columns, generator=generator)
    if spectrum == "gaussian":
        return w
    sites = len(case.out_dims)
    pairs = [axis for k in range(sites) for axis in (k, sites + k)]
    train = w.reshape(*case.out_dims, *case.in_dims).permute(pairs)
    for k in range(1, sites):  # impose the spectrum across each bond in turn
        split = train.reshape(math.prod(train.shape[: 2 * k]), -1)
        tall = split if split.shape[0] <= split.shape[1] else split.T
        values, vectors = torch.linalg.eigh(tall.double() @ tall.double().T)
        wanted = torch.arange(len(values), 0, -1, dtype=torch.float64) ** -0.5
        shaped = (vectors * (wanted / values.clamp_min(1e-12).sqrt())) @ (vectors.T @ tall.double())
        shaped = shaped if split.shape[0] <= split.shape[1] else shaped.T
        train = shaped.float().reshape(train.shape)
    back = [pairs.index(axis) for axis in range(2 * sites)]
    return train.permute(back).reshape(rows, columns).contiguous()


def plain(w: Tensor, case: Case, bonds: Sequence[int]) -> list[Tensor]:
    """Decompose a matrix by textbook TT-SVD with `torch.linalg.svd`."""
    sites = len(case.out_dims)
    pairs = [axis for k in range(sites) for axis in (k, sites + k)]
    rest, left, cores = w.reshape(*case.out_dims, *case.in_dims).permute(pairs), 1, []
    for k, bond in enumerate(bonds):
        out, in_ = case.out_dims[k], case.in_dims[k]
        U, S, Vh = torch.linalg.svd(rest.reshape(left * out * in_, -1), full_matrices=False)
        cores.append(U[:, :bond].reshape(left, out, in_, bond))
        rest, left = S[:bond, None] * Vh[:bond], bond
    cores.append(rest.reshape(left, case.out_dims[-1], case.in_dims[-1], 1))
    return cores


def contenders(w: Tensor, case: Case, bonds: Sequence[int]) -> dict[str, Callable[[], list[Tensor]]]:
    """For each package, return a function that decomposes a matrix into cores `(left, out, in, right)`."""
    legs: dict[str, Any] = {"out_dims": case.out_dims, "in_dims": case.in_dims, "max_bond": case.max_bond}
    found: dict[str, Callable[[], list[Tensor]]] = {
        "tensornet": lambda: list(tn.MPO.from_matrix(w, **legs).cores),
        "torch.linalg.svd": lambda: plain(w, case, bonds),
    }
    ranks, tensor = [1, *bonds, 1], w.reshape(*case.out_dims, *case.in_dims)
    if find_spec("torchtt"):
        import torchtt

        shape = list(zip(case.out_dims, case.in_dims, strict=True))
        found["torchTT"] = lambda: torchtt.TT(tensor, shape, eps=1e-12, rmax=ranks).cores
    if find_spec("tltorch"):
        from tltorch.factorized_tensors.tensorized_matrices import BlockTT

        pair = (case.out_dims, case.in_dims)
        found["tltorch"] = lambda: list(BlockTT.from_tensor(tensor, pair, ranks).factors)
    return found


def measure(case: Case, spectrum: str, threads: int, repeats: int) -> dict[str, Any]:
    """Measure one row of the table: seconds, errors and ratios of all packages."""
    w = matrix(case, spectrum)
    bonds = tn.topologies.mpo(out_dims=case.out_dims, in_dims=case.in_dims, max_bond=case.max_bond)
    functions = contenders(w, case, list(bonds.bond_dims.values())[1:-1])
    errors, ranks = {}, {}
    with torch.no_grad():
        for name, function in functions.items():
            cores = function()
            chain = tn.MPO([core.detach().double() for core in cores])
            errors[name] = float((w - chain.to_matrix()).norm() / w.norm())
            ranks[name] = list(chain.bond_dims)
        times = paired_medians(functions, repeats)
    others = [name for name in functions if name != "tensornet"]
    best = min(times[name].median for name in others)
    return {
        "case": case.name,
        "spectrum": spectrum,
        "threads": threads,
        "bonds": ranks,
        "bytes": 4 * sum(core.numel() for core in cores),
        "error": errors,
        "milliseconds": {name: round(1e3 * time.median, 3) for name, time in times.items()},
        "spread": {name: [round(1e3 * t.low, 3), round(1e3 * t.high, 3)] for name, t in times.items()},
        "speedup": round(best / times["tensornet"].median, 2),
        "error_ratio": errors["tensornet"] / best_error
        if (best_error := min(errors[n] for n in others))
        else 1.0,
    }


def main(arguments: Sequence[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--toy", action="store_true", help="two tiny cases, to test the script")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--records", type=Path, default=RECORDS)
    options = parser.parse_args(arguments)
    cases = TOY if options.toy else CASES
    if options.toy:
        options.threads, options.repeats = [1], 1

    def work(threads: int) -> list[dict[str, Any]]:
        rows = []
        for case in cases:
            for spectrum in ("gaussian", "decaying"):
                rows.append(measure(case, spectrum, threads, options.repeats))
                print(rows[-1], flush=True)
        return rows

    rows = with_threads(options.threads, work)
    truncated = [row["speedup"] for row in rows if "exact" not in row["case"]]
    summary = {
        "geometric_mean": round(geometric_mean(row["speedup"] for row in rows), 2),
        "geometric_mean_without_exact": round(geometric_mean(truncated), 2),
        "smallest": min(row["speedup"] for row in rows),
        "largest_error_ratio": max(row["error_ratio"] for row in rows),
    }
    print(summary)
    return record("decomposition", rows, folder=options.records, summary=summary)


if __name__ == "__main__":
    main()
