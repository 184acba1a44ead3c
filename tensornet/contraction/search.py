"""Search for contraction orders with few multiply-adds.

A contraction order is a binary tree. Its leaves are the operands, and each inner node is the product of its
two children. A product needs as many multiply-adds as the product of the sizes of all indices of its factors.
Few operands are solved exactly by dynamic programming over sets of operands. For more operands, a randomized
greedy search finds trees, and `refine` improves them by solving small parts of a tree exactly. The random
numbers are fixed; the clock only ends the search of a large network.

Reference:
    Gray and Kourtis 2021, "Hyper-optimized tensor network contraction".
"""

import heapq
import itertools
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import opt_einsum
from opt_einsum.paths import get_path_fn

from tensornet._util import import_optional
from tensornet.errors import ContractionError

Labels = tuple[str, ...]

#: Contraction order: pairs of positions in the list of remaining operands, as in `opt_einsum`. The product of
#: a pair is appended to the list.
Path = Sequence[tuple[int, int]]

#: Name of an optimizer, an optimizer object of opt_einsum or cotengra, or a path.
Optimizer = str | Callable[..., Any] | Path

#: All orders of at most this number of operands are considered.
EXACT = 9

#: Number of leaves of the parts that `refine` solves exactly.
_WINDOW = 8

#: Limit of the search of a network with more than `EXACT` operands, in seconds of processor time.
SECONDS = 2.0

#: Each round of the search refines the best of several greedy trees: of at least this number.
_TRIALS = 8

#: The search ends after this number of rounds without improvement.
_PATIENCE = 6

# --- contraction trees ----------------------------------------------------------------------------


