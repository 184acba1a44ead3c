"""How many multiply-adds do our contraction orders need, compared with cotengra's in the same time?

    python benchmarks/paths.py [--toy]

Twenty networks: grids, 3-regular graphs, trees, rings, MPO sandwiches and circuits. Needs cotengra (extra
`paths`). Each search has two seconds: ours of processor time, cotengra's `HyperOptimizer` of wall time, one
after another. cotengra runs with and without its reconfiguration of subtrees, and the better of the two
counts; `optimize="cotengra"` refines a tree of cotengra by our code.

`multiply_adds` and `width` (elements of the largest product) are ours; the other columns are relative to the
better tree of cotengra, or to opt_einsum's `auto-hq`. For `sliced`, each product has at most a sixteenth of
the width: multiply-adds of all slices by our slicing, relative to those by cotengra's of the same tree, and
relative to the tree without slices (`slicing_costs`). They are missing where no 65,536 slices are enough, as
in long chains, each part of which needs slices of its own.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cotengra
import opt_einsum

sys.path.insert(0, str(Path(__file__).parent))
from harness import RECORDS, geometric_mean, peak_mib, record, table

from tensornet.contraction.search import SECONDS, Problem, Tree, find_path
from tensornet.contraction.slicing import plan_slices
from tensornet.errors import MemoryLimitError

Labels = tuple[str, ...]


@dataclass(frozen=True)
class Network:
    """A network to contract.

    Args:
        name: name in the table.
        operands: labels of each tensor.
        output: labels of the result.
        size_of: size of each label.
    """

    name: str
    operands: tuple[Labels, ...]
    output: Labels
    size_of: dict[str, int]


def graph(name: str, edges: list[tuple[int, int]], bond: int | tuple[int, int], legs: int = 0) -> Network:
    """Build a network of a graph: a tensor for each vertex, an index for each edge.

    Args:
        name: name in the table.
        edges: pairs of vertices.
        bond: size of the indices, or the limits of random sizes.
        legs: size of an open leg at each vertex; none if 0.
    """
    drawn = random.Random(name)
    operands: dict[int, list[str]] = {}
    size_of = {}
    for k, pair in enumerate(edges):
        size_of[f"e{k}"] = drawn.randint(*bond) if isinstance(bond, tuple) else bond
        for vertex in pair:
            operands.setdefault(vertex, []).append(f"e{k}")
    output = [f"l{v}" for v in operands if legs]
    for vertex, labels in operands.items():
        if legs:
            labels.append(f"l{vertex}")
            size_of[f"l{vertex}"] = legs
    return Network(name, tuple(map(tuple, operands.values())), tuple(output), size_of)


def grid(rows: int, columns: int, bond: int, legs: int = 0) -> Network:
    def at(i: int, j: int) -> int:
        return i * columns + j

    cells = list(itertools.product(range(rows), range(columns)))
    edges = [(at(i, j), at(i, j + 1)) for i, j in cells if j + 1 < columns]
    edges += [(at(i, j), at(i + 1, j)) for i, j in cells if i + 1 < rows]
    opened = f", legs {legs}" if legs else ""
    return graph(f"grid {rows} x {columns}, bond {bond}{opened}", edges, bond, legs)


def regular(count: int, bond: int) -> Network:
    """Draw a simple 3-regular graph."""
    drawn = random.Random(count)
    while True:
        stubs = [v for v in range(count) for _ in range(3)]
        drawn.shuffle(stubs)
        edges = [(min(p), max(p)) for p in zip(stubs[::2], stubs[1::2], strict=True)]
        if len(set(edges)) == len(edges) and all(a != b for a, b in edges):
            return graph(f"3-regular, {count} cores, bond {bond}", edges, bond)


def tree(count: int, bonds: tuple[int, int], legs: int = 0) -> Network:
    drawn = random.Random(count)
    edges = [(drawn.randrange(max(0, k - 6), k), k) for k in range(1, count)]
    return graph(f"tree, {count} cores, bonds {bonds[0]} to {bonds[1]}", edges, bonds, legs)


def ring(count: int, bonds: tuple[int, int]) -> Network:
    """Build the overlap of two rings, as of two periodic matrix product states."""
    edges = [(k, (k + 1) % count) for k in range(count)]
    edges += [(count + a, count + b) for a, b in edges]
    edges += [(k, count + k) for k in range(count)]
    return graph(f"overlap of rings, {count} sites, bonds {bonds[0]} to {bonds[1]}", edges, bonds)


def sandwich(sites: int, state: int, operator: int, layers: int = 1) -> Network:
    """Build `<psi| H ... H |psi>` of matrix product states and operators."""
    operands: list[Labels] = []
    size_of: dict[str, int] = {}
    for row in range(layers + 2):
        bond = state if row in (0, layers + 1) else operator
        for k in range(sites):
            legs = [f"p{x}.{k}" for x in (row - 1, row) if 0 <= x <= layers]
            bonds = [f"b{row}.{x}" for x in (k, k + 1) if 0 < x < sites]
            size_of |= dict.fromkeys(legs, 2) | dict.fromkeys(bonds, bond)
            operands.append((*bonds, *legs))
    return Network(
        f"sandwich of {layers} MPO, {sites} sites, bonds {state} and {operator}", tuple(operands), (), size_of
    )


def circuit(qubits: int, depth: int, columns: int | None = None) -> Network:
    """Build an amplitude of a circuit of two-qubit gates, on a line or on a grid with `columns` columns."""
    drawn = random.Random(1000 * qubits + depth)
    width = columns or qubits
    across = [(k, k + 1) for k in range(qubits - 1) if (k + 1) % width]
    pairs = across + [(k, k + width) for k in range(qubits - width)]
    wire = [f"q{k}.0" for k in range(qubits)]
    operands: list[Labels] = [(x,) for x in wire]
    count = itertools.count(1)
    for _ in range(depth):
        drawn.shuffle(pairs)
        busy: set[int] = set()
        for a, b in pairs:
            if a in busy or b in busy:
                continue
            busy |= {a, b}
            new = [f"q{x}.{next(count)}" for x in (a, b)]
            operands.append((*new, wire[a], wire[b]))
            wire[a], wire[b] = new
    operands += [(x,) for x in wire]
    size_of = dict.fromkeys(itertools.chain(*operands), 2)
    shape = f"{qubits // width} x {width}" if columns else str(qubits)
    return Network(f"circuit, {shape} qubits, depth {depth}", tuple(operands), (), size_of)


def networks() -> Iterator[Network]:
    yield grid(5, 4, 4)
    yield grid(6, 6, 3)
    yield grid(8, 8, 2)
    yield grid(10, 10, 2)
    yield grid(4, 4, 3, legs=2)
    yield regular(20, 4)
    yield regular(40, 3)
    yield regular(60, 2)
    yield regular(100, 2)
    yield tree(30, (2, 16))
    yield tree(60, (2, 8))
    yield tree(14, (2, 8), legs=2)
    yield ring(10, (2, 8))
    yield ring(30, (2, 8))
    yield sandwich(12, 16, 5)
    yield sandwich(30, 8, 4, 2)
    yield sandwich(40, 6, 3, 3)
    yield circuit(16, 24)
    yield circuit(30, 20)
    yield circuit(20, 16, columns=5)


def in_symbols(network: Network) -> tuple[list[tuple[str, ...]], tuple[str, ...], dict[str, int]]:
    """Name labels by single characters, since cotengra's fastest code accepts no others."""
    symbol = {label: opt_einsum.get_symbol(k) for k, label in enumerate(network.size_of)}
    operands = [tuple(symbol[x] for x in labels) for labels in network.operands]
    output = tuple(symbol[x] for x in network.output)
    return operands, output, {symbol[x]: size for x, size in network.size_of.items()}


