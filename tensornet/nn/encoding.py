"""Encodings of the cores of a layer: plain, pivoted, or integer.

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

Reference:
    Zhao et al. 2025, "Pivoting factorization" (low rank); Oseledets, Tyrtyshnikov 2010, "TT-cross
    approximation" (pivots in chains).
"""

import math
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from tensornet._util import outside_autocast
from tensornet.linalg.weighted_svd import Weighting
from tensornet.nn.storage import (
    FLOAT,
    PLAIN,
    Storage,
    gauge_of,
    kept_shapes,
    layout,
    storage_entry,
)
from tensornet.quantization import NumberFormat, RoundedWeight, Rounding, pack, rounded_values, unpack
from tensornet.topologies import topology_family
from tensornet.topologies.rounded_cores import StoredCores
from tensornet.topologies.structure import matrix_view
from tensornet.topology import Topology

__all__ = [
    "PLAIN",
    "Storage",
    "decode",
    "empty",
    "encode",
    "gauge_axes",
    "gauge_of",
    "hold",
    "layout",
    "packed_codes",
    "row_cores",
    "storage_entry",
    "stored_core",
    "unpacked",
    "unpacked_codes",
]


@torch.no_grad()
@outside_autocast
def encode(
    topology: Topology,
    storage: Storage,
    cores: Sequence[Tensor],
    weighting: Weighting | None = None,
    rounding: Rounding = "two_sided",
) -> dict[str, Tensor]:
    """Encode cores as stored tensors, with the names and shapes of `layout`; floating cores keep their dtype.

    Args:
        topology: of the network.
        storage: how its cores are kept.
        cores: in the order of the topology.
        weighting: sensitivity of the loss to errors of the matrix, with which cores are rounded to integers.
        rounding: the most feedback of errors, see `tensornet.quantization.round_weight`.
    """
    kept: dict[str, Tensor] = {}
    tensors = _pivot(topology, cores, kept) if storage.pivoted else list(cores)
    named = dict(zip(topology.core_names, tensors, strict=True))
    if any(storage.format_of(name).is_integer for name in named):
        kept |= _rounded(topology, storage, named, kept, weighting or Weighting(), rounding)
        return kept
    for name, tensor in named.items():
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
    rounding: Rounding,
) -> dict[str, Tensor]:
    """Round the integer cores with the rule of the family, and pack them."""
    formats = {name: storage.format_of(name) for name in tensors if storage.format_of(name).is_integer}
    own = next(iter(tensors.values())).dtype
    dtype = torch.float64 if own == torch.float64 else torch.float32
    views = {name: kept for name, kept, _ in kept_shapes(topology, storage)}
    work = {name: tensor.to(dtype).reshape(views[name]) for name, tensor in tensors.items()}
    axes = gauge_axes(topology, storage)

    def assemble(found: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        return tuple(
            _whole(topology, name, found[name], orders.get(f"order_{name}"), axes.get(name))
            for name in topology.core_names
        )

    pivots = {name: orders[f"order_{name}"] for name in tensors if f"order_{name}" in orders}
    stored = StoredCores(topology, work, formats, pivots, assemble, rounding)
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
    """Pack a rounded core into its stored tensors."""
    bits = rounded.number_format.bits
    assert bits is not None
    found = {f"core_{name}": packed_codes(rounded.codes, bits), f"scale_{name}": rounded.scales}
    if rounded.zeros is not None:
        found[f"zero_{name}"] = pack(rounded.zeros, bits)
    return found


def stored_core(
    topology: Topology, storage: Storage, name: str, value: Tensor | RoundedWeight, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Build the stored tensors of one core, not pivoted, from its codes or its values.

    Args:
        topology: of the network.
        storage: how its cores are kept.
        name: of the core.
        value: codes of its matrix view, or values.
        dtype: of the model.
    """
    if isinstance(value, RoundedWeight):
        return _packed(name, value)
    core = value.to(dtype).reshape(topology.core_shapes[name])
    return {f"core_{name}": _as_stored(core, storage.format_of(name)).contiguous()}


def _signed(codes: Tensor, bits: int) -> Tensor:
    """Convert codes of 8 bits to signed integers around their center, as torch's kernels read, and back."""
    return codes ^ 128 if bits == 8 else codes


def gauge_axes(topology: Topology, storage: Storage) -> dict[str, int]:
    """Map each core with an identity block to its axis; empty if cores are not pivoted."""
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
    """Decode stored tensors to cores, differentiable by every stored floating tensor.

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
    """Decode one core."""
    core, order = kept[f"core_{name}"], kept.get(f"order_{name}")
    number_format = storage.format_of(name)
    if number_format.is_integer:
        bond = None if order is None else topology.core_shapes[name][axes[name]]
        columns = matrix_view(topology, name)[1] if bond is None else bond
        core = unpacked(number_format, kept, name, columns, dtype)
    elif number_format.dtype is not None:
        core = core.to(dtype)
    return _whole(topology, name, core, order, axes.get(name))


def row_cores(topology: Topology, storage: Storage) -> tuple[str, ...]:
    """List integer cores whose stored rows are out-leg indices, so that lookups unpack single rows."""
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
    """Return the dtype of cores stored in the model's dtype; float32 if there are none."""
    for name in topology.core_names:
        if storage.format_of(name) == FLOAT:
            return kept[f"core_{name}"].dtype
    return torch.float32


def unpacked(
    number_format: NumberFormat,
    kept: Mapping[str, Tensor],
    name: str,
    columns: int,
    dtype: torch.dtype,
    rows: Tensor | None = None,
) -> Tensor:
    """Unpack an integer core to values, all rows or some of them.

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
    if codes.is_floating_point():  # trained at the moment
        zeros = zeros if zeros is None else unpack(zeros, bits, scales.shape[-1])
        return rounded_values(codes, scales, zeros, number_format, dtype)
    return number_format.decode_packed(codes, scales, zeros, columns, dtype)


def unpacked_codes(core: Tensor, bits: int, columns: int) -> Tensor:
    """Unpack the codes of a stored integer core, `0` to `2**bits - 1`, shape `(rows, columns)`."""
    return _signed(unpack(core, bits, columns), bits)


def packed_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes as an integer core stores them: the inverse of `unpacked_codes`."""
    return _signed(pack(codes, bits), bits)


def _whole(topology: Topology, name: str, core: Tensor, order: Tensor | None, axis: int | None) -> Tensor:
    """Restore a core to its shape, with the identity rows that were omitted."""
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
    """Allocate stored tensors without initializing them."""
    tensors = layout(topology, storage, dtype or torch.get_default_dtype())
    return {name: torch.empty(shape, dtype=kind, device=device) for name, (shape, kind) in tensors.items()}


def hold(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Register a stored tensor: a parameter if it has the model's dtype, else a persistent buffer.

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


def _pivot(topology: Topology, cores: Sequence[Tensor], kept: dict[str, Tensor]) -> list[Tensor]:
    """Omit the identity rows of cores; the row orders go into `kept`."""
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
    """Order the rows, `rank` well-conditioned ones first; return the order and the rank."""
    import scipy.linalg  # LAPACK's pivoted QR, which torch does not offer

    rank = basis.shape[1]
    pivots = scipy.linalg.qr(basis.T.cpu().numpy(), mode="r", pivoting=True)[1]
    chosen = torch.from_numpy(pivots[:rank]).long()
    others = torch.ones(basis.shape[0], dtype=torch.bool, device="cpu")
    others[chosen] = False
    return torch.cat([chosen, others.nonzero().squeeze(1)]).to(basis.device), rank
