"""Encodings of the cores of a layer: as they are, with their gauge fixed, in integers.

**Pivoted.** An operator does not determine the cores of its network: `G` and its inverse can be inserted at
any bond of size `d` between two cores, so `d^2` of their numbers say nothing about the operator. Choosing `G`
such that `d` rows of a core's matrix `(all else, bond)` become the identity leaves those rows out, without
any change of the operator. The family says at which bonds (`TopologyFamily.gauge_bonds`). A plain low rank of
`r` then takes `r (out + in - r)` numbers instead of `r (out + in)`.

**Number formats.** Every core is stored in its format: the model's own dtype, bfloat16, or integers of 2 to 8
bits with a scale for each group of neighbouring inputs (`tensornet.quantization`). A core of integers is
stored as `core_<name>`, packed rows of its matrix view (`matrix_view`), `scale_<name>`, and `zero_<name>`,
packed as well, where groups have zero points. Integers are rounded by the family, with the moments of the
loss (`TopologyFamily.round_cores`).

**Int8.** The older eight-bit encoding with one scale for each channel: all indices of a core but the longest.

Reference:
    Zhao et al. 2025, "Pivoting factorization" (low rank); Oseledets, Tyrtyshnikov 2010, "TT-cross
    approximation" (pivots in chains); Dettmers et al. 2022, "LLM.int8()" (per-channel scales).
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tensornet.context import outside_autocast
from tensornet.errors import FormatError
from tensornet.linalg.weighted_svd import Weighting
from tensornet.quantization import NumberFormat, RoundedWeight, dequantize, pack, packed_bytes, unpack
from tensornet.topologies import topology_family
from tensornet.topologies.stored_cores import StoredCores, matrix_view
from tensornet.topology import Topology

_INT8_MAX = 127
_FLOAT = NumberFormat()
_OPTIONS = ("pivoted", "int8", "number_format", "core_formats")


@dataclass(frozen=True)
class Storage:
    """Form in which cores are kept.

    Args:
        pivoted: fix the gauge of bonds by an identity block in one of their cores.
        int8: keep eight-bit integers with a scale for each channel. Such cores are not trained.
        number_format: of all cores, or its name.
        core_formats: `(name of a core, format)` pairs, or a mapping; they overrule `number_format`.

    Raises:
        FormatError: unknown formats, a core named twice, or formats beside `int8`.

    Example:
        >>> import torch, tensornet as tn
        >>> storage = Storage(number_format="int4", core_formats={"left": "int8"})
        >>> storage.format_of("matrix").name, storage.format_of("left").name
        ('int4', 'int8')
    """

    pivoted: bool = False
    int8: bool = False
    number_format: NumberFormat = _FLOAT
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
        if self.int8 and (parsed or self.number_format != _FLOAT):
            raise FormatError(
                "int8=True is the older encoding of all cores and takes no number formats beside it; use "
                "number_format='int8' in its place."
            )

    @property
    def plain(self) -> bool:
        """True if parameters are the cores themselves."""
        return not self.pivoted and not self.int8 and not self.own_dtypes

    @property
    def quantized(self) -> bool:
        """True if some cores are integers."""
        return self.int8 or any(each.is_integer for each in self._formats)

    @property
    def own_dtypes(self) -> bool:
        """True if some stored tensors have a dtype that is not the model's, and keep it."""
        return any(each != _FLOAT for each in self._formats)

    @property
    def _formats(self) -> tuple[NumberFormat, ...]:
        return self.number_format, *(each for _, each in self.core_formats)

    def format_of(self, name: str) -> NumberFormat:
        """Number format of one core."""
        return dict(self.core_formats).get(name, self.number_format)

    def has_own_dtype(self, name: str) -> bool:
        """Whether the stored tensor of that name, such as `scale_0`, has a dtype that is not the model's."""
        return self.format_of(name.partition("_")[2]) != _FLOAT

    def for_topology(self, topology: Topology) -> "Storage":
        """The encoding that cores of this topology have: not pivoted where no bond has a gauge to fix."""
        return replace(self, pivoted=self.pivoted and bool(gauge_of(topology)))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        data: dict[str, Any] = {"pivoted": self.pivoted, "int8": self.int8}
        if self.number_format != _FLOAT:
            data["number_format"] = self.number_format.name
        if self.core_formats:
            data["core_formats"] = {name: each.name for name, each in self.core_formats}
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Storage":
        """Inverse of `to_dict`; an empty mapping means plain.

        Raises:
            FormatError: unknown entries or formats, or values of another type.
        """
        if not isinstance(data, Mapping) or (unknown := sorted(map(str, data.keys() - set(_OPTIONS)))):
            got = f"the unknown entries {', '.join(unknown)}" if isinstance(data, Mapping) else repr(data)
            raise FormatError(f"A storage holds {', '.join(_OPTIONS)}; got {got}.")
        if any(type(data.get(name, False)) is not bool for name in _OPTIONS[:2]):
            raise FormatError(f"The storage options pivoted and int8 are true or false, got {dict(data)}.")
        formats = data.get("core_formats", {})
        names = [data.get("number_format", "float")]
        names += formats.values() if isinstance(formats, Mapping) else [None]
        if not all(isinstance(name, str) for name in names):
            raise FormatError(
                "In a storage number_format is the name of a format, and core_formats maps names of cores to "
                f"names of formats; got {dict(data)}."
            )
        return cls(**data)

    def num_params(self, topology: Topology) -> int:
        """Stored numbers: elements, scales, zero points and row orders, however they are packed.

        Example:
            >>> import tensornet as tn
            >>> Storage(number_format="int4").num_params(tn.topologies.dense(out_features=2, in_features=64))
            130
        """
        return sum(_numbers(topology, self))

    def num_bytes(self, topology: Topology, dtype: torch.dtype) -> int:
        """Bytes of all stored tensors for cores of this dtype."""
        tensors = layout(topology, self, dtype).values()
        return sum(math.prod(shape) * kind.itemsize for shape, kind in tensors)