def by_cotengra(network: Network, **options: Any) -> list[tuple[int, int]]:
    """Search with cotengra for two seconds."""
    random.seed(0)
    optimizer = cotengra.HyperOptimizer(minimize="flops", max_time=SECONDS, parallel=False, **options)
    return [(min(step), max(step)) for step in optimizer(*in_symbols(network))]


def compare(network: Network) -> dict[str, Any]:
    """Search for orders of one network, and slice ours."""
    problem = Problem.of(network.operands, network.output, network.size_of)

    def tree(path: Sequence[tuple[int, int]]) -> Tree:
        return Tree.of_path(problem, path)

    named = (network.operands, network.output, network.size_of)
    start = time.perf_counter()
    ours = tree(find_path(*named))
    seconds = time.perf_counter() - start
    theirs = min(
        (tree(by_cotengra(network, **options)) for options in ({}, {"reconf_opts": {}})), key=lambda x: x.cost
    )
    refined, high = tree(find_path(*named, "cotengra")), tree(find_path(*named, "auto-hq"))
    row = {
        "network": network.name,
        "cores": len(network.operands),
        "multiply_adds": float(ours.cost),
        "width": float(ours.width),
        "seconds": seconds,
        "over_cotengra": ours.cost / theirs.cost,
        "width_over_cotengra": ours.width / theirs.width,
        "refined_over_cotengra": refined.cost / theirs.cost,
        "over_auto_hq": ours.cost / high.cost,
    }
    most = max(ours.width // 16, problem.volumes[problem.output], 2)
    try:
        sliced = plan_slices(*named, most, optimize=ours.path())
    except MemoryLimitError:
        return row
    other = cotengra.ContractionTree.from_path(*in_symbols(network), path=ours.path()).slice(target_size=most)
    return {
        **row,
        "sliced_over_cotengra": sliced.multiply_adds / float(other.contraction_cost()),
        "slicing_costs": sliced.multiply_adds / ours.cost,
    }


def main(arguments: Sequence[str] | None = None) -> Path:
    """Compare all networks, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="two small networks")
    parser.add_argument("--records", type=Path, default=RECORDS)
    given = parser.parse_args(arguments)
    rows = []
    for network in [grid(3, 3, 2), ring(5, (2, 4))] if given.toy else networks():
        rows.append(compare(network))
        print(rows[-1], flush=True)
    columns = dict.fromkeys(itertools.chain(*rows))
    ratios = [name for name in columns if "over" in name or name == "slicing_costs"]
    means = {name: geometric_mean(row[name] for row in rows if name in row) for name in ratios}
    rows.append({"network": "geometric mean", **means})
    print(table(rows))
    return record("paths", rows, folder=given.records, peak_mib=peak_mib(), search_seconds=SECONDS)


if __name__ == "__main__":
    print(main())
