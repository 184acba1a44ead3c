"""Parts that all exporters share: the integers and low ranks of layers, and the report of an export."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from tensornet.errors import DestinationError, TargetError
from tensornet.io import check_place
from tensornet.network import TensorNetwork
from tensornet.nn.module import NetworkModule
from tensornet.nn.storage import PackedCore, decode
from tensornet.quantization import NumberFormat
from tensornet.quantization.formats import unpack
from tensornet_hf.report import compact_bytes

#: Suffix of the files of llama.cpp.
GGUF = ".gguf"
#: What becomes of layers that are not one matrix of integers: dense; or dense, but a low rank that is added
#: to integers becomes a LoRA adapter; or an error.
Networks = Literal["dense", "lora", "refuse"]
NETWORKS: tuple[Networks, ...] = get_args(Networks)
#: Kinds of layers to which LoRA adapters can be added.
_ADAPTED = ("linear", "conv1d")


def check_new_file(path: Path, *, force: bool) -> None:
    """Check that a file may be written, before any work is done.

    Raises:
        DestinationError: it exists and `force` is not set, or cannot be written.
    """
    if path.is_dir() or (path.exists() and not force):
        raise DestinationError(
            f"{path} exists already. Choose another name, or replace a file with force=True (--force)."
        )
    check_place("The model", path)


def renamed_entries(config: PreTrainedConfig) -> dict[str, Any]:
    """Collect entries of a configuration that other packages read and transformers 5 has renamed."""
    rope = getattr(config, "rope_parameters", None) or {}
    found = {"n_ctx": getattr(config, "n_positions", None), "rotary_pct": rope.get("partial_rotary_factor")}
    return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True)
class ExportReport:
    """Report of an export: what was packed, and what was written dense and why.

    Args:
        destination: the file or folder.
        packed: type of every tensor or layer that was packed, by its name in the destination.
        dense: reason for every compressed layer or tensor that was written dense, by name.
        num_bytes: size of the weight files, without the adapter.
        adapter: file or folder of the LoRA adapter; None if there is none.
        ranks: rank of every layer in the adapter, by name.
        adapter_bytes: size of its weight file.

    Example:
        >>> from pathlib import Path
        >>> from tensornet_hf.exporters.base import ExportReport
        >>> print(ExportReport(Path("out"), packed={"lm_head": "int8"}, dense={}, num_bytes=1000))
        1 tensors packed (1 int8), 0 written dense, 1.00 kB: out
    """

    destination: Path
    packed: dict[str, str]
    dense: dict[str, str]
    num_bytes: int
    adapter: Path | None = None
    ranks: dict[str, int] = field(default_factory=dict)
    adapter_bytes: int = 0

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {kind}" for kind, count in Counter(self.packed.values()).items())
        first = (
            f"{len(self.packed)} tensors packed{counts and f' ({counts})'}, {len(self.dense)} written dense, "
            f"{compact_bytes(self.num_bytes)}: {self.destination}"
        )
        dense = (f"dense: {name}: {why}" for name, why in self.dense.items())
        return "\n".join([first, *self.adapter_lines, *dense])

    @property
    def adapter_lines(self) -> tuple[str, ...]:
        """Say in one line what the adapter is; none without one."""
        if self.adapter is None:
            return ()
        least, most = min(self.ranks.values()), max(self.ranks.values())
        return (
            f"LoRA adapter of {len(self.ranks)} low ranks, {least} to {most}, "
            f"{compact_bytes(self.adapter_bytes)}, to load with the model: {self.adapter}",
        )


class IntegerMatrix(NamedTuple):
    """Weight of a layer, stored as one matrix of integers: `scale * (code - zero)` or `scale * level[code]`.

    Args:
        codes: uint8, shape `(out, in)`.
        scales: float32, shape `(out, groups)`.
        zeros: float32 of the same shape; may be half-integers.
        number_format: the format.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    number_format: NumberFormat

    @property
    def points(self) -> Tensor:
        """Multiples of the scales, `code - zero` or levels, float32, shape `(out, in)`."""
        if (levels := self.number_format.levels(self.scales)) is not None:
            return levels.values[self.codes.long()]
        return self.codes.float() - self.number_format.spread(self.zeros, self.codes.shape[1])

    @property
    def spread_scales(self) -> Tensor:
        """Scale of every element, float32, shape `(out, in)`."""
        return self.number_format.spread(self.scales, self.codes.shape[1]).contiguous()

    @property
    def values(self) -> Tensor:
        """The matrix, float32, shape `(out, in)`."""
        return self.points * self.spread_scales


class LowRank(NamedTuple):
    """Low rank that is added to the integers of a layer, whose weight is `integers + left @ right`.

    Args:
        left: float32, shape `(out, rank)`.
        right: float32, shape `(rank, in)`.
        integers: the right factor, if it is stored as integers.
    """

    left: Tensor
    right: Tensor
    integers: IntegerMatrix | None = None

    @property
    def rank(self) -> int:
        """Number of columns of the left factor."""
        return self.left.shape[1]


class SplitLayers(NamedTuple):
    """The tensor-network layers of a model, by what becomes of them in a file.

    Args:
        integers: integers of the layers that can be packed.
        low_ranks: low ranks that are added to some of these.
        dense: why the other layers are written dense.
    """

    integers: dict[str, IntegerMatrix]
    low_ranks: dict[str, LowRank]
    dense: dict[str, str]


