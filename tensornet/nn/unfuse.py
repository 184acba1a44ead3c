"""Unfuse modules: replace a module that owns several matrices by a module with one layer for each matrix.

Recurrent layers, attention and stacks of experts store several matrices in one parameter, so a single matrix
cannot be replaced. A `Compound` computes the same as such a stock module, but has one layer for each matrix.
Each layer is a `PartMatrix`, whose weight is a view of the parameter. It is calibrated, planned and replaced
like an `nn.Linear`. `Compound.fuse` returns the stock module if no layer was replaced.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tensornet.nn.extension import extensions
from tensornet.nn.layer_kinds import (
    ACCELERATE,
    LayerKind,
    carry_hooks,
    has_own_forward,
    is_plain,
    kind_of,
    layer_bias,
    own_parameters,
    register_layer_kind,
)
from tensornet.nn.module import NetworkModule
from tensornet.nn.weight_facts import weight_facts
from tensornet.registry import Registry

#: Types whose weight may be recomputed before each pass by a hook of `torch.nn.utils`.
_STOCK = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
#: Reason why a layer with weight_norm, spectral_norm or prune stays dense.
RECOMPUTED = "weight recomputed by a hook"
#: Reason why a layer stays dense if it has a parameter, buffer or submodule that its type does not have.
MORE_THAN_WEIGHT = "more tensors than weight and bias"
#: Reason why a layer stays dense if its `forward` was replaced.
OWN_FORWARD = "forward set on the layer itself"

#: Parameters made while a model is unfused or fused. The key identifies the tensors from which a parameter is
#: made, so that tied tensors give one parameter.
Shared = dict[tuple[object, ...], nn.Parameter]


class PartMatrix(nn.Module):
    """Linear layer for one matrix `(out_features, in_features)` of a module with several matrices.

    This is not an `nn.Linear`, since code that loads weights would mistake its parameter `weight` for a
    parameter of the stock module.

    Args:
        matrix: the matrix; if it is a parameter, it is shared, not copied.
        bias: shape `(out_features,)`; if it is a parameter, it is shared, not copied.
    """

    bias: Tensor | None

    def __init__(self, matrix: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.matrix = matrix if isinstance(matrix, nn.Parameter) else nn.Parameter(matrix)
        plain = bias is None or isinstance(bias, nn.Parameter)
        self.register_parameter("bias", bias if plain else nn.Parameter(bias))  # type: ignore[arg-type]

    @property
    def weight(self) -> nn.Parameter:
        """The matrix, under the name that `nn.Linear` uses."""
        return self.matrix

    def forward(self, x: Tensor) -> Tensor:
        """Map `x: (..., in_features)` to `(..., out_features)`."""
        return F.linear(x, self.matrix, self.bias)


class _PartKind(LayerKind):
    name = "part"

    def matches(self, module: nn.Module) -> bool:
        return type(module) is PartMatrix

    def matrix(self, module: nn.Module) -> Tensor:
        assert isinstance(module, PartMatrix)
        return module.matrix

    def build(self, matrix: Tensor, bias: Tensor | None) -> nn.Module:
        return PartMatrix(matrix, bias)

    def share(self, module: nn.Module, weight: nn.Parameter) -> None:
        assert isinstance(module, PartMatrix)
        module.matrix = weight


@dataclass(frozen=True)
class StackedMatrices:
    """Location of matrices that are stacked along the rows of one parameter of a stock module.

    Args:
        parameter: dotted name of the parameter.
        names: dotted names of the layers to make, in the order of the rows.
        columns: number of columns of each stored matrix.
        transposed: True if each matrix is stored as `(in_features, out_features)`.
        bias: if there is only one layer, the dotted name of its bias in the stock module, or None.
    """

    parameter: str
    names: tuple[str, ...]
    columns: int
    transposed: bool = False
    bias: str | None = None

    def views(self, parameter: nn.Parameter, shared: Shared) -> list[nn.Parameter]:
        """Split the parameter into matrices `(out_features, in_features)` that share its memory.

        Args:
            parameter: the parameter of the stock module.
            shared: matrices made so far; those of this parameter are reused, and new ones are added.
        """
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
        """Join matrices into one parameter of the stock module; this is the inverse of `views`.

        Args:
            matrices: matrices of the layers.
            like: tensor with the shape of the parameter.
            shared: parameters made so far; if one was made from the same matrices, it is reused, else the
                new parameter is added.
        """
        if self._is_whole(like):
            return matrices[0]
        rows = [x.detach().T if self.transposed else x.detach() for x in matrices]
        made = nn.Parameter(torch.cat(rows).reshape(like.shape), any(x.requires_grad for x in matrices))
        return shared.setdefault((*map(id, matrices), like.shape), made)

    def _is_whole(self, parameter: Tensor) -> bool:
        return len(self.names) == 1 and parameter.ndim == 2 and not self.transposed


class Compound(nn.Module):
    """Abstract base class of modules that replace a stock module and have one layer for each of its matrices.

    Subclasses define `replaces`, `forward` with the arguments of the stock module, and
    `__init__(stock, shared)`. They are registered by `register_compound`.

    Args:
        stock: the module to replace. It is stored, but not as a submodule; its parameters are not copied.
        stacks: locations of its matrices.
        shared: matrices of modules that were unfused before, so that tied parameters stay tied.
    """

    #: Types that the class replaces, or their full names; if empty, `matches` decides alone.
    replaces: ClassVar[tuple[type[nn.Module] | str, ...]] = ()

    def __init__(self, stock: nn.Module, stacks: tuple[StackedMatrices, ...], shared: Shared) -> None:
        super().__init__()
        taken = {stack.parameter for stack in stacks}
        for name, parameter in own_parameters(stock).items():
            if name not in taken:
                self.register_parameter(name, parameter)
        self.stacks = stacks
        for stack in stacks:
            bias = None if stack.bias is None else attrgetter(stack.bias)(stock)
            views = stack.views(stock.get_parameter(stack.parameter), shared)
            for name, matrix in zip(stack.names, views, strict=True):
                self._add(name, PartMatrix(matrix, bias))
        self._stock, self._freed = (stock,), False  # set last, since `__getattr__` reads `_stock`
        self.train(stock.training)

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        """Return True if this class can replace `module`; its type is already known to be in `replaces`."""
        return True

    @classmethod
    def reason_against(cls, module: nn.Module) -> str | None:
        """Return a short reason why `matches(module)` is False, for reports; None if there is no reason."""
        return None

    @property
    def stock(self) -> nn.Module:
        """The replaced module."""
        return self._stock[0]

    @property
    def type_name(self) -> str:
        """Name of the stock module's type, for reports."""
        return type(self.stock).__name__

    @property
    def layer_names(self) -> tuple[str, ...]:
        """Dotted names of the layers."""
        return tuple(name for stack in self.stacks for name in stack.names)

    def rows(self) -> Iterator[tuple[PartMatrix, nn.Parameter, int, StackedMatrices]]:
        """Yield every layer that was not replaced, with the place of its matrix in the stock module.

        Returns:
            The layer, the parameter of the stock module, the number of the matrix in this parameter, and the
            location of all its matrices.
        """
        for stack in self.stacks:
            parameter = self._stock[0].get_parameter(stack.parameter)
            for number, name in enumerate(stack.names):
                if isinstance(layer := self.get_submodule(name), PartMatrix):
                    yield layer, parameter, number, stack

    @property
    def weight(self) -> Tensor:
        """Weight of the stock module, for code that reads it; a placeholder after a layer was replaced."""
        stock, first = self._stock[0], self.get_submodule(self.layer_names[0])
        if "weight" not in own_parameters(stock):
            return first.weight  # type: ignore[return-value]
        weight: Tensor = stock.weight  # type: ignore[assignment]
        if not self._freed:
            return weight
        like = first._like() if isinstance(first, NetworkModule) else first.weight
        assert isinstance(like, Tensor)
        return weight_facts(like, weight.shape, list(self.parameters()), first)

    @property
    def compressed(self) -> bool:
        """True if at least one layer has been replaced."""
        return any(not isinstance(self.get_submodule(name), PartMatrix) for name in self.layer_names)

    @torch.no_grad()
    def fuse(self, shared: Shared) -> nn.Module:
        """Return the compound if one of its layers was replaced, else the stock module.

        Args:
            shared: parameters that other modules have made by joining matrices, so that tied parameters stay
                tied.

        Returns:
            This compound, after deleting the parameters of the stock module; or the stock module, after
            writing the matrices of the layers to its parameters.
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
        for module in stock.modules():  # submodules of the compound already have the right training mode
            if module not in mine:
                module.training = self.training
        return stock

    def _free(self) -> None:
        """Copy the matrices of layers that were not replaced, then delete the stock module's parameters."""
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
            if not isinstance(getattr(place, part, None), nn.Module):
                place.add_module(part, nn.Module())
            place = place.get_submodule(part)
        place.add_module(last, layer)

    def __getattr__(self, name: str) -> Any:
        """Look up an attribute in the stock module, for code that reads the module's sizes and options."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            stock = self.__dict__.get("_stock")
            # Methods are not looked up, since they would use the stock module as `self`. Hooks of accelerate
            # are not looked up either, since they are for the stock module only.
            if stock is None or name in ACCELERATE:
                raise
            if name not in vars(stock[0]) and hasattr(type(stock[0]), name):
                raise
            return getattr(stock[0], name)


#: Compounds by their full names.
_COMPOUNDS: Registry[type[Compound]] = Registry("compound", error=TypeError)
C = TypeVar("C", bound=type[Compound])


def register_compound(kind: C) -> C:
    """Register a subclass of `Compound`; it takes precedence over classes registered before."""
    _COMPOUNDS.add(f"{kind.__module__}.{kind.__qualname__}", kind)
    return kind


def compound_of(module: nn.Module) -> Any:
    """Return the subclass of `Compound` that can replace a module, or None."""
    return next((kind for kind in _compounds_for(module) if kind.matches(module)), None)


def _compounds_for(module: nn.Module) -> Iterator[type[Compound]]:
    kind = type(module)
    names = kind, f"{kind.__module__}.{kind.__qualname__}"
    latest_first = reversed(_COMPOUNDS.values())
    return (x for x in latest_first if not x.replaces or any(name in x.replaces for name in names))


def reason_against(module: nn.Module) -> str | None:
    """Return a short reason why a module is not compressed; None if no reason is known."""
    if isinstance(module, _STOCK) and not vars(module).keys().isdisjoint(("weight", "bias")):
        return RECOMPUTED
    if type(module) in _STOCK and "weight" in own_parameters(module) and not is_plain(module):
        return MORE_THAN_WEIGHT
    if has_own_forward(module) and (kind_of(module) or compound_of(module)) is not None:
        return OWN_FORWARD
    reasons = (kind.reason_against(module) for kind in _compounds_for(module))
    return next((reason for reason in reasons if reason is not None), None)


def type_and_reason(module: nn.Module) -> str:
    """Return the type name of a module, followed by the reason why it is not compressed, if known."""
    reason = reason_against(module)
    return type(module).__name__ if reason is None else f"{type(module).__name__} ({reason})"


def is_observed(*layers: nn.Module) -> bool:
    """Return True if any of the layers has forward hooks.

    Such a layer must be called, since its hooks do not run otherwise. PyTorch has no public function to find
    hooks.
    """
    return any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)


def dense_matrix(layer: nn.Module) -> Tensor:
    """Return the matrix `(out, in)` of a layer of a `Compound`, differentiable in the layer's parameters."""
    return layer.to_matrix() if isinstance(layer, NetworkModule) else layer.weight  # type: ignore[return-value]


