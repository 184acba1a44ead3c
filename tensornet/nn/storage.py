"""How the cores of a layer are stored: as plain tensors, pivoted, or in a number format.

**Pivoted.** The cores of an operator are not unique: a matrix `G` and its inverse can be inserted at any bond
between two cores. At a bond of size `d`, `d^2` elements are redundant. `G` is chosen so that `d` rows of a
core, viewed as a matrix `(other indices, bond)`, become the identity, which need not be stored. The operator
does not change. The family chooses the bonds (`TopologyFamily.gauge_bonds`). A low-rank matrix of rank `r`
then takes `r (out + in - r)` elements instead of `r (out + in)`.

**Number formats.** Each core has a number format: the model's own dtype, bfloat16, or integers of 1 to 8 bits
with a scale for each group of neighbouring inputs (`tensornet.quantization`). The family rounds cores to
integers so that the loss increases little (`TopologyFamily.round_cores`).

A core in the model's dtype that is not pivoted is the parameter `core_<name>` of its layer. Any other core is
a submodule of this name, a `PackedCore`.

Reference:
    Zhao et al. 2025, "Pivoting factorization" (low rank); Oseledets, Tyrtyshnikov 2010, "TT-cross
    approximation" (pivots in chains).
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tensornet._util import outside_autocast
from tensornet.errors import FormatError
from tensornet.linalg.weighted_svd import Weighting
from tensornet.quantization import NumberFormat, RoundedWeight, Rounding
from tensornet.quantization.parts import BIT_DTYPES, as_bits, floating
from tensornet.topologies import topology_family
from tensornet.topologies.rounded_cores import StoredCores, matrix_view
from tensornet.topology import Topology

#: The model's own dtype.
FLOAT = NumberFormat()
#: Number of rows of a matrix whose values are computed at a time.
_ROWS = 8192


@dataclass(frozen=True)
class Storage:
    """How the cores of a layer are stored: their number formats, and whether they are pivoted.

    Args:
        pivoted: whether cores omit the rows that can be made an identity matrix (see the module docstring).
        number_format: format of all cores, or its name.
        core_formats: formats that replace `number_format` for single cores, as a mapping from the name of a
            core to a format, or as pairs.

    Raises:
        FormatError: a format is unknown, or a core is named twice.
    """

    pivoted: bool = False
    number_format: NumberFormat = FLOAT
    core_formats: tuple[tuple[str, NumberFormat], ...] = ()

    def __post_init__(self) -> None:
        given = self.core_formats
        pairs = given.items() if isinstance(given, Mapping) else given
        parsed = sorted((name, NumberFormat.parse(each)) for name, each in pairs)
        object.__setattr__(self, "number_format", NumberFormat.parse(self.number_format))
        object.__setattr__(self, "core_formats", tuple(parsed))
        names = [name for name, _ in parsed]
        if len(set(names)) < len(names) or not all(isinstance(name, str) for name in names):
            raise FormatError(f"core_formats must name every core once, got {names}.")

    @property
    def plain(self) -> bool:
        """True if every core is a parameter in the dtype of the model."""
        return not self.pivoted and not self.own_dtypes

    @property
    def quantized(self) -> bool:
        """True if some cores are stored as integers."""
        return any(each.is_integer for each in self._formats)

    @property
    def own_dtypes(self) -> bool:
        """True if some cores are not stored in the dtype of the model."""
        return any(each != FLOAT for each in self._formats)

    @property
    def _formats(self) -> tuple[NumberFormat, ...]:
        return self.number_format, *(each for _, each in self.core_formats)

    def format_of(self, name: str) -> NumberFormat:
        """Look up the number format of one core."""
        return dict(self.core_formats).get(name, self.number_format)

    def for_topology(self, topology: Topology) -> "Storage":
        """Return this storage, without pivoting if no bond of the topology can be pivoted."""
        return replace(self, pivoted=self.pivoted and bool(gauge_of(topology)))

    def to_dict(self) -> dict[str, Any]:
        """Convert to a JSON-ready dict."""
        data: dict[str, Any] = {"pivoted": self.pivoted}
        if self.number_format != FLOAT:
            data["number_format"] = self.number_format.name
        if self.core_formats:
            data["core_formats"] = {name: each.name for name, each in self.core_formats}
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Storage":
        """Restore a storage from the result of `to_dict`; an empty mapping gives plain storage.

        Raises:
            FormatError: an entry or a format is unknown, or a value has a wrong type.
        """
        formats = data.get("core_formats", {}) if isinstance(data, Mapping) else None
        valid = (
            isinstance(data, Mapping)
            and isinstance(formats, Mapping)
            and data.keys() <= {"pivoted", "number_format", "core_formats"}
            and isinstance(data.get("pivoted", False), bool)
            and all(isinstance(name, str) for name in (data.get("number_format", ""), *formats.values()))
        )
        if not valid:
            raise FormatError(
                "A storage has the entries pivoted (true or false), number_format (the name of a format) and "
                f"core_formats (names of formats by core); got {data!r}."
            )
        return cls(**data)

    def num_params(self, topology: Topology) -> int:
        """Count the stored values, including scales, minima and row orders of pivoted cores.

        A packed integer counts as one value.
        """
        return sum(count for *_, count in _stored_parts(topology, self, torch.float32))

    def num_bytes(self, topology: Topology, dtype: torch.dtype) -> int:
        """Count the bytes of all stored tensors.

        Args:
            topology: topology of the network.
            dtype: dtype of the model.
        """
        parts = _stored_parts(topology, self, dtype)
        return sum(math.prod(shape) * kind.itemsize for _, _, shape, kind, _ in parts)

    def num_tensors(self, topology: Topology) -> int:
        """Count the stored tensors."""
        return sum(1 for _ in _stored_parts(topology, self, torch.float32))

    def core_size(self, topology: Topology, name: str, dtype: torch.dtype) -> tuple[int, int]:
        """Count the stored values and the bytes of one core, including its scales and minima."""
        parts = [part for part in _stored_parts(topology, self, dtype) if part[0] == name]
        size = sum(math.prod(shape) * kind.itemsize for _, _, shape, kind, _ in parts)
        return sum(count for *_, count in parts), size


#: Storage in which every core is a parameter in the dtype of the model.
PLAIN = Storage()


class PackedCore(nn.Module):
    """Core that is not stored as a plain parameter, but pivoted, in bfloat16, or as integers.

    An integer core is stored as packed `codes` and `scales`. Some formats add `zeros` (packed minima) or
    `steps` (factors of integer scales). A floating-point core is stored as `values`. A pivoted
    core also has `order`, the position of each of its rows. Values in the dtype of the model are a parameter.
    All other tensors are integer buffers: scales, steps and bfloat16 values are viewed as integers with the
    same bits. So `.to()` and `.half()` do not convert them. Tied layers share this module.

    Args:
        number_format: format of the elements.
        shape: shape of the core.
        columns: number of columns of the core viewed as a matrix (see `matrix_view`).
        tensors: stored tensors by name, with the shapes and dtypes that `layout` returns; a stack of cores
            has additional leading dimensions.
        axis: axis of the bond on which the core is pivoted; None if the core is not pivoted.
    """

    codes: Tensor
    scales: Tensor
    values: Tensor
    zeros: Tensor
    steps: Tensor
    order: Tensor

    def __init__(
        self,
        number_format: NumberFormat,
        shape: Sequence[int],
        columns: int,
        tensors: Mapping[str, Tensor],
        axis: int | None = None,
    ) -> None:
        super().__init__()
        self.number_format, self.shape, self.columns, self.axis = number_format, tuple(shape), columns, axis
        self.names = tuple(tensors)
        for name, tensor in tensors.items():
            self._put(name, tensor)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Stored tensors by name."""
        return {name: getattr(self, name) for name in self.names}

    @property
    def device(self) -> torch.device:
        """Device of the stored tensors."""
        found: torch.device = getattr(self, self.names[0]).device
        return found

    def align(self) -> None:
        """Copy stored tensors that are not aligned for kernels, such as those of a memory-mapped file."""
        for name in self.names:
            if name in self._buffers:
                self._buffers[name] = aligned(getattr(self, name))

    @property
    def counts(self) -> dict[str, int]:
        """Number of values in each stored tensor; a packed code or minimum counts as one value."""
        found = {name: tensor.numel() for name, tensor in self.tensors.items()}
        if "codes" in found:
            found["codes"] = math.prod(self.codes.shape[:-1]) * self.columns
        if "steps" in found:
            found["scales"] = math.prod(self.codes.shape[:-1]) * self.number_format.groups(self.columns)
        if "zeros" in found:
            found["zeros"] = found["scales"]
        return found

    @property
    def is_trained(self) -> bool:
        """True while scales, codes or bfloat16 values are parameters (see `unpack_for_training`)."""
        own = self.number_format != FLOAT
        return own and any(isinstance(x, nn.Parameter) for x in self.tensors.values())

    @property
    def trained_scales(self) -> str:
        """Name of the tensor to train: `"steps"` if scales are integers times steps, otherwise `"scales"`."""
        return self.number_format.scales.trained

    @property
    def scale_values(self) -> Tensor:
        """Scales as floating-point numbers, shape `(..., rows, groups)`."""
        return self._scale_values(self.tensors)

    def _scale_values(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return self.number_format.scales.values(tensors, self.number_format.groups(self.columns))

    def forward(self, dtype: torch.dtype | None = None, index: Tensor | None = None) -> Tensor:
        """Return the core as a tensor, differentiable with respect to the stored floating-point tensors.

        Args:
            dtype: dtype of the result; by default, the dtype of the stored values, or float32 for integers.
            index: indices of the cores to return from a stack of cores, shape `(n,)`; all if absent.
        """
        number_format = self.number_format
        if number_format.is_integer:
            core = self.matrix(dtype or torch.float32, index)
        else:
            core = self.values if index is None else self.values.index_select(0, index)
            if number_format.dtype is not None:
                core = core if core.is_floating_point() else floating(core, number_format.dtype)
                core = core.to(dtype or core.dtype)
        if self.axis is not None:
            identity = torch.eye(core.shape[1], dtype=core.dtype, device=core.device)
            core = torch.cat((identity, core)).index_select(0, self.order)
            last = (*self.shape[: self.axis], *self.shape[self.axis + 1 :], self.shape[self.axis])
            return core.reshape(last).movedim(-1, self.axis)
        if number_format.is_integer:
            return core.reshape(*core.shape[:-2], *self.shape)
        return core

    def matrix(self, dtype: torch.dtype, index: Tensor | None = None) -> Tensor:
        """Unpack integers to the matrix of their values, `(..., rows, columns)`.

        Args:
            dtype: dtype of the values.
            index: indices of the rows to unpack, or of the matrices in a stack, shape `(n,)`; all if absent.
        """
        number_format, parts = self.number_format, self.tensors
        if index is not None:  # done while scales are integers, since some float dtypes cannot be indexed
            parts = {name: tensor.index_select(0, index) for name, tensor in parts.items() if name != "order"}
        scales, codes, zeros = self._scale_values(parts), parts["codes"], parts.get("zeros")
        if codes.ndim > 2 or len(codes) <= _ROWS or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return unpacked(number_format, codes, scales, zeros, self.columns, dtype)
        # Intermediate results of a large matrix, such as an output head, would need several times its memory.
        found = torch.empty(len(codes), self.columns, dtype=dtype, device=codes.device)
        for start in range(0, len(codes), _ROWS):
            some = slice(start, start + _ROWS)
            own = zeros if zeros is None else zeros[some]
            found[some] = unpacked(number_format, codes[some], scales[some], own, self.columns, dtype)
        return found

    def check_finite(self, name: str) -> None:
        """Check that all scales are finite.

        Args:
            name: name of this module in its model, for the message.

        Raises:
            FormatError: a scale is NaN or infinite.
        """
        if "scales" in self.names and not bool(self.scale_values.float().isfinite().all()):
            raise FormatError(
                f"{name}.{self.trained_scales} has NaN or infinite scales, so that the weight has no value. "
                "The file is damaged: copy or download it again, or compress the model again."
            )

    # torch passes the metadata of a state dict only to the next two methods. The metadata contains the name
    # of the number format, since the stored bits alone do not tell which numbers they represent.

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Save the tensors, and add the name of the number format to the metadata of the state dict."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if (metadata := getattr(destination, "_metadata", None)) is not None:
            metadata.setdefault(prefix[:-1], {})["number_format"] = self.number_format.name

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: dict[str, Any], *others: Any
    ) -> None:
        """Check that the tensors belong to this number format, and load them.

        Raises:
            FormatError: the state dict has another number format, or integers that are unpacked for training.
        """
        own, given = self.number_format.name, local_metadata.get("number_format")
        if given not in (None, own):
            raise FormatError(
                f"{prefix[:-1]} is stored as {own}, but the state dict has it as {given}. Compress the model "
                "with the plan that was used for the state dict, or load its file by tensornet.load_model."
            )
        for name, tensor in self.tensors.items():
            found = state_dict.get(prefix + name)
            if found is None or (found.is_floating_point() and tensor.is_floating_point()):
                continue
            if found.dtype != tensor.dtype:
                raise FormatError(
                    f"{prefix}{name} is stored as {tensor.dtype}, but the state dict has {found.dtype}. It "
                    "belongs to another number format, or to a model in training (`unpack_for_training`)."
                )
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *others)

    def extra_repr(self) -> str:
        """Show the number format and shape in `print(model)`."""
        return f"{self.number_format.name}, {self.shape}"

    def _put(self, name: str, tensor: Tensor) -> None:
        """Register a floating-point tensor as a parameter, any other tensor as a buffer."""
        if not tensor.is_floating_point():
            delattr(self, name) if hasattr(self, name) else None
            self.register_buffer(name, tensor)
            return
        setattr(self, name, tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor))