def split_layers(model: nn.Module, networks: Networks) -> SplitLayers:
    """Separate the layers of a model into integers, low ranks that become adapters, and the others.

    Raises:
        TargetError: `networks` is "refuse", and a layer is not one matrix of integers.
        ValueError: an unknown value of `networks`.
    """
    if networks not in NETWORKS:
        raise ValueError(f"networks must be one of {', '.join(NETWORKS)}; got {networks!r}.")
    found = SplitLayers({}, {}, {})
    tied = tied_layers(model)
    for name, layer in model.named_modules(remove_duplicate=False):
        if not isinstance(layer, NetworkModule):
            continue
        parts = split_weight(layer)
        if isinstance(parts, str):
            stored = sum(tensor.nbytes for tensor in layer.stored.values())
            rows, columns = layer.topology.shape
            size = rows * columns * layer.dtype.itemsize
            found.dense[name] = f"{parts}; {compact_bytes(stored)} become {compact_bytes(size)}"
            continue
        integers, low_rank = parts
        if low_rank is None:
            found.integers[name] = integers
        elif layer.source not in _ADAPTED:
            found.dense[name] = f"integers plus a low rank; no adapter fits a layer of kind {layer.source!r}"
        elif name in tied:
            found.dense[name] = (
                f"integers plus a low rank; an adapter would not reach {tied[name]}, tied to it"
            )
        elif networks == "lora":
            found.integers[name], found.low_ranks[name] = integers, low_rank
        else:
            found.dense[name] = (
                f"integers plus a low rank of {low_rank.rank}, which networks='lora' writes as an adapter"
            )
    if found.dense and networks == "refuse":
        name, why = next(iter(found.dense.items()))
        raise TargetError(
            f"{len(found.dense)} layers cannot be stored as integers alone: {name} is {why}. Write them "
            "dense (networks='dense'), or plan for the target, such as CompressionConfig(formats='gguf')."
        )
    return found


def tied_layers(model: nn.Module) -> dict[str, str]:
    """Find the tensor-network layers that share their tensors, with the name of another one that does."""
    users: dict[int, list[str]] = {}
    for name, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, NetworkModule):
            users.setdefault(id(next(iter(layer.stored.values()))), []).append(name)
    return {
        name: next(other for other in names if other != name)
        for names in users.values()
        if len(names) > 1
        for name in names
    }


def split_weight(layer: NetworkModule) -> tuple[IntegerMatrix, LowRank | None] | str:
    """Return the integers of a layer and the low rank added to them, or in a few words why it has none.

    Example:
        >>> from tensornet_hf.exporters.base import split_weight
        >>> split_weight(tn.nn.MPOLinear(16, 16, max_bond=2))
        "a network of the family 'mpo', not one matrix"
    """
    topology = layer.topology
    legs = (*topology.out_labels, *topology.in_labels)
    matrices = [parts for parts, part in topology.parts if [core.labels for core in part.cores] == [legs]]
    if not matrices or topology.shape != topology.padded_shape:
        return f"a network of the family {topology.family!r}, not one matrix"
    (position,) = matrices[0]
    integers = _integers(layer, position)
    if isinstance(integers, str):
        return integers
    rest = [(positions, part) for positions, part in topology.parts if positions != matrices[0]]
    if not rest:
        return integers, None
    cores = decode(layer.stored_cores, torch.float32)
    rows, columns = topology.shape
    if [part.family for _, part in rest] == ["low_rank"]:
        left, right = rest[0][0]
        found = _integers(layer, right)
        return integers, LowRank(
            cores[left].reshape(rows, -1).float(),
            cores[right].reshape(-1, columns).float(),
            None if isinstance(found, str) else found,
        )
    # Any other network is a matrix, which may have a low rank.
    networks = [TensorNetwork(part, [cores[k].double() for k in positions]) for positions, part in rest]
    u, s, vh = torch.linalg.svd(torch.stack([x.to_matrix() for x in networks]).sum(0), full_matrices=False)
    rank = max(1, int((s > s[0] * max(topology.shape) * torch.finfo(torch.float32).eps).sum()))
    if rank * (rows + columns) >= rows * columns:
        return f"integers plus a network of rank {rank}, too high for an adapter"
    root = s[:rank].sqrt()
    return integers, LowRank((u[:, :rank] * root).float(), (root[:, None] * vh[:rank]).float())


def _integers(layer: NetworkModule, position: int) -> IntegerMatrix | str:
    """Return the integers of a core, or in a few words why it has none."""
    core, name = layer.stored_cores[position], layer.topology.core_names[position]
    number_format = layer.storage.format_of(name)
    bits = None if number_format.rate is not None else number_format.bits
    if not isinstance(core, PackedCore) or bits is None or core.axis is not None:
        return f"stored as {number_format.name}, not as integers"
    scales = core.scale_values.float()
    zeros = torch.full_like(scales, number_format.center)
    if "zeros" in core.names:
        zeros = unpack(core.zeros, bits, scales.shape[-1]).float()
    return IntegerMatrix(number_format.unpack(core.codes, core.columns), scales, zeros, number_format)
