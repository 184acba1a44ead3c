"""Plan a contraction once, and run it as pairwise matrix products.

`opt_einsum` finds the order, `lowering` writes it as permutations, reshapes and (batched) matrix products.
Calling opt_einsum inside `forward` would break `torch.compile(fullgraph=True)` and autocast; the lowered
steps do not. Indices of size 1 are removed before planning, so a low-rank layer is exactly two matmuls.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import opt_einsum

from tensornet._util import import_optional
from tensornet.contraction.lowering import lower_path
from tensornet.contraction.steps import TOKENS, ContractionPlan, PairStep, run
from tensornet.errors import TopologyError

__all__ = [
    "TOKENS",
    "ContractionPlan",
    "Optimize",
    "PairStep",
    "check_optimize",
    "find_path",
    "plan_contraction",
    "run",
]

#: How the order is found: a name `opt_einsum.contract_path` knows, `"cotengra"`, a path optimizer of
#: `opt_einsum`'s protocol, or an explicit pairwise path.
Optimize = str | Sequence[tuple[int, int]] | Callable[..., Any]


def plan_contraction(
    operands: Sequence[tuple[str, ...]],
    output: tuple[str, ...],
    size_of: Mapping[str, int],
    *,
    optimize: Optimize = "auto",
) -> ContractionPlan:
    """Plan `einsum(operands -> output)`.

    Args:
        operands: labels of each operand.
        output: labels of the result; every other label is summed.
        size_of: size of each label; `TOKENS` holds the expected number of tokens.
        optimize: see `Optimize`. `"auto"` tries all orders up to 4 operands, fewer beyond.

    Returns:
        A plan for `run`.

    Raises:
        TopologyError: the path is not pairwise, or `optimize` is an unknown name.
        MissingDependencyError: `optimize="cotengra"` without cotengra.
    """
    path = find_path(operands, output, size_of, optimize)
    return lower_path(operands, output, size_of, path)


def find_path(
    operands: Sequence[tuple[str, ...]],
    output: tuple[str, ...],
    size_of: Mapping[str, int],
    optimize: Optimize = "auto",
) -> list[tuple[int, int]]:
    """Find a pairwise contraction order with few multiply-adds, by the optimizer `optimize`."""
    if len(operands) == 1:
        return []
    squeezed = [tuple(x for x in labels if x == TOKENS or size_of[x] > 1) for labels in operands]
    kept = tuple(x for x in output if x == TOKENS or size_of[x] > 1)
    if optimize == "cotengra":
        cotengra = import_optional("cotengra", extra="interop", user='optimize="cotengra"')
        return _pairs(cotengra.array_contract_path(squeezed, kept, dict(size_of)))
    symbol: dict[str, str] = {}
    for labels in (*squeezed, kept):
        for label in labels:
            symbol.setdefault(label, opt_einsum.get_symbol(len(symbol)))
    terms = ["".join(symbol[x] for x in labels) for labels in squeezed]
    equation = ",".join(terms) + "->" + "".join(symbol[x] for x in kept)
    shapes = [tuple(size_of[x] for x in labels) for labels in squeezed]
    try:
        path, _ = opt_einsum.contract_path(equation, *shapes, shapes=True, optimize=optimize)
    except KeyError as error:  # how opt_einsum says that it has no optimizer of this name
        if not isinstance(optimize, str):
            raise
        raise TopologyError(
            f"Unknown optimize={optimize!r}; choose 'auto', 'optimal', 'dp', 'greedy', 'branch-2', "
            "'cotengra' or another name that opt_einsum knows, or pass one of its path optimizers."
        ) from error
    return _pairs(path)


def check_optimize(optimize: Optimize) -> None:
    """Raise early unless `optimize` can find paths, since planning waits for the first forward pass.

    Raises:
        TopologyError: no optimizer has this name.
        MissingDependencyError: `optimize="cotengra"` without cotengra.
    """
    if optimize != "auto":
        find_path([("a", "b"), ("b", "c"), ("c", "d")], ("a", "d"), dict.fromkeys("abcd", 2), optimize)


def _pairs(path: Sequence[tuple[int, ...]]) -> list[tuple[int, int]]:
    if any(len(step) != 2 for step in path):
        raise TopologyError(f"A contraction path must be pairwise, got {path}; use another `optimize`.")
    return [(min(step), max(step)) for step in path]