class _Volumes(dict[int, int]):
    """Products of the sizes of sets of indices, computed once; bit `k` of a key stands for index `k`."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = sizes
        self._equal = [(size, sum(1 << k for k, x in enumerate(sizes) if x == size)) for size in set(sizes)]

    def __missing__(self, indices: int) -> int:
        self[indices] = volume = math.prod(
            size ** (indices & equal).bit_count() for size, equal in self._equal
        )
        return volume


def bits(indices: int) -> Iterator[int]:
    """Yield the positions of the bits that are set."""
    while indices:
        lowest = indices & -indices
        yield lowest.bit_length() - 1
        indices ^= lowest


@dataclass(frozen=True)
class Problem:
    """Operands to contract; a set of indices is an integer whose bit `k` is set if index `k` is in the set.

    Args:
        operands: the indices of each operand.
        output: the indices of the result.
        labels: the label of each index.
        volumes: product of the sizes of the indices of a set.
    """

    operands: tuple[int, ...]
    output: int
    labels: Labels
    volumes: _Volumes

    @classmethod
    def of(cls, operands: Sequence[Labels], output: Labels, size_of: Mapping[str, int]) -> "Problem":
        """Convert labels to numbers; labels of size 1 are omitted."""
        labels = tuple(dict.fromkeys(x for x in itertools.chain(*operands, output) if size_of[x] > 1))
        bit = {label: 1 << k for k, label in enumerate(labels)}
        sets = [sum(bit.get(x, 0) for x in indices) for indices in (*operands, output)]
        return cls(tuple(sets[:-1]), sets[-1], labels, _Volumes([size_of[label] for label in labels]))

    def without(self, indices: int) -> "Problem":
        """Return the problem of one slice, in which these indices have a single value."""
        operands = tuple(x & ~indices for x in self.operands)
        return Problem(operands, self.output & ~indices, self.labels, self.volumes)


class Tree:
    """Contraction tree. Its nodes are numbers; the first ones are the positions of the operands.

    Args:
        problem: the operands.
        pairs: the two children of each inner node, which has the next free number; the last one is the root.
    """

    def __init__(self, problem: Problem, pairs: Iterable[tuple[int, int]]) -> None:
        self.problem = problem
        #: The two children of each inner node.
        self.children = dict(enumerate(pairs, start=len(problem.operands)))
        #: The root of the tree, whose product is the result.
        self.root = self._last = len(problem.operands) + len(self.children) - 1
        #: The indices of each node.
        self.indices = dict(enumerate(problem.operands))
        for node, kept in _kept_indices(problem, self.children).items():
            self.indices[node] = kept

    @classmethod
    def of_path(cls, problem: Problem, path: Path) -> "Tree":
        """Build the tree of a path."""
        nodes, pairs = list(range(len(problem.operands))), []
        for new, (first, second) in enumerate(path, start=len(nodes)):
            pairs.append((nodes[first], nodes[second]))
            nodes = [x for k, x in enumerate(nodes) if k not in (first, second)] + [new]
        return cls(problem, pairs)

    def without(self, indices: int) -> "Tree":
        """Copy the tree for one slice, in which these indices have a single value."""
        number = {k: k for k in range(len(self.problem.operands))}
        pairs = []
        for node in self.inner(self.root, ())[::-1]:  # children come before parents
            number[node] = len(number)
            left, right = self.children[node]
            pairs.append((number[left], number[right]))
        return Tree(self.problem.without(indices), pairs)

    def inner(self, top: int, leaves: Iterable[int]) -> list[int]:
        """List the inner nodes between `top` and `leaves`, parents before children."""
        found, stack = [], [top]
        while stack:
            node = stack.pop()
            if node in self.children and node not in leaves:
                found.append(node)
                stack += self.children[node]
        return found

    def node_cost(self, node: int) -> int:
        """Count the multiply-adds of one inner node."""
        left, right = self.children[node]
        return self.problem.volumes[self.indices[left] | self.indices[right]]

    @property
    def cost(self) -> int:
        """Number of multiply-adds of the contraction."""
        return sum(map(self.node_cost, self.children))

    @property
    def width(self) -> int:
        """Number of elements of the largest product."""
        return max((self.problem.volumes[self.indices[node]] for node in self.children), default=0)

    def path(self) -> list[tuple[int, int]]:
        """Return a path with the order of the tree."""
        remaining, steps = list(range(len(self.problem.operands))), []
        for node in self.inner(self.root, ())[::-1]:
            first, second = sorted(remaining.index(child) for child in self.children[node])
            steps.append((first, second))
            del remaining[second], remaining[first]
            remaining.append(node)
        return steps

    def part(self, top: int, leaves: int, value: Callable[[int], float]) -> list[int]:
        """Choose at most `leaves` nodes whose product is `top`, by splitting nodes of the largest value."""
        found = list(self.children[top])
        while len(found) < leaves and (splittable := [node for node in found if node in self.children]):
            split = max(splittable, key=value)
            found.remove(split)
            found += self.children[split]
        return found

    def replace(self, top: int, leaves: Sequence[int], pairs: Sequence[tuple[int, int]]) -> None:
        """Replace the part between `top` and `leaves` by a tree of the leaves, as `optimal` returns it."""
        for node in self.inner(top, leaves):
            del self.children[node]
        small = Problem(tuple(self.indices[x] for x in leaves), self.indices[top], (), self.problem.volumes)
        kept = _kept_indices(small, dict(enumerate(pairs, start=len(leaves))))
        number = [*leaves, *range(self._last + 1, self._last + len(pairs)), top]
        self._last += len(pairs) - 1
        for node, (left, right) in enumerate(pairs, start=len(leaves)):
            self.children[number[node]] = (number[left], number[right])
            self.indices[number[node]] = kept[node]


def _kept_indices(problem: Problem, children: Mapping[int, tuple[int, int]]) -> dict[int, int]:
    """Compute the indices of inner nodes, which must come after their children.

    A product keeps the indices that an operand outside the node has, or the output.
    """
    count = len(problem.operands)
    # Index `k` is summed in the node that joins all operands with this index.
    members = [1 << k for k in range(count)]
    carriers: dict[int, int] = {}
    for k, indices in enumerate(problem.operands):
        for x in bits(indices & ~problem.output):
            carriers[x] = carriers.get(x, 0) | 1 << k
    indices_of, kept = list(problem.operands), {}
    for node, (left, right) in children.items():
        members.append(members[left] | members[right])
        union = indices_of[left] | indices_of[right]
        for x in bits(union & ~problem.output):
            if not carriers[x] & ~members[node]:
                union ^= 1 << x
        indices_of.append(union)
        kept[node] = union
    return kept


# --- algorithms -----------------------------------------------------------------------------------


def optimal(problem: Problem, bound: float = math.inf) -> list[tuple[int, int]] | None:
    """Find the tree with the fewest multiply-adds, by dynamic programming over all sets of operands.

    Args:
        problem: at most about ten operands.
        bound: only trees with fewer multiply-adds count.

    Returns:
        The pairs of the tree (`Tree`), or None if no tree is below the bound.
    """
    operands, volumes = problem.operands, problem.volumes
    full = (1 << len(operands)) - 1
    union = [0] * (full + 1)
    for members in range(1, full + 1):
        lowest = members & -members
        union[members] = union[members ^ lowest] | operands[lowest.bit_length() - 1]
    kept = [union[members] & (union[full ^ members] | problem.output) for members in range(full + 1)]
    least: list[float] = [math.inf] * (full + 1)
    division = [0] * (full + 1)
    for k, indices in enumerate(operands):
        least[1 << k], kept[1 << k] = 0, indices
    for members in range(3, full + 1):
        part = rest = members & (members - 1)
        best = bound if rest else least[members]
        while part:  # `part` runs through all sets without the first member
            other = members ^ part
            cost = least[part] + least[other]
            if cost < best and (cost := cost + volumes[kept[part] | kept[other]]) < best:
                best, division[members] = cost, part
            part = (part - 1) & rest
        if division[members]:
            least[members] = best
    if not division[full]:
        return None
    number = {1 << k: k for k in range(len(operands))}
    pairs, stack = [], [full]
    while stack:
        members = stack[-1]
        halves = (members ^ division[members], division[members])
        if unfinished := [x for x in halves if x not in number]:
            stack += unfinished
            continue
        number[stack.pop()] = len(number)
        pairs.append((number[halves[0]], number[halves[1]]))
    return pairs


def refine(tree: Tree, drawn: random.Random, *, deadline: float = math.inf) -> None:
    """Improve a tree in place: solve parts of it exactly until none of those tried can be improved.

    Args:
        tree: the tree.
        drawn: random numbers that choose parts.
        deadline: value of `time.thread_time` at which the improvement ends.
    """
    tried, improved = set(), True
    values = (lambda node: tree.node_cost(node), lambda node: drawn.random())
    while improved:
        improved = False
        tops = sorted(tree.children, key=tree.node_cost, reverse=True)
        for top, value in itertools.product(tops, values):
            if time.thread_time() > deadline:
                return
            if top not in tree.children:
                continue
            leaves = tree.part(top, _WINDOW, value)
            key = frozenset(tree.indices[x] for x in (top, *leaves))
            if len(leaves) == 2 or key in tried:
                continue
            tried.add(key)
            operands = tuple(tree.indices[x] for x in leaves)
            before = sum(map(tree.node_cost, tree.inner(top, leaves)))
            part = Problem(operands, tree.indices[top], (), tree.problem.volumes)
            if (pairs := optimal(part, before)) is not None:
                tree.replace(top, leaves, pairs)
                improved = True


def greedy(problem: Problem, drawn: random.Random, *, weight: float, temperature: float) -> Tree:
    """Build a tree greedily: multiply the two operands with the lowest score, until one operand remains.

    With the growth `g = size of the product - weight * (sizes of the two operands)`, the score of a pair is
    `sign(g) * log(1 + |g|)` minus noise from a Gumbel distribution with the scale `temperature`.
    """
    volumes, output = problem.volumes, problem.output
    indices = dict(enumerate(problem.operands))
    carriers: dict[int, set[int]] = {}
    for node in indices:
        for x in bits(indices[node]):
            carriers.setdefault(x, set()).add(node)
    shared_by_many = sum(1 << x for x, nodes in carriers.items() if len(nodes) > 2)

    def product(a: int, b: int) -> int:
        summed = indices[a] & indices[b] & ~output
        for x in bits(summed & shared_by_many):
            if len(carriers[x]) > 2:
                summed ^= 1 << x
        return (indices[a] | indices[b]) & ~summed

    def score(a: int, b: int) -> float:
        growth = volumes[product(a, b)] - weight * (volumes[indices[a]] + volumes[indices[b]])
        noise = -math.log(-math.log(1 - drawn.random() + 1e-12)) if temperature else 0.0
        return math.copysign(math.log1p(abs(growth)), growth) - temperature * noise

    def neighbours(a: int) -> list[int]:
        return sorted(set().union(*(carriers[x] for x in bits(indices[a]))) - {a})

    queue = [(score(a, b), a, b) for a in indices for b in neighbours(a) if a < b]
    heapq.heapify(queue)
    pairs: list[tuple[int, int]] = []
    while len(indices) > 1:
        if queue:
            _, a, b = heapq.heappop(queue)
            if a not in indices or b not in indices:
                continue
        else:  # what remains has no common indices
            a, b = sorted(indices, key=lambda node: (volumes[indices[node]], node))[:2]
        new, kept = len(problem.operands) + len(pairs), product(a, b)
        for node in (a, b):
            for x in bits(indices.pop(node)):
                carriers[x].discard(node)
        indices[new] = kept
        for x in bits(kept):
            carriers[x].add(new)
        for node in neighbours(new):
            heapq.heappush(queue, (score(node, new), node, new))
        pairs.append((a, b))
    return Tree(problem, pairs)


def search(problem: Problem, start: Tree, *, seconds: float = SECONDS) -> Tree:
    """Search for a tree with few multiply-adds.

    Args:
        problem: the operands.
        start: a tree, which is returned if no better one is found.
        seconds: limit for more than `EXACT` operands, in seconds of processor time.
    """
    if len(problem.operands) <= EXACT:
        pairs = optimal(problem, start.cost)
        return start if pairs is None else Tree(problem, pairs)
    deadline, drawn = time.thread_time() + seconds, random.Random(0)
    trials = max(_TRIALS, len(problem.operands) // 3)
    best = start.without(0)
    refine(best, drawn, deadline=deadline)
    idle = 0
    while idle < _PATIENCE and time.thread_time() < deadline:
        trees = [
            greedy(problem, drawn, weight=drawn.uniform(0, 1.5), temperature=10 ** drawn.uniform(-2, 0.3))
            for _ in range(trials)
        ]
        tree = min(trees, key=lambda x: x.cost)
        refine(tree, drawn, deadline=deadline)
        best, idle = (tree, 0) if tree.cost < best.cost else (best, idle + 1)
    return best if best.cost < start.cost else start


# --- optimizers by name and as objects -------------------------------------------------------------

#: Names of optimizers of opt_einsum.
_NAMES = (
    "greedy",
    "random-greedy",
    "random-greedy-128",
    "auto-hq",
    "dp",
    "branch-1",
    "branch-2",
    "branch-all",
)


def find_path(
    operands: Sequence[Labels], output: Labels, size_of: Mapping[str, int], optimize: Optimizer = "auto"
) -> list[tuple[int, int]]:
    """Find a contraction order with few multiply-adds.

    Args:
        operands: labels of each operand.
        output: labels of the result.
        size_of: size of each label.
        optimize: `"auto"` finds the best order of up to 9 operands, and searches for a good order of more of
            them for at most two seconds; it keeps the order of opt_einsum's `auto` where nothing better is
            found. `"cotengra"` searches with cotengra for two seconds and refines the result. Other names are
            those of opt_einsum. An optimizer object has the signature of opt_einsum:
            `optimizer(inputs, output, sizes, memory_limit)` returns a path. A path is taken as it is.

    Raises:
        ContractionError: there is no optimizer of this name, or the path is invalid.
        MissingDependencyError: cotengra is asked for, but not installed.
    """
    if len(operands) == 1:
        return []
    if not isinstance(optimize, str):
        path = optimize
        if callable(optimize):
            path = optimize(*_in_symbols(operands, output, size_of), None)
        return check_path(path, len(operands))
    problem = Problem.of(operands, output, size_of)
    if optimize == "cotengra":
        tree = Tree.of_path(problem, _cotengra_path(operands, output, size_of))
        refine(tree, random.Random(0), deadline=time.thread_time() + SECONDS)
        return tree.path()
    path = _opt_einsum_path(operands, output, size_of, optimize)
    if optimize != "auto":
        return path
    start = Tree.of_path(problem, path)
    tree = search(problem, start)
    return path if tree is start else tree.path()


def _in_symbols(
    operands: Sequence[Labels], output: Labels, size_of: Mapping[str, int]
) -> tuple[list[frozenset[str]], frozenset[str], dict[str, int]]:
    """Replace labels by single characters, which all optimizers accept; labels of size 1 are omitted."""
    labels = dict.fromkeys(x for x in itertools.chain(*operands, output) if size_of[x] > 1)
    symbol = {label: opt_einsum.get_symbol(k) for k, label in enumerate(labels)}
    sets = [frozenset(symbol[x] for x in indices if x in symbol) for indices in (*operands, output)]
    return sets[:-1], sets[-1], {symbol[x]: size_of[x] for x in labels}


def _opt_einsum_path(
    operands: Sequence[Labels], output: Labels, size_of: Mapping[str, int], name: str
) -> list[tuple[int, int]]:
    try:
        optimizer = get_path_fn(name)
    except KeyError:
        raise ContractionError(
            f"There is no optimizer {name!r} of contraction orders. Pass 'auto', 'cotengra', a name of "
            f"opt_einsum ({', '.join(map(repr, _NAMES))}), an optimizer object, or a path."
        ) from None
    with _same_random_state():
        path = optimizer(*_in_symbols(operands, output, size_of), None)
    return check_path(path, len(operands))


def _cotengra_path(operands: Sequence[Labels], output: Labels, size_of: Mapping[str, int]) -> Any:
    cotengra = import_optional("cotengra", extra="paths", user='optimize="cotengra"')
    with _same_random_state():
        optimizer = cotengra.HyperOptimizer(
            methods=["greedy", "kahypar" if find_spec("kahypar") else "labels"],
            minimize="flops",
            max_time=SECONDS,
            parallel=False,
            reconf_opts={},
        )
        path = optimizer(*_in_symbols(operands, output, size_of))
    return check_path(path, len(operands))


@contextmanager
def _same_random_state() -> Iterator[None]:
    """Restore Python's global random generator, which some optimizers seed or use."""
    state = random.getstate()
    try:
        yield
    finally:
        random.setstate(state)


def check_path(path: Any, count: int) -> list[tuple[int, int]]:
    """Check that a path contracts `count` operands pair by pair, and sort each pair.

    Raises:
        ContractionError: it does not.
    """
    steps = []
    with suppress(TypeError, ValueError):
        steps = [tuple(sorted(int(k) for k in step)) for step in path]
    valid = len(steps) == count - 1 and all(
        len(step) == 2 and 0 <= step[0] < step[1] < count - done for done, step in enumerate(steps)
    )
    if not valid:
        raise ContractionError(
            f"A path for {count} operands needs {count - 1} pairs of two different positions among the "
            f"remaining operands, as in opt_einsum; got {path!r}."
        )
    return [(first, second) for first, second in steps]