def put_core(module: nn.Module, name: str, core: "Tensor | PackedCore") -> None:
    """Register a stored core in a module, and replace any earlier core of the same name.

    Args:
        module: a layer, or a bank of experts.
        name: name of the attribute, `core_<name of the core>`.
        core: the core; parameters and packed cores are shared, any other tensor becomes a new parameter.
    """
    if isinstance(getattr(module, name, None), nn.Module) != isinstance(core, nn.Module) and hasattr(
        module, name
    ):
        delattr(module, name)
    plain = isinstance(core, Tensor) and not isinstance(core, nn.Parameter)
    setattr(module, name, nn.Parameter(core) if plain else core)  # type: ignore[arg-type]


class TrainedCodes(nn.Parameter):
    """Codes of an integer matrix as floating-point numbers during training (see `NumberFormat.decode`)."""


def unpack_for_training(model: nn.Module, *, codes: bool = False) -> list[PackedCore]:
    """Convert scales and bfloat16 cores to trainable float32 parameters.

    8-bit scales are not trained, since rounding them again would undo the training steps. If scales are
    integers, only their steps are trained.

    Args:
        model: a model with compressed layers or experts; cores that are already converted do not change.
        codes: whether integer codes become parameters too, as `TrainedCodes` of 4 bytes each. Codes of
            codebooks are not trained, since they cannot change one by one.

    Returns:
        The converted cores, for `pack_after_training`.
    """
    found = [core for core in model.modules() if isinstance(core, PackedCore) and not core.is_trained]
    found = [core for core in found if core.number_format != FLOAT]
    for core in found:
        number_format = core.number_format
        if not number_format.is_integer:
            assert number_format.dtype is not None
            core._put("values", floating(core.values, number_format.dtype).float())
            continue
        if number_format.scales.dtype.itemsize > 1:
            name = core.trained_scales
            core._put(name, floating(getattr(core, name), number_format.scales.dtype).float())
        if codes and number_format.points.run == 1:
            made = TrainedCodes(number_format.unpack(core.codes, core.columns).float())
            core._put("codes", made)
    return found


