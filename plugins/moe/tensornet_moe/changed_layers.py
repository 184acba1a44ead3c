"""Layers that fine-tuned models change: a change of the matrix in few bytes, and own biases and norms.

A fine-tuned model differs from its base in every tensor. For the matrix of a layer, a `Change` contains the
difference as a layer of this library, in any number format and of any rank. For all other tensors, such as
biases and the weights of norms, it contains the values of the fine-tuned model, which take few bytes.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tensornet.errors import FormatError, ShapeError, TargetError
from tensornet.nn.embedding import MPOEmbedding
from tensornet.nn.layer_kinds import kind_of
from tensornet.nn.module import NetworkModule, build_module
from tensornet_moe.specialist_layers import (
    SpecialistLayer,
    Specialists,
    check_rows,
    in_use,
    is_low_rank,
    product_of,
    put_in_place,
    refuse_prepared,
    truncated,
    weight_like,
)

_VALUE = "own_"
#: Advice where a fine-tuned model cannot be written as an adapter.
_WHOLE = "Write it as a model of its own: unpack(name, folder), or --whole."


class Change(nn.Module):
    """Difference between a layer of a fine-tuned model and the same layer of its base.

    Args:
        matrix: layer with the difference of the matrices, without a bias; None if they are equal.
        values: tensors of the fine-tuned layer that replace those of the base, by their names in the layer.
        scale: factor of the matrix. Rounding a change to few bits, or to a low rank, makes its effect smaller
            in all layers at once; a factor above 1 makes up for this.

    Example:
        >>> from tensornet_moe.changed_layers import Change
        >>> change = Change(None, {"weight": torch.tensor([2.0, 2.0])})
        >>> change.output(torch.nn.LayerNorm(2), torch.tensor([[3.0, 1.0]])).round().tolist()
        [[2.0, -2.0]]
    """

    def __init__(
        self, matrix: NetworkModule | None, values: Mapping[str, Tensor], scale: float = 1.0
    ) -> None:
        super().__init__()
        self.matrix, self.scale = matrix, scale
        for name, value in values.items():
            self.register_buffer(f"{_VALUE}{name}", value)

    @property
    def values(self) -> dict[str, Tensor]:
        """Tensors that replace those of the base layer, by their names in the layer."""
        return {name.removeprefix(_VALUE): x for name, x in self.named_buffers(recurse=False)}

    def output(
        self, base_layer: nn.Module, x: Tensor, *args: Any, base: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """Compute the output of the fine-tuned layer.

        Args:
            base_layer: the layer of the base.
            x, args, kwargs: inputs of the layer.
            base: output of the base layer for these inputs, if it is known.
        """
        if values := self.values:
            base = torch.func.functional_call(base_layer, values, (x, *args), kwargs)
        y: Tensor = base_layer(x, *args, **kwargs) if base is None else base
        if self.matrix is None:
            return y
        x = x.to(self.matrix.dtype) if x.is_floating_point() else x
        return y + self.scale * self.matrix(x).to(y.dtype)

    def spec(self) -> dict[str, Any]:
        """Return a JSON-ready description, from which `load_changes` rebuilds the change."""
        matrix = None if self.matrix is None else self.matrix.spec()
        return {"matrix": matrix, "values": sorted(self.values), "scale": self.scale}


def describe_changes(changes: Mapping[str, Change]) -> dict[str, Any]:
    """Describe the changes of one model by layer, for `load_changes`.

    Layers with tied weights share the tensors of a change, which are stored once: the others name the first.
    """
    found: dict[str, Any] = {}
    owners: dict[int, str] = {}
    for layer, change in changes.items():
        found[layer] = change.spec()
        if change.matrix is not None:
            owner = owners.setdefault(id(next(iter(change.matrix.stored.values()))), layer)
            if owner != layer:
                found[layer]["tied"] = owner
    return found


def load_changes(description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Change]:
    """Rebuild the changes of one model from their description and their tensors, keyed by `layer.name`.

    Raises:
        FormatError: the description is incomplete, or tensors are missing, surplus or of another shape.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    for layer in description:
        keys = {key for key in tensors if key.startswith(f"{layer}.") and _is_own(key[len(layer) + 1 :])}
        parts[layer] = {key[len(layer) + 1 :]: tensors[key] for key in keys}
    if surplus := sorted(tensors.keys() - {f"{layer}.{key}" for layer, x in parts.items() for key in x}):
        raise FormatError(f"The tensor {surplus[0]!r} belongs to no change that is described.")
    made: dict[str, Change] = {}
    for layer, spec in description.items():
        try:
            matrix = None if spec["matrix"] is None else build_module(spec["matrix"], device="meta")
            if matrix is not None and not isinstance(matrix, NetworkModule):
                raise TypeError(f"a {type(matrix).__name__} is no matrix")
            own = parts[layer]
            if (owner := spec.get("tied")) is not None:
                shared = {key: x for key, x in parts[owner].items() if not key.startswith(_VALUE)}
                own = {**shared, **own}
            values = {name: own[f"{_VALUE}{name}"] for name in spec["values"]}
            change = Change(matrix, values, float(spec["scale"]))
            change.load_state_dict(own, assign=True)
            if matrix is not None:
                owned = matrix if owner is None else made[owner].matrix
                assert owned is not None
                matrix.share_cores(owned)  # also sets the dtype of products on the device of the cores
        except (AssertionError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise FormatError(
                f"The description of the change of {layer!r} does not fit its tensors: {error}"
            ) from error
        made[layer] = change.eval()
    return made


def _is_own(key: str) -> bool:
    """Return True if a key of a file, without the name of the layer, is a tensor of a `Change`."""
    return key.startswith((_VALUE, "matrix."))


class ChangedLayer(SpecialistLayer):
    """Layer of a base that fine-tuned models change: `y = f_s(x)` with the tensors of the model in use.

    With weights, the output is `f(x) + sum_s w_s (f_s(x) - f(x))`. A fine-tuned model that does not occur in
    `specialists` leaves the layer as it is. `tensornet_hf.pack` makes these layers.

    Args:
        base_layer: any layer whose input is its first argument.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map the inputs of the base layer, `(rows, ...)`, to its outputs.

        Raises:
            ShapeError: the batch has another number of rows or tokens than the specialists in use.
            TargetError: the layer cannot know which specialists are in use (see `Specialists.use`).
        """
        parts, rows = in_use(self)
        if len(parts) == 1 and rows is None and not isinstance(parts[0][1], Tensor) and parts[0][1] == 1:
            return self._change(parts[0][0]).output(self.base_layer, x, *args, **kwargs)
        count = len(parts[0][1]) if rows is None and parts and isinstance(parts[0][1], Tensor) else 0
        x = _for_rows(x, count if rows is None else len(rows))
        check_rows(x, rows)
        y: Tensor = self.base_layer(x, *args, **kwargs)
        total = y if rows is None else y.clone()
        for k, (name, weight) in enumerate(parts):
            change = self._change(name)
            if rows is None:
                changed = change.output(self.base_layer, x, *args, base=y, **kwargs)
                total = total + weight_like(weight, y, name) * (changed - y)
            elif len(index := (rows == k).nonzero()[:, 0]):
                changed = change.output(self.base_layer, x[index], *args, base=y[index], **kwargs)
                total = total.index_copy(0, index, changed)
        return total

    def _change(self, name: str) -> Change:
        change = self.specialists[name]
        assert isinstance(change, Change)
        return change

    def change(self, name: str) -> Tensor | None:
        """Build the difference of the matrices, `(out_features, in_features)`; None if they are equal."""
        change = self._change(name) if name in self.specialists else None
        return None if change is None or change.matrix is None else change.scale * change.matrix.to_matrix()

    def factors(self, name: str, rank: int | None = None) -> tuple[Tensor, Tensor] | None:
        """Return `left: (out, k)` and `right: (k, in)` with `Delta_s = left right`; see the base class."""
        if name not in self.specialists:
            return None
        change = self._change(name)
        if change.values:
            raise TargetError(
                f"it has its own {' and '.join(sorted(change.values))}, but an adapter only contains changes "
                f"of the weights of linear layers. {_WHOLE}"
            )
        if (matrix := change.matrix) is None:
            return None
        if isinstance(matrix, MPOEmbedding):
            raise TargetError(f"adapters for embeddings are not written. {_WHOLE}")
        if is_low_rank(matrix.topology):
            left, right = product_of(matrix.cores, rank)
            return change.scale * left, right
        if rank is None:
            raise TargetError(
                f"its change is not of low rank. Give a rank to which it is truncated. {_WHOLE}"
            )
        return truncated(change.scale * matrix.to_matrix(), rank)

    def extra_repr(self) -> str:
        """Describe the module for `print(model)`."""
        return f"specialists={list(self.specialists)}"


def _for_rows(x: Tensor, rows: int) -> Tensor:
    """Repeat token positions `(1, tokens)`, which models compute once for all rows, for each row."""
    alone = rows > 1 and x.shape[0] == 1 and not x.is_floating_point()
    return x.expand(rows, *x.shape[1:]) if alone else x


def attach_changes(model: nn.Module, changes: Mapping[str, Mapping[str, Change]]) -> Specialists:
    """Make fine-tuned models the specialists of their base, in place.

    Args:
        model: the base, which is frozen.
        changes: the change of each layer by its name, by the name of the fine-tuned model.

    Raises:
        TargetError: the base has no such layer, or has specialists already.
        ShapeError: a layer has another shape than its change.
    """
    refuse_prepared(model)
    made: dict[str, ChangedLayer] = {}
    for name, of_layers in changes.items():
        for layer_name, change in of_layers.items():
            if layer_name not in made:
                try:
                    made[layer_name] = ChangedLayer(model.get_submodule(layer_name))
                except AttributeError:
                    raise TargetError(
                        f"{name!r} is of another base: {type(model).__name__} has no layer {layer_name!r}."
                    ) from None
            layer = made[layer_name]
            _check_shape(layer_name, layer.base_layer, change)
            layer.specialists[name] = change
    return put_in_place(model, made)


def changes_of(specialists: Specialists) -> dict[str, dict[str, Change]]:
    """Return the change of each layer by its name, by the name of the model; see `attach_changes`."""
    found: dict[str, dict[str, Change]] = {name: {} for name in specialists.names}
    for layer_name, layer in specialists.layers.items():
        for name, change in layer.specialists.items():
            if isinstance(change, Change):
                found[name][layer_name] = change
    return {name: changes for name, changes in found.items() if changes}


def _check_shape(name: str, layer: nn.Module, change: Change) -> None:
    """Raise ShapeError if the matrix of a change has another shape than that of its layer."""
    own = None if change.matrix is None else change.matrix.topology.shape
    kind = kind_of(layer)
    shape: tuple[int, ...] | None = None
    if isinstance(layer, NetworkModule):
        shape = layer.topology.shape
    elif kind is not None:
        shape = tuple(kind.matrix(layer).shape)
    if own is not None and own != shape:
        raise ShapeError(f"The change of {name!r} has the shape {own}, but this layer of the base {shape}.")
