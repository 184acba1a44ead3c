"""Modules whose parameters are stacks of matrices, or one matrix with a split side.

To explain how this works: the code of the stock module runs as it is, with a stand-in for each such
parameter. The products that `tensornet.nn.stack_uses` has found in the code are then done by layers.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tensornet.errors import TargetError
from tensornet.nn.compound import Compound, Shared, Stack
from tensornet.nn.stack_uses import StackUse, stack_uses
from tensornet.nn.stock_layers import CompoundKind, kind_of, register_compound_kind

#: What helps where the code of a module does what was not foreseen; it is also taken apart to be left out.
_REMEDY = "derive a class from the module's and use that, since code of subclasses is left as it is"


class StackedMatrices(Compound):
    """Replacement for a module with stacked matrices, run by the stock module's own code.

    The parameters are its own, or those of a child that holds nothing else; that child is then replaced too.

    >>> class Experts(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.w = torch.nn.Parameter(torch.randn(3, 4, 5))
    ...     def forward(self, x):
    ...         return torch.bmm(x, self.w)
    >>> tn.nn.StackedMatrices(Experts(), {"w": tn.nn.stack_uses.StackUse((1,), (2,), True)}, {}).layer_names
    ('0.w', '1.w', '2.w')
    """

    def __init__(self, stock: nn.Module, uses: dict[str, StackUse], shared: Shared) -> None:
        shapes = {name: use.view or tuple(stock.get_parameter(name).shape) for name, use in uses.items()}
        super().__init__(stock, tuple(_stack(name, uses[name], shapes[name]) for name in uses), shared)
        self.uses, self.shapes = uses, shapes
        self.holders = frozenset(name.partition(".")[0] for name in uses if "." in name)
        for name, child in stock.named_children():
            if name not in self.holders:
                self.add_module(name, child)

    @property
    def weight(self) -> Any:
        """Stand-in for a stack named `weight`; otherwise see `Compound.weight`."""
        return self._stacked("weight") if "weight" in self.uses else super().weight

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the code of the stock module."""
        return type(self._stock[0]).forward(self, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Look up stand-ins for the stacks, and other attributes in the stock module."""
        uses = self.__dict__.get("uses", {})
        if name in uses:
            return self._stacked(name)
        if name in self.__dict__.get("holders", ()):
            return _Holder(self, name)
        try:
            return super().__getattr__(name)
        except AttributeError:
            kind = type(self._stock[0]) if uses else nn.Module
            method = inspect.getattr_static(kind, name, None)
            if not hasattr(method, "__get__"):
                raise
            return method.__get__(self, kind)  # bound to this module, unless it is static

    def _stacked(self, name: str) -> "_Stacked":
        use, shape = self.uses[name], self.shapes[name]
        return _Stacked([self.get_submodule(x) for x in _stack(name, use, shape).names], use, shape)


class _Holder:
    """Stand-in for a child that holds stacks: runs the child's code with stand-ins for the stacks."""

    def __init__(self, owner: StackedMatrices, name: str) -> None:
        self._owner, self._name = owner, name
        self._child = owner._stock[0].get_submodule(name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return type(self._child).forward(self, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        full = f"{self._name}.{name}"
        return self._owner._stacked(full) if full in self._owner.uses else getattr(self._child, name)


class _Stacked:
    """Stand-in for a parameter in products; raises for any other operation."""

    def __init__(self, layers: Sequence[nn.Module], use: StackUse, shape: tuple[int, ...]) -> None:
        self.layers, self.use, self.shape = layers, use, torch.Size(shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.layers[0].weight.dtype  # type: ignore[return-value]

    @property
    def device(self) -> torch.device:
        return self.layers[0].weight.device  # type: ignore[return-value]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def dim(self) -> int:
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def view(self, *sizes: Any) -> "_Stacked":
        """Return the stack itself, for the view that was found in the code."""
        asked = tuple(sizes[0] if len(sizes) == 1 else sizes)
        fits = self.use.view is not None and len(asked) == len(self.use.view)
        if not fits or any(size not in (-1, known) for size, known in zip(asked, self.shape, strict=True)):
            raise TargetError(
                f"A stack of matrices that is taken apart cannot be viewed as {asked}, only as "
                f"{tuple(self.shape)}; {_REMEDY}."
            )
        return self

    reshape = view

    def __getitem__(self, index: Any) -> "_One":
        if isinstance(index, Tensor) and (index.numel() != 1 or index.dtype == torch.bool):
            raise TargetError(
                f"A stack of matrices that is taken apart gives one matrix at a time, and was indexed by a "
                f"tensor of shape {tuple(index.shape)}; {_REMEDY}."
            )
        return _One(self.layers[int(index)])

    def __rmatmul__(self, x: Tensor) -> Tensor:
        return self._product(x)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in (torch.bmm, torch.matmul, Tensor.__matmul__, Tensor.matmul) and not kwargs:
            x, stack = args
            return stack._product(x)
        if func is torch.einsum and not kwargs:
            equation, x, stack = args
            return stack._einsum(equation, x)
        raise TargetError(
            f"{getattr(func, '__name__', func)} cannot compute with a stack of matrices that is taken apart; "
            f"{_REMEDY}."
        )

    def _product(self, x: Tensor) -> Tensor:
        """Multiply `x: (matrices, tokens, in)` by each matrix."""
        return torch.stack([layer(part) for layer, part in zip(self.layers, x.unbind(), strict=True)])

    def _einsum(self, equation: str, x: Tensor) -> Tensor:
        given, _, after = equation.replace(" ", "").partition("->")
        before, _, weight = given.partition(",")
        summed = [weight[k] for k in self.use.inputs]
        kept = [letter for letter in before if letter not in summed]
        if self.use.stacked:
            kept = [weight[0], *(letter for letter in kept if letter != weight[0])]
        x = x.permute([before.index(letter) for letter in (*kept, *summed)]).flatten(len(kept))
        y = self._product(x) if self.use.stacked else self.layers[0](x)
        y = y.unflatten(-1, [self.shape[k] for k in self.use.outputs])
        order = [*kept, *(weight[k] for k in self.use.outputs)]
        return y.permute([order.index(letter) for letter in after])


class _One:
    """Stand-in for one matrix of a stack, in either orientation."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    @property
    def T(self) -> "_One":
        return self

    mT = T

    def __rmatmul__(self, x: Tensor) -> Tensor:
        return self.layer(x)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        known = (F.linear, torch._C._nn.linear, torch.matmul, Tensor.__matmul__, Tensor.matmul)
        if func in known and len(args) == 2 and not kwargs:
            return args[1].layer(args[0])
        raise TargetError(
            f"{getattr(func, '__name__', func)} cannot compute with a matrix of a stack that is taken apart; "
            f"{_REMEDY}."
        )


def _stack(name: str, use: StackUse, shape: tuple[int, ...]) -> Stack:
    layer = name.replace(".", "_")
    if use.stacked:
        names = tuple(f"{number}.{layer}" for number in range(shape[0]))
        return Stack(name, names, shape[2], use.transposed)
    columns = math.prod(shape[k] for k in (use.outputs if use.transposed else use.inputs))
    return Stack(name, (f"{layer}_matrix",), columns, use.transposed)


class _StackedKind(CompoundKind):
    def matches(self, module: nn.Module) -> bool:
        return kind_of(module) is None and bool(stack_uses(module))

    def take_apart(self, module: nn.Module, shared: Shared) -> nn.Module:
        return StackedMatrices(module, stack_uses(module), shared)


register_compound_kind(_StackedKind())
