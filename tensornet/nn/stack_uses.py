"""Analysis of how the code of a module multiplies by parameters that hold several matrices.

Nothing else tells whether a stack of experts is `(experts, out, in)` or `(experts, in, out)`, whether it is
stored with the experts one below the other, or whether a parameter is one matrix with a split side: names and
shapes do not.

To explain how this works: the statements of each method are read once, in order, and every expression that
stands for such a parameter or for a matrix of it is followed through local variables, views and calls of a
child, until a product consumes it. Whatever else happens to it disqualifies the parameter.
"""

import ast
import inspect
import math
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from torch import nn

_LINEAR = ("F.linear", "nn.functional.linear", "torch.nn.functional.linear")
_PRODUCTS = ("torch.bmm", "torch.matmul")
_VIEWS = ("view", "reshape")
#: Attributes and methods that tell of a parameter without reading its numbers.
_HARMLESS = {"shape", "dtype", "device", "ndim", "size", "dim"}


@dataclass(frozen=True)
class StackUse:
    """How a parameter enters a product.

    Args:
        inputs: positions of the dimensions that are summed over.
        outputs: positions of the dimensions that a product has instead.
        stacked: the first dimension counts matrices.
        view: shape in which the code views the parameter, to which the positions belong; its own if None.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    stacked: bool
    view: tuple[int, ...] | None = None

    @property
    def transposed(self) -> bool:
        """True if a matrix is stored as `(in_features, out_features)`."""
        return self.inputs < self.outputs


@dataclass(frozen=True)
class _Value:
    """Expression whose value is a parameter, or one matrix of a parameter."""

    name: str
    shape: tuple[int, ...]
    view: tuple[int, ...] | None = None
    one: bool = False
    turned: bool = False


def stack_uses(module: nn.Module) -> dict[str, StackUse]:
    """Find the uses of parameters in the source of a module's class, by dotted name.

    Parameters of two or three dimensions count, of the module itself and of children that hold nothing else.
    A parameter is left out unless every use is a product of one known form: `torch.bmm(x, self.w)`,
    `F.linear(x, self.w[i])`, `x @ self.w[i]`, or `torch.einsum("...", x, self.w)`. One of two dimensions
    is viewed as a stack first, `self.w.view(experts, rows, columns)[i]`.

    Example:
        >>> class Experts(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.w = torch.nn.Parameter(torch.ones(3, 4, 5))
        ...     def forward(self, x):
        ...         return x @ self.w[0]
        >>> stack_uses(Experts())  # a class without a source file cannot be read
        {}
    """
    holders = _holders(module)
    candidates = {
        f"{owner}.{key}" if owner else key: tuple(parameter.shape)
        for owner, held in (("", module), *holders.items())
        for key, parameter in held._parameters.items()
        if parameter is not None and parameter.ndim in (2, 3)
    }
    kind: Any = type(module)  # which mypy does not take for a key of a cache
    if _names_read(kind).isdisjoint(name.rpartition(".")[2] for name in candidates):
        return {}
    reading = _Reading(module, candidates)
    for method in _methods(kind) or ():
        reading.read(method, {})
    single = {name: next(iter(uses)) for name, uses in reading.found.items() if len(uses) == 1}
    known = {name: use for name, use in single.items() if use is not None}
    partly = {name.partition(".")[0] for name in candidates.keys() - known.keys() if "." in name}
    return {name: use for name, use in known.items() if name.partition(".")[0] not in partly}


def _holders(module: nn.Module) -> dict[str, nn.Module]:
    """Find children that hold parameters of two or three dimensions for their parent, by name.

    They hold nothing else, and their own code does not read them.
    """
    found = {}
    for name, child in module.named_children():
        own = {key: x for key, x in child._parameters.items() if x is not None}
        alone = len(own) == len(list(child.parameters())) and next(child.buffers(), None) is None
        if not own or not alone or any(x.ndim not in (2, 3) for x in own.values()):
            continue
        kind: Any = type(child)
        if _methods(kind) and _names_read(kind).isdisjoint(own):
            found[name] = child
    return found


@cache
def _names_read(kind: type) -> frozenset[str]:
    """Collect the attributes that the code of a class reads, of any object."""
    nodes = (node for method in _methods(kind) or () for node in ast.walk(method))
    return frozenset(node.attr for node in nodes if isinstance(node, ast.Attribute))


@cache
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


@dataclass
class _Reading:
    """Uses found so far in the methods of a module.

    Args:
        module: whose code is read.
        candidates: shapes of the parameters, by dotted name.
        found: their uses; None among them for a use of another form.
    """

    module: nn.Module
    candidates: dict[str, tuple[int, ...]]
    found: dict[str, set[StackUse | None]] = field(default_factory=dict)

    def read(self, method: ast.FunctionDef, given: dict[str, _Value]) -> None:
        """Read a method with the given values as its arguments."""
        scope = _Scope(self, method, given)
        for statement in method.body:
            scope.visit(statement)

    def add(self, value: _Value, use: StackUse | None) -> None:
        """Record a use, with positions in the view if there is one."""
        self.found.setdefault(value.name, set()).add(use and replace(use, view=value.view))


class _Scope:
    """Local variables of one method; only those that are bound once are followed."""

    def __init__(self, reading: _Reading, method: ast.FunctionDef, given: dict[str, _Value]) -> None:
        self.reading = reading
        self.owner = method.args.args[0].arg if method.args.args else ""
        nodes = list(ast.walk(method))
        bound = Counter(node.arg for node in nodes if isinstance(node, ast.arg))
        bound.update(x.id for x in nodes if isinstance(x, ast.Name) and not isinstance(x.ctx, ast.Load))
        self.given = {name: value for name, value in given.items() if bound[name] == 1}
        self.assigned = {
            node.targets[0].id: node.value
            for node in nodes
            if isinstance(node, ast.Assign) and len(node.targets) == 1
            if isinstance(node.targets[0], ast.Name) and bound[node.targets[0].id] == 1
        }
        loops = [x.target for x in nodes if isinstance(x, ast.For | ast.comprehension)]
        self.counters = {x.id for target in loops for x in ast.walk(target) if isinstance(x, ast.Name)}
        if method.name != "forward":
            self.counters |= {argument.arg for argument in method.args.args}
        for name in given.keys() - self.given.keys():
            reading.add(given[name], None)

    def visit(self, node: ast.AST) -> None:
        """Record the uses in a statement or expression, and mark its parameters as consumed."""
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=value) if name in self.assigned and self.value(
                value
            ):
                pass  # its uses are those of the name
            case ast.BinOp(left=left, op=ast.MatMult(), right=right) if found := self.value(right):
                self.visit(left)
                self.reading.add(found, _product(found, found.turned))
            case ast.Call() if self._call(node):
                pass
            case ast.Attribute(value=inner, attr=attr) if attr in _HARMLESS and self.value(inner):
                pass
            case ast.expr() if self.value(node) is not None:
                self._escape(node)
            case _:
                for child in ast.iter_child_nodes(node):
                    self.visit(child)

    def value(self, node: ast.AST) -> _Value | None:
        """Resolve an expression to a parameter or one of its matrices; None for any other expression."""
        match node:
            case ast.Name(id=name) if name in self.given:
                return self.given[name]
            case ast.Name(id=name) if name in self.assigned:
                return self.value(self.assigned[name])
            case ast.Attribute() if (full := self._parameter(node)) is not None:
                return _Value(full, self.reading.candidates[full])
            case ast.Attribute(value=inner, attr="T" | "mT"):
                found = self.value(inner)
                return replace(found, turned=not found.turned) if found and found.one else None
            case ast.Subscript(value=inner, slice=index) if self._is_number(index):
                found = self.value(inner)
                return replace(found, one=True) if found and _is_stack(found) else None
            case ast.Call(func=ast.Attribute(value=inner, attr=attr), args=sizes, keywords=[]) if (
                attr in _VIEWS
            ):
                found, view = self.value(inner), self._sizes(sizes)
                if found is None or found.view is not None or len(found.shape) != 2 or view is None:
                    return None
                whole = _completed(view, found.shape)
                return None if whole is None else replace(found, view=whole)
        return None

    def _is_number(self, node: ast.AST) -> bool:
        """Return True if an expression that indexes a stack selects one matrix, as far as the code tells.

        Numbers are what loops count and what a method other than `forward` is given; a tensor of indices,
        which selects several, comes from elsewhere.
        """
        match node:
            case ast.Constant(value=value):
                return type(value) is int
            case ast.Name(id=name) if name in self.counters:
                return True
            case ast.Name(id=name) if name in self.assigned:
                return self._is_number(self.assigned[name])
            case ast.Subscript(value=inner) | ast.UnaryOp(operand=inner):
                return self._is_number(inner)
            case ast.BinOp(left=left, right=right):
                return self._is_number(left) and self._is_number(right)
            case ast.Call(func=ast.Name(id="int")) | ast.Call(func=ast.Attribute(attr="item")):
                return True
        return False

    def _call(self, node: ast.Call) -> bool:
        """Record the product that a call computes, or read the called child; return False for other calls."""
        called = ast.unparse(node.func)
        match node:
            case ast.Call(func=ast.Attribute(value=first, attr="matmul"), args=[second], keywords=[]):
                found, turned = self.value(second), False
            case ast.Call(args=[first, second], keywords=[]) if called in (*_PRODUCTS, *_LINEAR):
                found, turned = self.value(second), called in _LINEAR
                if found is not None and turned and not found.one:  # it would be one matrix
                    return False
                if found is not None and found.one and called == "torch.bmm":  # it would be several
                    return False
            case ast.Call(args=[ast.Constant(value=str(equation)), first, third], keywords=[]):
                found = self.value(third) if called == "torch.einsum" else None
                if found is not None and _is_stack(found):
                    self.visit(first)
                    self.reading.add(found, _einsum(equation))
                    return True
                return False
            case _:
                return self._child(node)
        if found is None:
            return self._child(node)
        self.visit(first)
        self.reading.add(found, _product(found, found.turned != turned))
        return True

    def _child(self, node: ast.Call) -> bool:
        """Read the forward pass of a child with the matrices that a call hands to it."""
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name(id=owner), attr=name), args=given, keywords=[]):
                child = self.reading.module._modules.get(name) if owner == self.owner else None
                values = [self.value(x) for x in given]
                kind: Any = type(child)
                methods = _methods(kind) if child is not None and any(values) else None
                forward = next((x for x in methods or () if x.name == "forward"), None)
                if child is None or forward is None or len(forward.args.args) <= len(given):
                    return False
                for argument, value in zip(given, values, strict=True):
                    if value is None:
                        self.visit(argument)
                names = [argument.arg for argument in forward.args.args[1:]]
                handed = {key: value for key, value in zip(names, values, strict=False) if value is not None}
                _Reading(child, {}, self.reading.found).read(forward, handed)
                return True
        return False

    def _parameter(self, node: ast.Attribute) -> str | None:
        parts = ast.unparse(node).split(".")
        name = ".".join(parts[1:])
        return name if parts[0] == self.owner and name in self.reading.candidates else None

    def _escape(self, node: ast.AST) -> None:
        if (found := self.value(node)) is not None:
            self.reading.add(found, None)

    def _sizes(self, nodes: Sequence[ast.expr]) -> tuple[int, ...] | None:
        """Evaluate the sizes passed to a view; None if they are unknown."""
        if len(nodes) == 1:
            match nodes[0]:
                case ast.Name(id=name) if name in self.assigned:
                    return self._sizes([self.assigned[name]])
                case ast.Tuple(elts=elements) | ast.List(elts=elements):
                    return self._sizes(elements) if len(elements) > 1 else None
        sizes = [self._size(node) for node in nodes]
        return None if len(sizes) != 3 or None in sizes else tuple(sizes)  # type: ignore[arg-type]

    def _size(self, node: ast.expr) -> int | None:
        match node:
            case ast.Constant(value=int(size)):
                return size
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int(size))):
                return -size
            case ast.Name(id=name) if name in self.assigned:
                return self._size(self.assigned[name])
            case ast.Attribute(value=ast.Name(id=owner), attr=name) if owner == self.owner:
                held = getattr(self.reading.module, name, None)
                return held if isinstance(held, int) else None
        return None


def _completed(view: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Replace -1 in a view of a parameter; None unless it splits the rows alone."""
    total, known = math.prod(shape), math.prod(size for size in view if size != -1)
    whole = tuple(total // max(known, 1) if size == -1 else size for size in view)
    return whole if math.prod(whole) == total and min(whole) > 0 and whole[-1] == shape[-1] else None


def _is_stack(value: _Value) -> bool:
    return not value.one and len(value.view or value.shape) == 3


def _product(value: _Value, out_first: bool) -> StackUse | None:
    """Describe a product with a stack or one matrix of it; None for other parameters."""
    if not value.one and not _is_stack(value):
        return None
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
