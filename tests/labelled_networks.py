"""Networks of labelled tensors, einsum, and costs of contraction orders counted step by step."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from tensornet.testing import reference

Labels = tuple[str, ...]
Network = tuple[list[Labels], Labels, dict[str, int]]


def random_network(count: int, seed: int, *, extra: int = 3, largest: int = 3) -> Network:
    """Draw a connected network: a random tree of bonds, further bonds, one bond of three cores, and legs."""
    drawn = random.Random(seed)
    operands: list[list[str]] = [[] for _ in range(count)]
    pairs = [(drawn.randrange(k), k) for k in range(1, count)]
    pairs += [(a, b) for a, b in (sorted(drawn.sample(range(count), 2)) for _ in range(extra))]
    for number, ends in enumerate([*pairs, drawn.sample(range(count), min(3, count))]):
        for k in ends:
            operands[k].append(f"bond{number}")
    legs = [f"leg{k}" for k in drawn.sample(range(count), min(2, count))]
    for label in legs:
        operands[int(label[3:])].append(label)
    sizes = {label: drawn.randint(1, largest) for labels in operands for label in labels}
    shared = [x for x in sizes if x.startswith("bond") and drawn.random() < 0.1]  # batch indices
    return [tuple(labels) for labels in operands], (*legs, *shared[:1]), sizes


def grid(rows: int, columns: int, bond: int) -> Network:
    """Build a closed grid."""
    names = {(i, j): [] for i in range(rows) for j in range(columns)}
    for i, j in names:
        for other in ((i + 1, j), (i, j + 1)):
            if other in names:
                for core in ((i, j), other):
                    names[core].append(f"{(i, j)}-{other}")
    operands = [tuple(labels) for labels in names.values()]
    return operands, (), {x: bond for labels in operands for x in labels}


def tensors_of(network: Network, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    operands, _, sizes = network
    return [torch.randn([sizes[x] for x in labels], dtype=dtype) for labels in operands]


def einsum(network: Network, tensors: Sequence[Tensor]) -> np.ndarray:
    """Contract in NumPy, for any number of labels: operands are multiplied one after another."""
    operands, output, _ = network
    work = [(labels, reference.to_numpy(x)) for labels, x in zip(operands, tensors, strict=True)]
    while len(work) > 1:
        (a, x), (b, y), *rest = work
        wanted = {*output, *itertools.chain(*(labels for labels, _ in rest))}
        kept = tuple(label for label in dict.fromkeys((*a, *b)) if label in wanted)
        number = {label: k for k, label in enumerate(dict.fromkeys((*a, *b)))}
        z = np.einsum(x, [number[t] for t in a], y, [number[t] for t in b], [number[t] for t in kept])
        work = [(kept, z), *rest]
    labels, x = work[0]
    return x.transpose([labels.index(label) for label in output])


def products(network: Network, path: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield the multiply-adds and the size of each product of a path."""
    operands, output, sizes = network
    work = [set(labels) for labels in operands]
    for first, second in path:
        a, b = work[first], work[second]
        work = [labels for k, labels in enumerate(work) if k not in (first, second)]
        kept = (a | b) & {*output, *itertools.chain(*work)}
        work.append(kept)
        yield volume(a | b, sizes), volume(kept, sizes)


def volume(labels: set[str], sizes: Mapping[str, int]) -> int:
    return math.prod(sizes[label] for label in labels)


def cost(network: Network, path: Sequence[tuple[int, int]]) -> int:
    return sum(multiply_adds for multiply_adds, _ in products(network, path))


def width(network: Network, path: Sequence[tuple[int, int]]) -> int:
    return max((size for _, size in products(network, path)), default=0)


def all_paths(count: int) -> Iterator[list[tuple[int, int]]]:
    if count == 1:
        yield []
    for pair in itertools.combinations(range(count), 2):
        for rest in all_paths(count - 1) if count > 1 else ():
            yield [pair, *rest]
