"""Description of an encoding of cores, and of the tensors it stores; see `tensornet.nn.encoding`."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from tensornet.errors import FormatError
from tensornet.quantization import NumberFormat, packed_bytes
from tensornet.topologies import topology_family
from tensornet.topologies.structure import matrix_view
from tensornet.topology import Topology

#: The model's own dtype.
FLOAT = NumberFormat()
_OPTIONS = ("pivoted", "number_format", "core_formats")


@dataclass(frozen=True)
class Storage:
    """Encoding of the cores of a layer: number formats and pivoting.

    Args:
        pivoted: fix the gauge of bonds by an identity block in one of their cores.
        number_format: of all cores, or its name.
        core_formats: `(name of a core, format)` pairs, or a mapping; they overrule `number_format`.

    Raises:
        FormatError: unknown formats, or a core named twice.

    Example:
        >>> storage = Storage(number_format="int4", core_formats={"left": "int8"})
        >>> storage.format_of("matrix").name, storage.format_of("left").name
        ('int4', 'int8')
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
        """True if parameters are the cores themselves."""
        return not self.pivoted and not self.own_dtypes

    @property
    def quantized(self) -> bool:
        """True if some cores are integers."""
        return any(each.is_integer for each in self._formats)

    @property
    def own_dtypes(self) -> bool:
        """True if some stored tensors have a dtype that is not the model's, and keep it."""
        return any(each != FLOAT for each in self._formats)

    @property
    def _formats(self) -> tuple[NumberFormat, ...]:
        return self.number_format, *(each for _, each in self.core_formats)

    def format_of(self, name: str) -> NumberFormat:
        """Look up the number format of one core."""
        return dict(self.core_formats).get(name, self.number_format)

    def has_own_dtype(self, name: str) -> bool:
        """Return True if a stored tensor, such as `scale_0`, keeps a dtype that is not the model's."""
        return self.format_of(name.partition("_")[2]) != FLOAT

    def for_topology(self, topology: Topology) -> "Storage":
        """Adapt the encoding to a topology: not pivoted if no bond has a gauge to fix."""
        return replace(self, pivoted=self.pivoted and bool(gauge_of(topology)))

    def to_dict(self) -> dict[str, Any]:
        """Convert to a JSON-ready form."""
        data: dict[str, Any] = {"pivoted": self.pivoted}
        if self.number_format != FLOAT:
            data["number_format"] = self.number_format.name
        if self.core_formats:
            data["core_formats"] = {name: each.name for name, each in self.core_formats}
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Storage":
        """Restore a storage from `to_dict`; an empty mapping means plain.

        Raises:
            FormatError: unknown entries or formats, or values of another type.
        """
        if not isinstance(data, Mapping) or (unknown := sorted(map(str, data.keys() - set(_OPTIONS)))):
            got = f"the unknown entries {', '.join(unknown)}" if isinstance(data, Mapping) else repr(data)
            raise FormatError(f"A storage holds {', '.join(_OPTIONS)}; got {got}.")
        if type(data.get("pivoted", False)) is not bool:
            raise FormatError(f"The storage option pivoted is true or false, got {dict(data)}.")
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
        """Count stored numbers: elements, scales, zero points and row orders, however packed.

        Example:
            >>> Storage(number_format="int4").num_params(tn.topologies.dense(out_features=2, in_features=64))
            130
        """
        return sum(count for _, count in _numbers(topology, self))

    def num_bytes(self, topology: Topology, dtype: torch.dtype) -> int:
        """Count the bytes of all stored tensors for cores of this dtype."""
        tensors = layout(topology, self, dtype).values()
        return sum(math.prod(shape) * kind.itemsize for shape, kind in tensors)

    def core_size(self, topology: Topology, name: str, dtype: torch.dtype) -> tuple[int, int]:
        """Count the stored numbers and the bytes of one core, scales and zero points included.

        Example:
            >>> topology = tn.topologies.low_rank(out_features=6, in_features=64, rank=2)
            >>> Storage(number_format="int4").core_size(topology, "1", torch.float32)
            (130, 68)
        """
        numbers = sum(count for core, count in _numbers(topology, self) if core == name)
        tensors = layout(topology, self, dtype).items()
        mine = [found for part, found in tensors if part.partition("_")[2] == name]
        return numbers, sum(math.prod(shape) * kind.itemsize for shape, kind in mine)


#: The parameters are the cores.
PLAIN = Storage()


def storage_entry(storage: Storage) -> dict[str, Any]:
    """Describe the encoding of cores for a module's description; empty for plain storage."""
    return {} if storage.plain else {"storage": storage.to_dict()}


def layout(
    topology: Topology, storage: Storage, dtype: torch.dtype
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """List name, shape and dtype of every tensor that is stored for a topology.

    Raises:
        FormatError: a number format for a core that the topology does not have.
    """
    if unknown := sorted(dict(storage.core_formats).keys() - set(topology.core_names)):
        raise FormatError(
            f"The storage has number formats for cores {', '.join(unknown)}; the topology "
            f"{topology.family!r} has {', '.join(topology.core_names)}."
        )
    found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for name, kept, order in kept_shapes(topology, storage):
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
        found[f"core_{name}"] = (kept, number_format.dtype or dtype)
    return found


def kept_shapes(topology: Topology, storage: Storage) -> Iterator[tuple[str, tuple[int, ...], int | None]]:
    """List each core's name, shape before packing, and length of its row order if pivoted."""
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


def _numbers(topology: Topology, storage: Storage) -> Iterator[tuple[str, int]]:
    """Count the stored numbers of every core, by its name."""
    for name, kept, order in kept_shapes(topology, storage):
        number_format = storage.format_of(name)
        count = math.prod(kept) + (order or 0)
        if number_format.is_integer:
            count += kept[0] * number_format.groups(kept[1]) * (2 if number_format.zero_point else 1)
        yield name, count


def gauge_of(topology: Topology) -> dict[str, str]:
    """Map each core with an identity block to the bond whose gauge the family fixes.

    Raises:
        TopologyError: the family is not registered.
    """
    return topology_family(topology.family).gauge_bonds(topology)