#: The parameters are the cores.
PLAIN = Storage()


def storage_entry(storage: Storage) -> dict[str, Any]:
    """The part of a module's description that says how its cores are kept; nothing if they are plain."""
    return {} if storage.plain else {"storage": storage.to_dict()}


def layout(
    topology: Topology, storage: Storage, dtype: torch.dtype
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name, shape and dtype of every tensor that is stored for a topology.

    Raises:
        FormatError: a number format for a core that the topology does not have.
    """
    if unknown := sorted(dict(storage.core_formats).keys() - set(topology.core_names)):
        raise FormatError(
            f"The storage has number formats for cores {', '.join(unknown)}; the topology "
            f"{topology.family!r} has {', '.join(topology.core_names)}."
        )
    found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for name, kept, order in _kept_shapes(topology, storage):
        number_format = storage.format_of(name)
        if order is not None:
            found[f"order_{name}"] = ((order,), torch.int32)
        if number_format.bits is not None:
            rows, columns = kept
            groups = number_format.groups(columns)
            found[f"core_{name}"] = ((rows, packed_bytes(columns, number_format.bits)), torch.uint8)
            found[f"scale_{name}"] = ((rows, groups), number_format.scale_dtype)
            if number_format.zero_point:
                found[f"zero_{name}"] = ((rows, packed_bytes(groups, number_format.bits)), torch.uint8)
            continue
        found[f"core_{name}"] = (kept, torch.int8 if storage.int8 else number_format.dtype or dtype)
        if storage.int8:
            found[f"scale_{name}"] = (_scale_shape(kept), dtype)
    return found


def _kept_shapes(topology: Topology, storage: Storage) -> Iterator[tuple[str, tuple[int, ...], int | None]]:
    """Name of every core, its shape before packing, and the length of its row order if it is pivoted."""
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


def _numbers(topology: Topology, storage: Storage) -> Iterator[int]:
    """Count the stored numbers of every core."""
    for name, kept, order in _kept_shapes(topology, storage):
        number_format = storage.format_of(name)
        yield math.prod(kept) + (order or 0)
        if storage.int8:
            yield math.prod(_scale_shape(kept))
        elif number_format.is_integer:
            yield kept[0] * number_format.groups(kept[1]) * (2 if number_format.zero_point else 1)


def gauge_of(topology: Topology) -> dict[str, str]:
    """Bonds whose gauge the family fixes, by the core that holds the identity.

    Raises:
        TopologyError: the family is not registered.
    """
    return topology_family(topology.family).gauge_bonds(topology)


@torch.no_grad()
@outside_autocast
def encode(
    topology: Topology, storage: Storage, cores: Sequence[Tensor], weighting: Weighting | None = None
) -> dict[str, Tensor]:
    """Stored tensors for cores, named and shaped as `layout` says, floating cores in the dtype of the cores.

    Args:
        topology: of the network.
        storage: how its cores are kept.
        cores: in the order of the topology.
        weighting: sensitivity of the loss to errors of the matrix, with which cores are rounded to integers.
    """
    kept: dict[str, Tensor] = {}
    tensors = _pivot(topology, cores, kept) if storage.pivoted else list(cores)
    named = dict(zip(topology.core_names, tensors, strict=True))
    if any(storage.format_of(name).is_integer for name in named):
        kept |= _rounded(topology, storage, named, kept, weighting or Weighting())
        return kept
    for name, tensor in named.items():
        if storage.int8:
            kept[f"core_{name}"], kept[f"scale_{name}"] = quantize(tensor)
        else:
            kept[f"core_{name}"] = _as_stored(tensor, storage.format_of(name))
    return kept


def _as_stored(tensor: Tensor, number_format: NumberFormat) -> Tensor:
    return tensor if number_format.dtype is None else tensor.to(number_format.dtype)


def _rounded(
    topology: Topology,
    storage: Storage,
    tensors: Mapping[str, Tensor],
    orders: Mapping[str, Tensor],
    weighting: Weighting,
) -> dict[str, Tensor]:
    """Round the integer cores with the rule of the family, and pack them."""
    formats = {name: storage.format_of(name) for name in tensors if storage.format_of(name).is_integer}
    own = next(iter(tensors.values())).dtype
    dtype = torch.float64 if own == torch.float64 else torch.float32
    views = {name: kept for name, kept, _ in _kept_shapes(topology, storage)}
    work = {name: tensor.to(dtype).reshape(views[name]) for name, tensor in tensors.items()}
    axes = gauge_axes(topology, storage)

    def assemble(found: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        return tuple(
            _whole(topology, name, found[name], orders.get(f"order_{name}"), axes.get(name))
            for name in topology.core_names
        )

    pivots = {name: orders[f"order_{name}"] for name in tensors if f"order_{name}" in orders}
    stored = StoredCores(topology, work, formats, pivots, assemble)
    done = topology_family(topology.family).round_cores(stored, weighting)
    kept: dict[str, Tensor] = {}
    for name in tensors:
        if name in formats:
            kept |= _packed(name, done.codes[name])
        else:
            value = done.tensors.get(name, work[name]).to(own)
            kept[f"core_{name}"] = _as_stored(value, storage.format_of(name)).contiguous()
    return kept


def _packed(name: str, rounded: RoundedWeight) -> dict[str, Tensor]:
    """Stored tensors of a core of integers."""
    bits = rounded.number_format.bits
    assert bits is not None
    codes = pack(rounded.codes, bits)
    found = {f"core_{name}": _signed(codes, bits), f"scale_{name}": rounded.scales}
    if rounded.zeros is not None:
        found[f"zero_{name}"] = pack(rounded.zeros, bits)
    return found


def _signed(codes: Tensor, bits: int) -> Tensor:
    """Codes of 8 bits as signed integers around their center, the layout of torch's kernels; and back."""
    return codes ^ 128 if bits == 8 else codes


def gauge_axes(topology: Topology, storage: Storage) -> dict[str, int]:
    """Axis of every core on which it holds an identity, by name; empty if cores are not pivoted."""
    gauge = gauge_of(topology) if storage.pivoted else {}
    return {x.name: x.labels.index(gauge[x.name]) for x in topology.cores if x.name in gauge}


def decode(
    topology: Topology,
    storage: Storage,
    kept: Mapping[str, Tensor],
    axes: Mapping[str, int] | None = None,
    dtype: torch.dtype | None = None,
    skip: Collection[str] = (),
) -> tuple[Tensor, ...]:
    """The cores again, differentiable by every stored floating tensor.

    Args:
        topology: of the network.
        storage: how its cores are kept.
        kept: stored tensors.
        axes: `gauge_axes(topology, storage)`, for callers that decode often.
        dtype: of the cores; that of the floating ones if absent, or float32 where all are integers.
        skip: names of cores that are not needed; empty tensors take their places.
    """
    axes = gauge_axes(topology, storage) if axes is None else axes
    dtype = stored_dtype(topology, storage, kept) if dtype is None else dtype
    nothing = torch.empty(0)
    return tuple(
        nothing if name in skip else _decoded(topology, storage, kept, name, axes, dtype)
        for name in topology.core_names
    )


def _decoded(
    topology: Topology,
    storage: Storage,
    kept: Mapping[str, Tensor],
    name: str,
    axes: Mapping[str, int],
    dtype: torch.dtype,
) -> Tensor:
    """One core again."""
    core, order = kept[f"core_{name}"], kept.get(f"order_{name}")
    number_format = storage.format_of(name)
    if storage.int8:
        scale = kept[f"scale_{name}"]
        core = core.to(scale.dtype) * scale
    elif number_format.is_integer:
        bond = None if order is None else topology.core_shapes[name][axes[name]]
        columns = matrix_view(topology, name)[1] if bond is None else bond
        core = unpacked(number_format, kept, name, columns, dtype)
    elif number_format.dtype is not None:
        core = core.to(dtype)
    return _whole(topology, name, core, order, axes.get(name))


def row_cores(topology: Topology, storage: Storage) -> tuple[str, ...]:
    """Integer cores whose stored rows are the indices of their out-legs: a lookup unpacks rows alone."""
    gauge = gauge_of(topology) if storage.pivoted else {}
    found = []
    for spec in topology.cores:
        shape = topology.core_shapes[spec.name]
        legs = [n for n, label in zip(shape, spec.labels, strict=True) if label in topology.out_labels]
        rows = matrix_view(topology, spec.name)[0]
        integers = storage.format_of(spec.name).is_integer and spec.name not in gauge
        first = len(legs) > 0 and math.prod(shape[: _last_leg(topology, spec.labels) + 1]) == rows
        if integers and first and math.prod(legs) == rows:
            found.append(spec.name)
    return tuple(found)


def _last_leg(topology: Topology, labels: Sequence[str]) -> int:
    return max(axis for axis, label in enumerate(labels) if label in topology.out_labels)


def stored_dtype(topology: Topology, storage: Storage, kept: Mapping[str, Tensor]) -> torch.dtype:
    """Dtype of the cores that are stored in the model's own, float32 if there are none."""
    for name in topology.core_names:
        if storage.format_of(name) == _FLOAT:
            return kept[f"scale_{name}" if storage.int8 else f"core_{name}"].dtype
    return torch.float32


def unpacked(
    number_format: NumberFormat,
    kept: Mapping[str, Tensor],
    name: str,
    columns: int,
    dtype: torch.dtype,
    rows: Tensor | None = None,
) -> Tensor:
    """Values of an integer core as a matrix, or of some of its rows.

    Args:
        number_format: of the core.
        kept: stored tensors.
        name: of the core.
        columns: of its matrix view.
        dtype: of the values.
        rows: indices of the rows, shape `(n,)`; all if absent.
    """
    bits = number_format.bits
    assert bits is not None
    parts = [kept.get(f"{part}_{name}") for part in ("core", "scale", "zero")]
    codes, scales, zeros = (x if x is None or rows is None else x.index_select(0, rows) for x in parts)
    assert codes is not None
    assert scales is not None
    if zeros is not None:
        zeros = unpack(zeros, bits, scales.shape[-1])
    return dequantize(_signed(unpack(codes, bits, columns), bits), scales, zeros, number_format, dtype)


def _whole(topology: Topology, name: str, core: Tensor, order: Tensor | None, axis: int | None) -> Tensor:
    """Core in its shape, with its identity rows where they are left out."""
    shape = topology.core_shapes[name]
    if order is not None:
        assert axis is not None
        identity = torch.eye(core.shape[1], dtype=core.dtype, device=core.device)
        core = torch.cat((identity, core)).index_select(0, order)
        last = (*shape[:axis], *shape[axis + 1 :], shape[axis])
        core = core.reshape(last).movedim(-1, axis)
    return core.reshape(shape)


def empty(
    topology: Topology, storage: Storage, *, device: torch.device | str | None, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """Stored tensors without content."""
    tensors = layout(topology, storage, dtype or torch.get_default_dtype())
    return {name: torch.empty(shape, dtype=kind, device=device) for name, (shape, kind) in tensors.items()}


def hold(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Register a stored tensor: in the model's dtype as a parameter, all others as a persistent buffer.

    Integers among the parameters would break what trains, averages or shards all parameters alike, such as
    `requires_grad_(True)`, `AveragedModel` and FSDP. Scales in 16 bits are too coarse for the steps of an
    optimizer, and transformers takes the dtype of the first parameter for that of the model; see
    `NetworkModule.train_scales`. A parameter is registered itself, so that it is shared.
    """
    storage = getattr(module, "storage", None)
    own = isinstance(storage, Storage) and storage.has_own_dtype(name)
    if isinstance(tensor, nn.Parameter) or (tensor.is_floating_point() and not own):
        shared = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)
        module._buffers.pop(name, None)
        module.register_parameter(name, shared)
    else:
        module._parameters.pop(name, None)
        module.register_buffer(name, tensor)


def quantize(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest eight-bit integers and scales, `tensor ~ integers * scales`, at most half a scale off."""
    axis = _long_axis(tensor.shape)
    if tensor.numel() == 0:
        return tensor.to(torch.int8), tensor.new_zeros(_scale_shape(tensor.shape))
    scale = (tensor.abs().amax(axis, keepdim=True).float() / _INT8_MAX).to(tensor.dtype)
    divisor = torch.where(scale > 0, scale, torch.ones_like(scale)).float()
    integers = (tensor.float() / divisor).round().clamp(-_INT8_MAX, _INT8_MAX)
    return integers.to(torch.int8), scale


def _long_axis(shape: Sequence[int]) -> int:
    return max(range(len(shape)), key=lambda axis: shape[axis])


def _scale_shape(shape: Sequence[int]) -> tuple[int, ...]:
    axis = _long_axis(shape)
    return tuple(1 if k == axis else size for k, size in enumerate(shape))


def _pivot(topology: Topology, cores: Sequence[Tensor], kept: dict[str, Tensor]) -> list[Tensor]:
    """Cores with the identity rows left out; the orders go into `kept`."""
    gauge = gauge_of(topology)
    work = [core.double() for core in cores]
    for index, spec in enumerate(topology.cores):
        label = gauge.get(spec.name)
        if label is None:
            continue
        rows = work[index].movedim(spec.labels.index(label), -1)
        q, r = torch.linalg.qr(rows.reshape(-1, rows.shape[-1]))
        order, pivots = _choose_rows(q)
        top, rest = q[order[:pivots]], q[order[pivots:]]
        # rest @ top^-1: bounded entries, since pivoted QR chose rows that span the others well
        work[index] = torch.linalg.solve(top.T, rest.T).T
        position = torch.empty_like(order)
        position[order] = torch.arange(len(order), device=order.device)
        kept[f"order_{spec.name}"] = position.to(torch.int32)
        # What is left of this core goes into the other one with this bond, which comes later.
        other = next(k for k in range(index + 1, len(work)) if label in topology.cores[k].labels)
        axis = topology.cores[other].labels.index(label)
        work[other] = torch.tensordot(top @ r, work[other], ([1], [axis])).movedim(0, axis)
    return [new.to(old.dtype).contiguous() for new, old in zip(work, cores, strict=True)]


def _choose_rows(basis: Tensor) -> tuple[Tensor, int]:
    """All row numbers, those of `rank` well-conditioned rows first, and the rank."""
    import scipy.linalg  # LAPACK's pivoted QR, which torch does not offer

    rank = basis.shape[1]
    pivots = scipy.linalg.qr(basis.T.cpu().numpy(), mode="r", pivoting=True)[1]
    chosen = torch.from_numpy(pivots[:rank]).long()
    others = torch.ones(basis.shape[0], dtype=torch.bool, device="cpu")
    others[chosen] = False
    return torch.cat([chosen, others.nonzero().squeeze(1)]).to(basis.device), rank
