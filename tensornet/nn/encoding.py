"""Encodings of the cores of a layer: as they are, with their gauge fixed, in eight bits.

**Pivoted.** An operator does not determine the cores of its network: `G` and its inverse can be inserted at
any bond of size `d` between two cores, so `d^2` of their numbers say nothing about the operator. Choosing `G`
such that `d` rows of a core's matrix `(all else, bond)` become the identity leaves those rows out, without
any change of the operator. The family says at which bonds (`TopologyFamily.gauge_bonds`). A plain low rank of
`r` then takes `r (out + in - r)` numbers instead of `r (out + in)`.

**Int8.** Eight-bit integers and one scale for each channel: all indices of a core but the longest.

Reference:
    Zhao et al. 2025, "Pivoting factorization" (low rank); Oseledets, Tyrtyshnikov 2010, "TT-cross
    approximation" (pivots in chains); Dettmers et al. 2022, "LLM.int8()" (per-channel scales).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tensornet.topologies import topology_family
from tensornet.topology import Topology

_INT8_MAX = 127


@dataclass(frozen=True)
class Storage:
    """Form in which cores are kept.

    Args:
        pivoted: fix the gauge of bonds by an identity block in one of their cores.
        int8: keep eight-bit integers with scales. Such cores are not trained.
    """

    pivoted: bool = False
    int8: bool = False

    @property
    def plain(self) -> bool:
        """True if parameters are the cores themselves."""
        return not self.pivoted and not self.int8

    def for_topology(self, topology: Topology) -> "Storage":
        """The encoding that cores of this topology have: not pivoted where no bond has a gauge to fix."""
        return replace(self, pivoted=self.pivoted and bool(gauge_of(topology)))

    def to_dict(self) -> dict[str, bool]:
        """JSON-ready form."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Storage":
        """Inverse of `to_dict`; an empty mapping means plain.

        Raises:
            TypeError: unknown entries, or values that are not booleans.
        """
        if any(type(value) is not bool for value in data.values()):
            raise TypeError(f"storage options must be true or false, got {dict(data)}")
        return cls(**data)

    def num_params(self, topology: Topology) -> int:
        """Stored numbers: elements, scales and row orders."""
        return sum(math.prod(shape) for shape, _ in layout(topology, self, torch.float32).values())

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
    """Name, shape and dtype of every tensor that is stored for a topology."""
    gauge = gauge_of(topology) if storage.pivoted else {}
    found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for name, shape in topology.core_shapes.items():
        kept: tuple[int, ...] = shape
        if name in gauge:
            bond = topology.size_of[gauge[name]]
            rows = math.prod(shape) // bond
            kept = (rows - bond, bond)
            found[f"order_{name}"] = ((rows,), torch.int32)
        found[f"core_{name}"] = (kept, torch.int8 if storage.int8 else dtype)
        if storage.int8:
            found[f"scale_{name}"] = (_scale_shape(kept), dtype)
    return found


def gauge_of(topology: Topology) -> dict[str, str]:
    """Bonds whose gauge the family fixes, by the core that holds the identity.

    Raises:
        TopologyError: the family is not registered.
    """
    return topology_family(topology.family).gauge_bonds(topology)


@torch.no_grad()
def encode(topology: Topology, storage: Storage, cores: Sequence[Tensor]) -> dict[str, Tensor]:
    """Stored tensors for cores, named and shaped as `layout` says, in the dtype of the cores."""
    kept: dict[str, Tensor] = {}
    tensors = _pivot(topology, cores, kept) if storage.pivoted else list(cores)
    for name, tensor in zip(topology.core_names, tensors, strict=True):
        if storage.int8:
            kept[f"core_{name}"], kept[f"scale_{name}"] = quantize(tensor)
        else:
            kept[f"core_{name}"] = tensor
    return kept


def gauge_axes(topology: Topology, storage: Storage) -> dict[str, int]:
    """Axis of every core on which it holds an identity, by name; empty if cores are not pivoted."""
    gauge = gauge_of(topology) if storage.pivoted else {}
    return {x.name: x.labels.index(gauge[x.name]) for x in topology.cores if x.name in gauge}


def decode(
    topology: Topology,
    storage: Storage,
    kept: Mapping[str, Tensor],
    axes: Mapping[str, int] | None = None,
) -> tuple[Tensor, ...]:
    """The cores again, differentiable by every stored floating tensor.

    Args:
        topology: of the network.
        storage: how its cores are kept.
        kept: stored tensors.
        axes: `gauge_axes(topology, storage)`, for callers that decode often.
    """
    axes = gauge_axes(topology, storage) if axes is None else axes
    cores = []
    for spec in topology.cores:
        shape = topology.core_shapes[spec.name]
        core = kept[f"core_{spec.name}"]
        if storage.int8:
            scale = kept[f"scale_{spec.name}"]
            core = core.to(scale.dtype) * scale
        order = kept.get(f"order_{spec.name}")
        if order is not None:
            identity = torch.eye(core.shape[1], dtype=core.dtype, device=core.device)
            core = torch.cat((identity, core)).index_select(0, order)
            axis = axes[spec.name]
            last = (*shape[:axis], *shape[axis + 1 :], shape[axis])
            core = core.reshape(last).movedim(-1, axis)
        cores.append(core.reshape(shape))
    return tuple(cores)


def empty(
    topology: Topology, storage: Storage, *, device: torch.device | str | None, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """Stored tensors without content."""
    tensors = layout(topology, storage, dtype or torch.get_default_dtype())
    return {name: torch.empty(shape, dtype=kind, device=device) for name, (shape, kind) in tensors.items()}


def hold(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Register a stored tensor: floating ones as a parameter, integers as a persistent buffer.

    Integers among the parameters would break what trains, averages or shards all parameters alike, such as
    `requires_grad_(True)`, `AveragedModel` and FSDP. A parameter is registered itself, so that it is shared.
    """
    if tensor.is_floating_point():
        shared = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)
        module.register_parameter(name, shared)
    else:
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
