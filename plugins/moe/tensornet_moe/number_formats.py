"""Number formats of the cores of experts: rounding to nearest with searched scales."""

import torch
from torch import Tensor

from tensornet.errors import FormatError
from tensornet.nn.storage import FLOAT, PackedCore, Storage, layout, stored_core
from tensornet.quantization import NumberFormat, round_weight
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


def encode_core(
    number_format: NumberFormat, topology: Topology, name: str, core: Tensor
) -> Tensor | PackedCore:
    """Store a core, or a stack of them, in a number format.

    Args:
        number_format: of the elements.
        topology: in which the core has its shape.
        name: of the core.
        core: shape `(..., *shape)`; rounded to nearest where it is no point of the format yet.
    """
    if number_format == FLOAT:
        return core
    shape, storage = topology.core_shapes[name], Storage(number_format=number_format)
    lead, (rows, columns) = core.shape[: core.ndim - len(shape)], matrix_view(topology, name)
    if core.is_meta:
        tensors = {
            part: torch.empty((*lead, *size), dtype=kind, device="meta")
            for key, (size, kind) in layout(topology, storage, core.dtype).items()
            for owner, _, part in [key.partition(".")]
            if owner == f"core_{name}"
        }
        return PackedCore(number_format, shape, columns, tensors)
    if number_format.bits is None:
        return stored_core(topology, storage, name, core, core.dtype)
    rounded = round_weight(core.reshape(*lead, rows, columns), number_format)
    return stored_core(topology, storage, name, rounded, core.dtype)
