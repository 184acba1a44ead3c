"""Which form of sharing fits the experts of an existing mixture best, at equal numbers of parameters?

    python benchmarks/planted_stacks.py           # minutes; writes benchmarks/records/planted_stacks.json
    python benchmarks/planted_stacks.py --toy     # seconds, for the tests

Stacks of eight matrices with a structure planted in noise: a base and low-rank deltas, a mixture of bases,
one subspace of rows and columns for all, one center of a chain, and nothing in common. Each is fitted at 80,
60 and 40 % of its parameters by an SVD of each expert, by a base and low-rank deltas (D2-MoE), by a mixture
of bases (MoBE) and by a chain with a shared center. Every method may choose its sizes within the budget: of
a few splits between shared and private parameters the one with the lowest error counts. The error is
`|W - W'| / |W|` over the whole stack.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tensornet as tn
import tensornet_moe as tm
from tensornet_moe.joint_fit import fit_shared

sys.path.insert(0, str(Path(__file__).parent))
from harness import RECORDS, record

KEEP = (0.8, 0.6, 0.4)
NOISE = 0.2
#: Fractions of the budget that a method may spend on what experts share.
SPLITS = (0.2, 0.4, 0.6, 0.8)


@dataclass(frozen=True)
class Case:
    """Sizes of a stack.

    Args:
        experts: matrices.
        rows, columns: of each.
        sweeps: of alternating least squares.
        seeds: one stack for each.
    """

    experts: int = 8
    rows: int = 64
    columns: int = 32
    sweeps: int = 20
    seeds: tuple[int, ...] = (0, 1, 2)


TOY = Case(experts=3, rows=16, columns=8, sweeps=3, seeds=(0,))


def base_and_deltas(case: Case, draw: Callable[..., Tensor]) -> Tensor:
    """Draw one matrix, and a delta of an eighth of the rank for each expert."""
    rank = case.columns // 8
    deltas = draw(case.experts, case.rows, rank) @ draw(case.experts, rank, case.columns)
    return draw(case.rows, case.columns) + deltas / rank**0.5


def mixture_of_bases(case: Case, draw: Callable[..., Tensor]) -> Tensor:
    """Draw two bases of half the rank, mixed and transformed by each expert."""
    rank = case.columns // 2
    mixed = torch.einsum("ek,kor->eor", draw(case.experts, 2), draw(2, case.rows, rank))
    return mixed @ draw(case.experts, rank, case.columns) / rank**0.5


def one_subspace(case: Case, draw: Callable[..., Tensor]) -> Tensor:
    """Draw experts whose rows and columns lie in one subspace of half the dimension."""
    rank = case.columns // 2
    return draw(case.rows, rank) @ draw(case.experts, rank, rank) @ draw(rank, case.columns) / rank


def one_center(case: Case, draw: Callable[..., Tensor]) -> Tensor:
    """Draw chains of full bonds that share their long core."""
    bank = tm.SharedCoreExperts(_chain(case, None), case.experts)
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.copy_(draw(*parameter.shape))
        return bank.expert_matrices().detach().clone()


def unrelated(case: Case, draw: Callable[..., Tensor]) -> Tensor:
    """Draw low-rank experts with nothing in common."""
    rank = case.columns // 2
    return draw(case.experts, case.rows, rank) @ draw(case.experts, rank, case.columns)


STACKS = {
    "base and deltas": base_and_deltas,
    "mixture of bases": mixture_of_bases,
    "one subspace": one_subspace,
    "one center": one_center,
    "unrelated": unrelated,
}


def planted(name: str, case: Case, seed: int) -> Tensor:
    """Draw a stack of unit variance and add noise."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    exact = STACKS[name](case, draw)
    return exact / exact.std() + NOISE * draw(*exact.shape)