def _set_parameter(module: nn.Module, name: str, value: nn.Parameter) -> None:
    owner, _, key = name.rpartition(".")
    setattr(module.get_submodule(owner), key, value)


def _own(matrix: Tensor) -> Tensor:
    """Return a matrix in contiguous memory that no other tensor uses; it is copied only if necessary."""
    alone = matrix.is_meta or matrix.untyped_storage().nbytes() == matrix.nbytes
    return matrix if alone and matrix.is_contiguous() else matrix.clone(memory_format=torch.contiguous_format)


@contextmanager
def unfused(model: nn.Module) -> Iterator[None]:
    """Return a context in which every weight matrix is a layer that can be calibrated and replaced.

    Modules with several matrices (recurrent layers, stacks of experts) are replaced by equivalent modules
    with one layer for each matrix. Extensions do the same for their own classes. On exit, stock modules whose
    layers were not replaced are restored. Contexts may be nested.
    """
    with ExitStack() as stack:
        stack.callback(fuse, model, unfuse(model))
        for extension in extensions():
            stack.enter_context(extension.unfused(model))
        yield


def unfuse(model: nn.Module, *, inside: Iterable[str] | None = None) -> list[str]:
    """Replace every module that has several matrices by a `Compound`, in place, without copying weights.

    Args:
        model: any model; a model that is itself such a module is not changed.
        inside: names of layers; only modules that contain one of them are replaced. None replaces all.

    Returns:
        Names of the modules that were replaced.
    """
    wanted = None if inside is None else {name[:k] for name in inside for k, x in enumerate(name) if x == "."}
    shared: Shared = {}
    made: dict[int, nn.Module] = {}  # a module with several names is replaced by one `Compound`
    found = []
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if not name or isinstance(module, Compound) or (wanted is not None and name not in wanted):
            continue
        kind = None if has_own_forward(module) else compound_of(module)
        if kind is not None:
            if id(module) not in made:
                made[id(module)] = kind(module, shared)
            _put(model, name, made[id(module)])
            found.append(name)
    return found


def fuse(model: nn.Module, names: Iterable[str] | None = None) -> None:
    """Restore the stock module of each compound if none of its layers was replaced.

    Args:
        model: any model; it is changed in place.
        names: names of the compounds to consider; all if absent.
    """
    found = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, Compound)
    }
    shared: Shared = {}
    made: dict[int, nn.Module] = {}
    for name, module in found.items():
        if names is not None and name not in names:
            continue
        if id(module) not in made:
            made[id(module)] = module.fuse(shared)
        if made[id(module)] is not module:
            _put(model, name, made[id(module)])


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    place = model.get_submodule(parent)
    carry_hooks(place.get_submodule(child), module)
    setattr(place, child, module)


register_layer_kind(_PartKind())