@torch.no_grad()
def pack_after_training(cores: Iterable[PackedCore]) -> None:
    """Undo `unpack_for_training`: store scales in the dtype of their format, and round and pack codes.

    With FSDP2 every process gets whole tensors, since the stored bits are buffers, which FSDP2 does not
    shard.

    Args:
        cores: the result of `unpack_for_training`.
    """

    def whole(tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

    for core in cores:
        number_format = core.number_format
        if number_format.dtype is not None and core.values.is_floating_point():
            core._put("values", as_bits(whole(core.values), number_format.dtype))
        if not number_format.is_integer:
            continue
        if (scales := getattr(core, core.trained_scales)).is_floating_point():
            core._put(core.trained_scales, as_bits(whole(scales), number_format.scales.dtype))
        if core.codes.is_floating_point():
            codes = whole(core.codes).round().clamp(0, number_format.points.top).to(torch.uint8)
            core._put("codes", number_format.pack(codes))


def tie(model: nn.Module, target: str, source: str) -> None:
    """Tie two stored tensors of a model, such as `head.core_0`, by replacing one with the other.

    If the tensor belongs to a `PackedCore`, the whole core is tied, since layers can share only whole cores.

    Args:
        model: the model; it is changed in place.
        target: state-dict name of the tensor to replace.
        source: state-dict name of the tensor that replaces it.
    """
    (place, _, name), (first, _, key) = target.rpartition("."), source.rpartition(".")
    owner = model.get_submodule(first)
    if isinstance(owner, PackedCore):
        path, _, core = place.rpartition(".")
        put_core(model.get_submodule(path), core, owner)
        return
    tensor, module = getattr(owner, key), model.get_submodule(place)
    vars(module).pop(name, None)
    if name not in module.state_dict():
        kept = isinstance(tensor, nn.Parameter)
        module.register_parameter(name, tensor) if kept else module.register_buffer(name, tensor)
    else:
        setattr(module, name, tensor)


def storage_entry(storage: Storage) -> dict[str, Any]:
    """Return `{"storage": ...}` for the description of a module; an empty dict for plain storage."""
    return {} if storage.plain else {"storage": storage.to_dict()}


def layout(
    topology: Topology, storage: Storage, dtype: torch.dtype
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Map the state-dict name of every stored tensor of a network to its shape and dtype.

    Args:
        topology: topology of the network.
        storage: how its cores are stored.
        dtype: dtype of the model.

    Raises:
        FormatError: the storage names a core that the topology does not have.
    """
    if unknown := sorted(dict(storage.core_formats).keys() - set(topology.core_names)):
        raise FormatError(
            f"The storage has number formats for cores {', '.join(unknown)}; the topology "
            f"{topology.family!r} has {', '.join(topology.core_names)}."
        )
    return {
        f"core_{core}.{part}" if part else f"core_{core}": (shape, kind)
        for core, part, shape, kind, _ in _stored_parts(topology, storage, dtype)
    }


def _stored_parts(
    topology: Topology, storage: Storage, dtype: torch.dtype
) -> Iterator[tuple[str, str, tuple[int, ...], torch.dtype, int]]:
    """List the stored tensors as `(core, part, shape, dtype, number of values)`.

    The part is the name of a tensor of a `PackedCore`, such as `"scales"`; it is empty for a plain tensor.
    """
    for name, kept, order in kept_shapes(topology, storage):
        number_format = storage.format_of(name)
        if order is not None:
            yield name, "order", (order,), torch.int32, order
        if not number_format.is_integer:
            part = "" if order is None and number_format == FLOAT else "values"
            own = dtype if number_format.dtype is None else BIT_DTYPES[number_format.dtype]
            yield name, part, kept, own, math.prod(kept)
            continue
        rows, columns = kept
        groups = number_format.groups(columns)
        length = number_format.points.packed_bytes(columns)
        yield name, "codes", (rows, length), torch.uint8, rows * columns
        for part, length, kind, count in number_format.scales.layout(groups):
            yield name, part, (rows, length), kind, rows * count
        if number_format.minima is not None:
            length = number_format.minima.packed_bytes(groups)
            yield name, "zeros", (rows, length), torch.uint8, rows * groups


def kept_shapes(topology: Topology, storage: Storage) -> Iterator[tuple[str, tuple[int, ...], int | None]]:
    """Yield the name of each core, the shape of its values, and its number of rows (None if not pivoted).

    The values of an integer core are those before packing. A pivoted core has fewer values than elements.
    """
    gauge = gauge_of(topology) if storage.pivoted else {}
    for name, shape in topology.core_shapes.items():
        if name in gauge:
            bond = topology.size_of[gauge[name]]
            rows = math.prod(shape) // bond
            yield name, (rows - bond, bond), rows
        elif storage.format_of(name).is_integer:
            yield name, matrix_view(topology, name), None
        else:
            yield name, shape, None


def gauge_of(topology: Topology) -> dict[str, str]:
    """Map the name of each core that can be pivoted to the bond on which it is pivoted.

    Raises:
        TopologyError: the family is not registered.
    """
    return topology_family(topology.family).gauge_bonds(topology)


@torch.no_grad()
@outside_autocast
def encode(
    topology: Topology,
    storage: Storage,
    cores: Sequence[Tensor],
    weighting: Weighting | None = None,
    rounding: Rounding = "two_sided",
) -> dict[str, Tensor | PackedCore]:
    """Convert the cores of a network to the form in which a layer stores them.

    Args:
        topology: topology of the network.
        storage: how its cores are stored.
        cores: cores in the order of the topology.
        weighting: sensitivity of the loss to errors of the matrix, for rounding cores to integers.
        rounding: rounding method for integer cores (see `tensornet.quantization.round_weight`).

    Returns:
        Plain tensors or packed cores, by the names `core_<name>`.

    Raises:
        FormatError: a core is complex, and its format stores only real numbers.
    """
    for name, core in zip(topology.core_names, cores, strict=True):
        storage.format_of(name).check_real(core)
    orders: dict[str, Tensor] = {}
    tensors = _pivot(topology, cores, orders) if storage.pivoted else list(cores)
    named: dict[str, Tensor | RoundedWeight] = dict(zip(topology.core_names, tensors, strict=True))
    if storage.quantized and any(storage.format_of(name).is_integer for name in named):
        named = _rounded(
            topology, storage, dict(zip(named, tensors, strict=True)), orders, weighting, rounding
        )
    return {
        f"core_{name}": stored_core(topology, storage, name, value, tensors[0].dtype, orders.get(name))
        for name, value in named.items()
    }


def stored_core(
    topology: Topology,
    storage: Storage,
    name: str,
    value: Tensor | RoundedWeight,
    dtype: torch.dtype,
    order: Tensor | None = None,
) -> Tensor | PackedCore:
    """Convert the values or the codes of one core to the form in which a layer stores it.

    Args:
        topology: topology of the network.
        storage: how its cores are stored.
        name: name of the core.
        value: for an integer format, the rounded core viewed as a matrix; for other formats, the values of
            the core without its identity rows.
        dtype: dtype of the model.
        order: position of each row of a pivoted core (see `StoredCores`); None if the core is not pivoted.
    """
    shape, number_format = topology.core_shapes[name], storage.format_of(name)
    if isinstance(value, Tensor):
        number_format.check_real(value)
    if isinstance(value, Tensor) and order is None:
        value = value.to(dtype).reshape(shape if value.numel() == math.prod(shape) else value.shape)
        if number_format == FLOAT:
            return value
    tensors = {} if order is None else {"order": order}
    if isinstance(value, RoundedWeight):
        tensors |= {"codes": number_format.pack(value.codes), **number_format.scales.tensors(value.scales)}
        if value.minima is not None and number_format.minima is not None:
            tensors["zeros"] = number_format.minima.pack(value.minima)
    else:
        own = number_format.dtype
        tensors["values"] = value.to(dtype).contiguous() if own is None else as_bits(value, own)
    return _packed(topology, storage, name, tensors)


def _packed(topology: Topology, storage: Storage, name: str, tensors: Mapping[str, Tensor]) -> PackedCore:
    shape, label = topology.core_shapes[name], gauge_of(topology).get(name) if storage.pivoted else None
    labels = next(spec.labels for spec in topology.cores if spec.name == name)
    axis = None if label is None else labels.index(label)
    columns = matrix_view(topology, name)[1] if axis is None else shape[axis]
    return PackedCore(storage.format_of(name), shape, columns, tensors, axis)


def empty(
    topology: Topology, storage: Storage, *, device: torch.device | str | None, dtype: torch.dtype | None
) -> dict[str, Tensor | PackedCore]:
    """Allocate uninitialized stored cores, and return them by the names `core_<name>`."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, (shape, kind) in layout(topology, storage, dtype or torch.get_default_dtype()).items():
        core, _, part = key.partition(".")
        found.setdefault(core, {})[part] = torch.empty(shape, dtype=kind, device=device)
    return {
        core: parts[""] if "" in parts else _packed(topology, storage, core.removeprefix("core_"), parts)
        for core, parts in found.items()
    }


def decode(cores: Iterable[Tensor | PackedCore], dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
    """Convert stored cores to plain tensors.

    Args:
        cores: tensors, which are returned unchanged, and packed cores.
        dtype: dtype of decoded packed cores; by default, that of their values, or float32 for integers.
    """
    return tuple(core(dtype) if isinstance(core, nn.Module) else core for core in cores)


def _rounded(
    topology: Topology,
    storage: Storage,
    tensors: Mapping[str, Tensor],
    orders: Mapping[str, Tensor],
    weighting: Weighting | None,
    rounding: Rounding,
) -> dict[str, Tensor | RoundedWeight]:
    """Round the integer cores by the method of the topology family, which also refits the other cores."""
    formats = {name: storage.format_of(name) for name in tensors if storage.format_of(name).is_integer}
    own = next(iter(tensors.values())).dtype
    dtype = torch.float64 if own == torch.float64 else torch.float32
    views = {name: kept for name, kept, _ in kept_shapes(topology, storage)}
    # A dense matrix is converted when its rows are rounded, since all rows would need twice its memory.
    wide = own if topology.family == "dense" else dtype
    work = {name: tensor.to(wide).reshape(views[name]) for name, tensor in tensors.items()}
    plain = replace(storage, number_format=FLOAT, core_formats=())

    def assemble(found: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        return decode(
            stored_core(topology, plain, name, found[name], dtype, orders.get(name))
            for name in topology.core_names
        )

    stored = StoredCores(topology, work, formats, orders, assemble, rounding)
    done = topology_family(topology.family).round_cores(stored, weighting or Weighting())
    return {name: x.to(own) if isinstance(x, Tensor) else x for name, x in (work | done).items()}


def row_cores(topology: Topology, storage: Storage) -> tuple[str, ...]:
    """List the integer cores that store one row for each combination of out-leg indices."""
    gauge = gauge_of(topology) if storage.pivoted else {}
    found = []
    for spec in topology.cores:
        if not storage.format_of(spec.name).is_integer or spec.name in gauge:
            continue
        shape, rows = topology.core_shapes[spec.name], matrix_view(topology, spec.name)[0]
        legs = [axis for axis, label in enumerate(spec.labels) if label in topology.out_labels]
        # The condition holds if all axes before and between the out-legs have size 1.
        if legs and rows == math.prod(shape[: legs[-1] + 1]) == math.prod(shape[axis] for axis in legs):
            found.append(spec.name)
    return tuple(found)


def aligned(x: Tensor) -> Tensor:
    """Return the tensor itself, or a copy if its memory address is not a multiple of 16 bytes.

    Kernels for integers in torch 2.15 crash the process if their inputs are not aligned.
    """
    return x if type(x) is not Tensor or not x.is_cpu or x.data_ptr() % 16 == 0 else x.clone()


def unpacked(
    number_format: NumberFormat,
    codes: Tensor,
    scales: Tensor,
    minima: Tensor | None,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    """Compute the values of packed integers, shape `(..., rows, columns)`.

    Args:
        number_format: format of the integers.
        codes: packed codes, or unpacked floating-point codes during training.
        scales: floating-point scales, shape `(..., rows, groups)`.
        minima: packed minima; None if the format has none.
        columns: number of columns of the matrix.
        dtype: dtype of the values.
    """
    if codes.is_floating_point():
        return number_format.decode(codes, scales, number_format.unpacked_minima(minima, scales), dtype)
    return number_format.decode_packed(codes, scales, minima, columns, dtype)


def _pivot(topology: Topology, cores: Sequence[Tensor], orders: dict[str, Tensor]) -> list[Tensor]:
    """Pivot the cores and return them without their identity rows.

    Args:
        topology: topology of the network.
        cores: cores in the order of the topology.
        orders: dict to which the position of each row of every pivoted core is added, by the core's name.
    """
    gauge = gauge_of(topology)
    work = [core.double() for core in cores]
    for index, spec in enumerate(topology.cores):
        label = gauge.get(spec.name)
        if label is None:
            continue
        rows = work[index].movedim(spec.labels.index(label), -1)
        q, r = torch.linalg.qr(rows.reshape(-1, rows.shape[-1]))
        order, pivots = _choose_rows(q)
        top, bottom = q[order[:pivots]], q[order[pivots:]]
        # The entries of bottom @ top^-1 are bounded, since pivoted QR has chosen a well-conditioned `top`.
        work[index] = torch.linalg.solve(top.T, bottom.T).T
        position = torch.empty_like(order)
        position[order] = torch.arange(len(order), device=order.device)
        orders[spec.name] = position.to(torch.int32)
        # The other core of this bond, which has a larger index, absorbs the factor `top`.
        other = next(k for k in range(index + 1, len(work)) if label in topology.cores[k].labels)
        axis = topology.cores[other].labels.index(label)
        work[other] = torch.tensordot(top @ r, work[other], ([1], [axis])).movedim(0, axis)
    return [new.to(old.dtype).contiguous() for new, old in zip(work, cores, strict=True)]


def _choose_rows(basis: Tensor) -> tuple[Tensor, int]:
    """Order the rows of a basis `(rows, rank)` so that the first `rank` rows are well-conditioned.

    Returns:
        The order of the rows, and the rank.
    """
    import scipy.linalg  # LAPACK's pivoted QR, which torch does not offer

    rank = basis.shape[1]
    pivots = scipy.linalg.qr(basis.T.cpu().numpy(), mode="r", pivoting=True)[1]
    chosen = torch.from_numpy(pivots[:rank]).long()
    others = torch.ones(basis.shape[0], dtype=torch.bool, device="cpu")
    others[chosen] = False
    return torch.cat([chosen, others.nonzero().squeeze(1)]).to(basis.device), rank
