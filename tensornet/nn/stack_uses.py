"""Analysis of how a module class multiplies by its three-dimensional parameters.

Nothing else tells whether a stack of experts is `(experts, out, in)` or `(experts, in, out)`, or whether a
parameter is one matrix with a split side: names and shapes do not.
"""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from torch import nn

_LINEAR = ("F.linear", "nn.functional.linear", "torch.nn.functional.linear")
_PRODUCTS = ("torch.bmm", "torch.matmul")
#: Attributes and methods that tell of a parameter without reading its numbers.
_HARMLESS = {"shape", "dtype", "device", "ndim", "size", "dim"}


@dataclass(frozen=True)
class StackUse:
    """How a three-dimensional parameter enters a product.

    Args:
        inputs: positions of the dimensions that are summed over.
        outputs: positions of the dimensions that a product has instead.
        stacked: the first dimension counts matrices.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    stacked: bool

    @property
    def transposed(self) -> bool:
        """True if a matrix is stored as `(in_features, out_features)`."""
        return self.inputs < self.outputs


@cache
def stack_uses(kind: type[nn.Module]) -> dict[str, StackUse]:
    """Find the uses of parameters in the source of a class, by name.

    A parameter is left out unless every use is a product of one known form: `torch.bmm(x, self.w)`,
    `F.linear(x, self.w[i])`, `x @ self.w[i]`, or `torch.einsum("...", x, self.w)`.
    """
    methods = _methods(kind)
    if methods is None:
        return {}
    found: dict[str, set[StackUse | None]] = {}
    for method in methods:
        for name, use in _uses(method):
            found.setdefault(name, set()).add(use)
    single = {name: next(iter(uses)) for name, uses in found.items() if len(uses) == 1}
    return {name: use for name, use in single.items() if use is not None}


def _methods(kind: type) -> list[ast.FunctionDef] | None:
    """Collect the methods of a class except initialization; None where other code may run instead."""
    forward = kind.__dict__.get("forward")
    if not inspect.isfunction(forward) or inspect.unwrap(forward) is not forward:
        return None
    if kind.__bases__ != (nn.Module,):  # methods of a parent would have to be read as well
        return None
    try:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return None
    assert isinstance(tree, ast.ClassDef)
    methods = [x for x in tree.body if isinstance(x, ast.FunctionDef) and x.name != "__init__"]
    names = (node for method in methods for node in ast.walk(method) if isinstance(node, ast.Name))
    return None if any(node.id == "super" for node in names) else methods


def _uses(method: ast.FunctionDef) -> Iterator[tuple[str, StackUse | None]]:
    """List the attributes of `self` that are read, with their products; None for any other use."""
    parents = {child: node for node in ast.walk(method) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(method):
        match node:
            case ast.Attribute(attr=name, value=ast.Name(id="self")):
                above = parents[node]
                if not (isinstance(above, ast.Attribute) and above.attr in _HARMLESS):
                    yield name, _use(node, parents)


def _use(node: ast.expr, parents: dict[ast.AST, ast.AST]) -> StackUse | None:
    taken, turned = node, False
    above = parents[node]
    one = isinstance(above, ast.Subscript) and above.value is node
    if one:
        if isinstance(above.slice, ast.Slice | ast.Tuple):  # type: ignore[attr-defined]
            return None
        taken, above = above, parents[above]  # type: ignore[assignment]
        while isinstance(above, ast.Attribute) and above.attr in ("T", "mT"):
            taken, above, turned = above, parents[above], not turned
    match above:
        case ast.BinOp(op=ast.MatMult(), right=right) if right is taken:
            return _product(turned)
        case ast.Call(func=func, args=[_, second], keywords=[]) if second is taken:
            called = ast.unparse(func)
            if called in _PRODUCTS:
                return _product(turned)
            return _product(not turned) if called in _LINEAR and one else None
        case ast.Call(func=func, args=[ast.Constant(value=str(equation)), _, third], keywords=[]):
            einsum = ast.unparse(func) == "torch.einsum" and third is taken and not one
            return _einsum(equation) if einsum else None
    return None


def _product(out_first: bool) -> StackUse:
    return StackUse((2,), (1,), True) if out_first else StackUse((1,), (2,), True)


def _einsum(equation: str) -> StackUse | None:
    """Match an einsum with one matrix with split sides, or with a stack of matrices."""
    given, arrow, after = equation.replace(" ", "").partition("->")
    before, _, weight = given.partition(",")
    letters = [*before, *weight, *after]
    plain = arrow and all(x.isalpha() for x in letters) and len(set(weight)) == len(weight) == 3
    if not plain or len(set(before)) != len(before) or len(set(after)) != len(after):
        return None
    inputs = tuple(k for k, x in enumerate(weight) if x in before and x not in after)
    outputs = tuple(k for k, x in enumerate(weight) if x in after and x not in before)
    stacked = weight[0] in before and weight[0] in after
    kept = {x for x in before if x not in weight} | ({weight[0]} if stacked else set())
    whole = set(after) == kept | {weight[k] for k in outputs}
    orders = ([1, 2], [2, 1]) if stacked else ([0, 1, 2], [1, 2, 0], [2, 0, 1])
    fits = whole and inputs and outputs and [*inputs, *outputs] in orders
    return StackUse(inputs, outputs, stacked) if fits else None
