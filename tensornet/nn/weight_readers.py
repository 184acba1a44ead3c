"""Layers whose weight is read past their `forward`, which a layer made of cores cannot answer."""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache

from torch import nn

#: Calls that take a weight without computing with it.
_HARMLESS = ("isinstance", "hasattr", "id", "type", "len")


def weight_is_read(model: nn.Module, name: str) -> bool:
    """Whether the module that owns layer `name` uses the layer's weight itself, by the owner's source.

    Mamba, for example, multiplies by `self.dt_proj.weight`, and WavLM hands all its projections to a
    function of PyTorch. Source that cannot be had counts as not reading.

    Args:
        model: the whole model.
        name: of the layer, as in `named_modules`.
    """
    owner_name, _, child = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    return any(child in _read_by(kind) for kind in type(owner).__mro__ if not _is_general(kind))


def _is_general(kind: type) -> bool:
    """PyTorch's and Python's own classes name no layer of a model."""
    return kind.__module__.partition(".")[0] in ("torch", "builtins", "abc")


@cache
def _read_by(kind: type) -> frozenset[str]:
    """Names of layers whose weight the methods of a class multiply by, or pass to a function."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    except (OSError, TypeError, SyntaxError):
        return frozenset()
    methods = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and "init" not in node.name and "tie" not in node.name
    ]
    nodes = (node for method in methods for node in ast.walk(method))
    return frozenset(name for node in nodes for value in _used(node) if (name := _layer_of(value)))


def _used(node: ast.AST) -> Iterator[ast.expr]:
    """Expressions whose values a node computes with."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
        yield from (node.left, node.right)
    elif isinstance(node, ast.Call) and ast.unparse(node.func) not in _HARMLESS:
        yield from node.args
        yield from (keyword.value for keyword in node.keywords)


def _layer_of(value: ast.expr) -> str | None:
    """`name` if the expression is `self.name.weight`, or what methods as `t()` or `view(...)` make of it."""
    while True:
        match value:
            case ast.Attribute(attr="weight", value=ast.Attribute(attr=name, value=ast.Name(id="self"))):
                return name
            case ast.Call(func=ast.Attribute(value=inner)) | ast.Attribute(attr="T" | "mT", value=inner):
                value = inner
            case _:
                return None
