"""Modules that own several matrices, split into layers and joined again.

To explain how this works: each matrix of the stock module is a stretch of rows of one of its parameters. A
`Compound` computes the same as the stock module, but has a `PartMatrix` for every matrix, which is a view of
the parameter. Such a layer is observed, planned and replaced as an `nn.Linear` is. `Compound.settle` gives
the stock module back where nothing was replaced.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tensornet.contraction.operator import PLANNED_TOKENS
from tensornet.nn.carried_hooks import ACCELERATE
from tensornet.nn.execution import CACHED
from tensornet.nn.module import NetworkModule
from tensornet.nn.stock_layers import LayerKind, layer_bias, own_parameters, register_layer_kind
from tensornet.nn.weight_facts import weight_facts

#: Matrices made so far, by the parameter they view and the rows of it.
Shared = dict[tuple[object, ...], nn.Parameter]


class PartMatrix(nn.Module):
    """One matrix `(out_features, in_features)` of a module that owns several.

    Not an `nn.Linear`: loading would take a parameter called `weight` here for one of the stock module.

    Args:
        matrix: the matrix; a parameter is taken as it is.
        bias: shape `(out_features,)`; a parameter is taken as it is.

    Example:
        >>> from tensornet.nn import PartMatrix
        >>> layer = PartMatrix(torch.randn(4, 8), bias=torch.zeros(4))
        >>> layer(torch.randn(3, 8)).shape
        torch.Size([3, 4])
    """

    bias: Tensor | None

    def __init__(self, matrix: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.matrix = matrix if isinstance(matrix, nn.Parameter) else nn.Parameter(matrix)
        plain = bias is None or isinstance(bias, nn.Parameter)
        self.register_parameter("bias", bias if plain else nn.Parameter(bias))  # type: ignore[arg-type]

    @property
    def weight(self) -> nn.Parameter:
        """Weight matrix, under the name that other layers use."""
        return self.matrix

    def forward(self, x: Tensor) -> Tensor:
        """Map `x: (..., in_features)` to `(..., out_features)`."""
        return F.linear(x, self.matrix, self.bias)


class PartKind(LayerKind):
    """Layer kind of `PartMatrix`."""

    name = "part"
    layer = PartMatrix

    def matches(self, module: nn.Module) -> bool:
        """See `LayerKind.matches`."""
        return type(module) is self.layer

    def matrix(self, module: nn.Module) -> Tensor:
        """See `LayerKind.matrix`."""
        assert isinstance(module, PartMatrix)
        return module.matrix

    def build(self, matrix: Tensor, bias: Tensor | None) -> nn.Module:
        """See `LayerKind.build`."""
        return self.layer(matrix, bias)

    def relatives(self, name: str, others: Iterable[str]) -> list[str]:
        """Select the same projection of the other experts as relatives; see `LayerKind.relatives`."""
        owner, number, matrix = ["", "", *name.rsplit(".", 2)][-3:]
        if not number.isdigit():
            return []
        return [other for other in others if other.rsplit(".", 2)[::2] == [owner, matrix]]

    def share(self, module: nn.Module, weight: nn.Parameter) -> None:
        """See `LayerKind.share`."""
        assert isinstance(module, PartMatrix)
        module.matrix = weight


@dataclass(frozen=True)
class Stack:
    """Matrices stacked along the rows of one parameter of the stock module.

    Args:
        parameter: its dotted name.
        names: dotted names of the layers, in the order of the rows.
        columns: width of a row.
        transposed: each matrix is stored as `(in_features, out_features)`.
        bias: dotted name of a parameter that is the bias of the only layer.

    Example:
        >>> from tensornet.nn import Stack
        >>> stack = Stack("in_proj_weight", names=("query", "key", "value"), columns=16)
        >>> parameter = torch.nn.Parameter(torch.randn(48, 16))
        >>> [tuple(view.shape) for view in stack.views(parameter, {})]
        [(16, 16), (16, 16), (16, 16)]
    """

    parameter: str
    names: tuple[str, ...]
    columns: int
    transposed: bool = False
    bias: str | None = None

    def views(self, parameter: nn.Parameter, shared: Shared) -> list[nn.Parameter]:
        """Split the parameter into matrices `(out_features, in_features)` that share memory with it."""
        if self._is_whole(parameter):
            return [parameter]
        stacked = parameter.detach().reshape(len(self.names), -1, self.columns)
        key = (id(parameter), len(self.names), self.columns, self.transposed)
        return [
            shared.setdefault(
                (*key, row), nn.Parameter(x.T if self.transposed else x, parameter.requires_grad)
            )
            for row, x in enumerate(stacked)
        ]

    def joined(self, matrices: list[nn.Parameter], like: Tensor, shared: Shared) -> nn.Parameter:
        """Join matrices into one parameter; the same matrices give the same parameter."""
        if self._is_whole(like):
            return matrices[0]
        rows = [x.detach().T if self.transposed else x.detach() for x in matrices]
        made = nn.Parameter(torch.cat(rows).reshape(like.shape), any(x.requires_grad for x in matrices))
        return shared.setdefault((*map(id, matrices), like.shape), made)

    def _is_whole(self, parameter: Tensor) -> bool:
        return len(self.names) == 1 and parameter.ndim == 2 and not self.transposed


class Compound(nn.Module):
    """Abstract replacement for a stock module, which computes the same from layers of single matrices.

    Subclasses define `forward` with the arguments of the stock module.

    Args:
        stock: the module it stands for, kept outside the tree of modules.
        stacks: where the matrices lie in it.
        shared: see `CompoundKind.take_apart`.

    Example:
        >>> from tensornet.nn import compound_of
        >>> attention = torch.nn.MultiheadAttention(16, 2)
        >>> compound = compound_of(attention).take_apart(attention, {})
        >>> compound.type_name, compound.layer_names
        ('MultiheadAttention', ('q_proj', 'k_proj', 'v_proj', 'out_proj'))
    """

    #: What sort of layer each matrix becomes.
    layer = PartMatrix

    def __init__(self, stock: nn.Module, stacks: tuple[Stack, ...], shared: Shared) -> None:
        super().__init__()
        self._stock = (stock,)
        self._freed = False
        self.stacks = stacks
        for stack in stacks:
            bias = None if stack.bias is None else _parameter(stock, stack.bias)
            views = stack.views(stock.get_parameter(stack.parameter), shared)
            for name, matrix in zip(stack.names, views, strict=True):
                self._add(name, self.layer(matrix, bias))
        taken = {stack.parameter for stack in stacks}
        # In the dictionary: `register_parameter` would find the name, which `__getattr__` passes on.
        self._parameters.update({name: p for name, p in stock._parameters.items() if name not in taken})
        self.train(stock.training)

    @property
    def type_name(self) -> str:
        """Name of the stock module's type, by which reports count parameters."""
        return type(self._stock[0]).__name__

    @property
    def layer_names(self) -> tuple[str, ...]:
        """Names of the layers."""
        return tuple(name for stack in self.stacks for name in stack.names)

    @property
    def weight(self) -> Tensor:
        """Stock weight for code that reads it; its numbers are refused once layers are replaced."""
        stock, first = self._stock[0], self.get_submodule(self.layer_names[0])
        if "weight" not in stock._parameters:
            return first.weight  # type: ignore[return-value]
        weight: Tensor = stock.weight  # type: ignore[assignment]
        if not self._freed:
            return weight
        like = first._computed_like() if isinstance(first, NetworkModule) else first.weight
        assert isinstance(like, Tensor)
        return weight_facts(like, weight.shape, list(self.parameters()))

    @property
    def compressed(self) -> bool:
        """True if a layer has been replaced."""
        return any(not isinstance(self.get_submodule(name), PartMatrix) for name in self.layer_names)

    @torch.no_grad()
    def settle(self, shared: Shared) -> nn.Module:
        """Return the module to keep: the compound if a layer was compressed, else the stock module.

        Args:
            shared: parameters that were put together before, so that tied ones stay tied.

        Returns:
            This module, freed of the stock parameters, if some layer was replaced; else the stock module
            with the matrices in its parameters.
        """
        stock = self._stock[0]
        if self.compressed:
            self._free()
            return self
        if self._freed:
            for stack in self.stacks:
                layers = [self.get_submodule(name) for name in stack.names]
                matrices = [layer.get_parameter("matrix") for layer in layers]
                like = stock.get_parameter(stack.parameter)
                _set_parameter(stock, stack.parameter, stack.joined(matrices, like, shared))
                if stack.bias is not None and (bias := layer_bias(layers[0])) is not None:
                    _set_parameter(stock, stack.bias, bias)  # type: ignore[arg-type]
            for name, parameter in own_parameters(self).items():
                _set_parameter(stock, name, parameter)
        mine = set(self.modules())
        for module in stock.modules():  # those that both have are in the mode that they are in
            if module not in mine:
                module.training = self.training
        return stock

    def _free(self) -> None:
        """Delete the stock parameters; dense layers get memory of their own."""
        stock = self._stock[0]
        for name in self.layer_names:
            if isinstance(layer := self.get_submodule(name), PartMatrix):
                layer.matrix.data = _own(layer.matrix.data)
        taken = [name for stack in self.stacks for name in (stack.parameter, stack.bias) if name is not None]
        for name in {*taken, *own_parameters(stock)}:
            parameter = stock.get_parameter(name)
            empty = torch.empty_like(parameter, device="meta")
            _set_parameter(stock, name, nn.Parameter(empty, parameter.requires_grad))
        self._freed = True

    def _add(self, name: str, layer: nn.Module) -> None:
        place: nn.Module = self
        *path, last = name.split(".")
        for part in path:
            if part not in place._modules:
                place.add_module(part, nn.Module())
            place = place.get_submodule(part)
        place.add_module(last, layer)

    def __getattr__(self, name: str) -> Any:
        """Look up sizes and options in the stock module, for code that reads them."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            stock = self.__dict__.get("_stock")
            if stock is None or name in ACCELERATE:  # whose hooks belong to the stock module alone
                raise
            if name not in vars(stock[0]) and name not in stock[0]._parameters:
                raise
            return getattr(stock[0], name)


def is_observed(*layers: nn.Module) -> bool:
    """Return True if a layer has hooks, so that it must be called."""
    return any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)


def dense_matrix(layer: nn.Module) -> Tensor:
    """Return the differentiable matrix of a layer of a compound, from the cache if its strategy keeps one."""
    if isinstance(layer, NetworkModule):
        return layer.kept_matrix() if layer.route(PLANNED_TOKENS) == CACHED else layer.to_matrix()
    assert isinstance(layer, PartMatrix)
    return layer.matrix


def _parameter(module: nn.Module, name: str) -> nn.Parameter | None:
    owner, _, key = name.rpartition(".")
    return module.get_submodule(owner)._parameters[key]


def _set_parameter(module: nn.Module, name: str, value: nn.Parameter) -> None:
    owner, _, key = name.rpartition(".")
    setattr(module.get_submodule(owner), key, value)


def _own(matrix: Tensor) -> Tensor:
    """Copy a matrix to contiguous memory of its own, if it shares memory."""
    alone = matrix.is_meta or matrix.untyped_storage().nbytes() == matrix.nbytes
    return matrix if alone and matrix.is_contiguous() else matrix.clone(memory_format=torch.contiguous_format)


register_layer_kind(PartKind())