def _chain(case: Case, max_bond: int | None) -> tn.Topology:
    a = 4 if case.columns >= 32 else 2
    out_dims, in_dims = (a, case.rows // a**2, a), (a, case.columns // a**2, a)
    return tn.topologies.mpo(out_dims=out_dims, in_dims=in_dims, max_bond=max_bond)


Made = tuple[Tensor, int]  # matrices, parameters


def svd(weights: Tensor, budget: int, case: Case) -> Iterator[Made]:
    """Fit an SVD to each expert."""
    rank = budget // (case.experts * (case.rows + case.columns))
    if rank:
        cut = [tn.decompose(w, "low_rank", max_bond=rank).network for w in weights]
        yield torch.stack([network.to_matrix() for network in cut]), sum(n.num_params for n in cut)


def deltas(weights: Tensor, budget: int, case: Case) -> Iterator[Made]:
    """Fit a base, and low-rank deltas to what the base leaves."""
    rank = (budget - case.rows * case.columns) // (case.experts * (case.rows + case.columns))
    if rank > 0:
        bank = tm.LowRankDeltaExperts.from_experts(
            weights, rank=min(rank, case.columns), max_sweeps=case.sweeps
        )
        yield bank.expert_matrices(), bank.num_params


def bases(weights: Tensor, budget: int, case: Case) -> Iterator[Made]:
    """Fit a mixture of bases for every split of the budget."""
    for split in SPLITS:
        rank = int((1 - split) * budget / (case.experts * case.columns))
        rank = min(max(rank, 1), case.columns)
        number = int((budget - case.experts * rank * case.columns) / (rank * case.rows + case.experts))
        if number < 1:
            continue
        topology = tm.mixture_of_bases(
            out_features=case.rows, in_features=case.columns, bases=number, rank=rank
        )
        yield from _jointly(weights, topology, ("basis",), budget, case)


def center(weights: Tensor, budget: int, case: Case) -> Iterator[Made]:
    """Fit chains with a shared center, for every pair of bonds in a grid."""
    widest = max(_chain(case, None).bond_dims.values())
    for bond in sorted({max(1, round(widest * x)) for x in (*SPLITS, 1.0)}):
        yield from _jointly(weights, _chain(case, bond), "center", budget, case)


def _jointly(
    weights: Tensor, topology: tn.Topology, shared: str | tuple[str, ...], budget: int, case: Case
) -> Iterator[Made]:
    size = tm.SharedCoreExperts(topology, case.experts, shared=shared, device="meta").num_params
    if size > budget:
        return
    names = shared if isinstance(shared, tuple) else (topology.central_core,)
    fit = fit_shared(weights, topology, names, max_sweeps=case.sweeps)
    bank = tm.SharedCoreExperts(topology, case.experts, shared=names)
    with torch.no_grad():
        for name, parameter in bank.named_parameters():
            parameter.copy_(fit.cores[name.removeprefix("core_")])
    yield bank.expert_matrices(), size


METHODS: dict[str, Callable[[Tensor, int, Case], Iterator[Made]]] = {
    "SVD of each": svd,
    "base and deltas": deltas,
    "mixture of bases": bases,
    "shared center": center,
}


@torch.no_grad()
def compare(case: Case) -> list[dict[str, Any]]:
    """Fit every stack by every method at every budget."""
    rows = []
    for name in STACKS:
        for seed in case.seeds:
            weights = planted(name, case, seed)
            for keep in KEEP:
                budget = int(keep * weights.numel())
                for method, fits in METHODS.items():
                    tried = [
                        (float((made - weights).norm() / weights.norm()), size)
                        for made, size in fits(weights, budget, case)
                    ]
                    error, size = min(tried, default=(None, None))
                    assert size is None or size <= budget
                    rows.append(
                        {
                            "stack": name,
                            "seed": seed,
                            "keep": keep,
                            "method": method,
                            "error": error,
                            "parameters": size,
                        }
                    )
    return rows


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Compare, print, record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--toy", action="store_true", help="tiny sizes, for the tests")
    parser.add_argument("--output", type=Path, default=RECORDS, help="folder of the record")
    options = parser.parse_args(arguments)
    case = TOY if options.toy else Case()
    rows = compare(case)
    for stack in STACKS:
        for keep in KEEP:
            means = []
            for method in METHODS:
                found = [
                    r["error"]
                    for r in rows
                    if (r["stack"], r["keep"], r["method"]) == (stack, keep, method)
                    and r["error"] is not None
                ]
                means.append(f"{method} {sum(found) / len(found):.4f}" if found else f"{method} -")
            print(f"{stack:18} {keep:.0%}  {'  '.join(means)}")
    record("planted_stacks", rows, folder=options.output, noise=NOISE)
    return rows


if __name__ == "__main__":
    main()
