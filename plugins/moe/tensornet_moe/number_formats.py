"""Number formats of the cores of experts: rounding to nearest with searched scales, packing, unpacking."""

from collections.abc import Mapping

import torch
from torch import Tensor

from tensornet.errors import FormatError
from tensornet.nn.encoding import Storage, packed_codes, unpacked
from tensornet.nn.storage import layout
from tensornet.quantization import NumberFormat, pack, round_weight
from tensornet.topologies.structure import matrix_view
from tensornet.topology import Topology


def check_storage(storage: Storage, topology: Topology) -> None:
    """Raise FormatError unless a storage gives number formats to cores of this topology, and nothing else.

    Raises:
        FormatError: gauges, or formats for cores that are not there.
    """
    if not isinstance(storage, Storage) or storage.pivoted:
        raise FormatError(
            f"Cores of experts have number formats alone, got {storage!r}; write "
            "Storage(number_format='int8') or the name of a format."
        )
    layout(topology, storage, torch.float32)


def stored_dtypes(number_format: NumberFormat) -> dict[str, torch.dtype]:
    """Return the dtypes of the stored parts of a core in this format; empty for the model's own.

    Example:
        >>> from tensornet.quantization import NumberFormat
        >>> stored_dtypes(NumberFormat.parse("int4"))
        {'core': torch.uint8, 'scale': torch.bfloat16}
    """
    if number_format.bits is None:
        return {} if number_format.dtype is None else {"core": number_format.dtype}
    found = {"core": torch.uint8, "scale": number_format.scale_dtype}
    return found | ({"zero": torch.uint8} if number_format.zero_point else {})


def encode_core(
    number_format: NumberFormat, topology: Topology, name: str, core: Tensor
) -> dict[str, Tensor]:
    """Store a core, or a stack of them, in a number format.

    Args:
        number_format: of the elements.
        topology: in which the core has its shape.
        name: of the core.
        core: shape `(..., *shape)`; rounded to nearest where it is no point of the format yet.

    Returns:
        Stored tensors by part: `core`, and `scale` and `zero` of integers.
    """
    if number_format.bits is None:
        return {"core": core if number_format.dtype is None else core.to(number_format.dtype)}
    shape = topology.core_shapes[name]
    lead = core.shape[: core.ndim - len(shape)]
    rows, columns = matrix_view(topology, name)
    if core.is_meta:
        kinds = layout(topology, Storage(number_format=number_format), torch.float32)
        parts = {key.partition("_")[0]: x for key, x in kinds.items() if key.partition("_")[2] == name}
        return {
            part: torch.empty((*lead, *size), dtype=kind, device="meta")
            for part, (size, kind) in parts.items()
        }
    rounded = round_weight(core.reshape(*lead, rows, columns), number_format)
    found = {"core": packed_codes(rounded.codes, number_format.bits), "scale": rounded.scales}
    if rounded.zeros is not None:
        found["zero"] = pack(rounded.zeros, number_format.bits)
    return found


def decode_core(
    number_format: NumberFormat,
    topology: Topology,
    name: str,
    kept: Mapping[str, Tensor],
    dtype: torch.dtype,
) -> Tensor:
    """Restore a core, or a stack of them, from its stored parts; arguments and names as for `encode_core`."""
    core = kept["core"]
    if number_format.bits is None:
        return core if number_format.dtype is None else core.to(dtype)
    named = {f"{part}_": tensor for part, tensor in kept.items()}
    matrix = unpacked(number_format, named, "", matrix_view(topology, name)[1], dtype)
    return matrix.reshape(*core.shape[:-2], *topology.core_shapes[name])
