"""Code that all exporters share: splitting layers into integers and low-rank parts, and the export report."""

from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from tensornet._util import compact_bytes
from tensornet.errors import DestinationError, TargetError
from tensornet.io import check_place
from tensornet.network import TensorNetwork
from tensornet.nn.module import NetworkModule
from tensornet.nn.storage import PackedCore, decode
from tensornet.quantization import NumberFormat
from tensornet_hf.quantizer import layer_descriptions

#: Suffix of files for llama.cpp.
GGUF = ".gguf"
#: How to write a layer that is not a single matrix of integers. With "lora", a layer of integers plus a
#: low-rank matrix becomes integers and a LoRA adapter, and others become dense. "refuse" raises an error.
Networks = Literal["dense", "lora", "refuse"]
NETWORKS: tuple[Networks, ...] = get_args(Networks)
#: Layer types to which LoRA adapters can be added (`NetworkModule.source`).
_ADAPTED = ("linear", "conv1d")


def check_new_file(path: Path, *, force: bool) -> None:
    """Check that a file may be written, before any work is done.

    Raises:
        DestinationError: the file exists and `force` is not set, or it cannot be written.
    """
    if path.is_dir() or (path.exists() and not force):
        raise DestinationError(
            f"{path} exists already. Choose another name, or replace the file with force=True."
        )
    check_place("The model", path)


def renamed_entries(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the entries that transformers 5 renamed or dropped, as other packages expect them."""
    rope = getattr(config, "rope_parameters", None) or {}
    found = {"n_ctx": getattr(config, "n_positions", None), "rotary_pct": rope.get("partial_rotary_factor")}
    found["num_experts"] = getattr(config, "num_experts", None)
    if config.model_type == "deepseek_v3":  # the only function that transformers computes
        found["scoring_func"] = "sigmoid"
    return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True)
class ExportReport:
    """Report of an export: which tensors were written as packed integers, and which were written dense.

    Args:
        destination: the file or folder that was written.
        packed: type of every packed tensor or layer by its name in the destination.
        dense: the reason for every compressed layer or tensor that was written dense, by name.
        num_bytes: size of the weight files in bytes, without the adapter.
        adapter: file or folder of the LoRA adapter; None if there is none.
        ranks: rank of every layer in the adapter, by name.
        adapter_bytes: size of the adapter's weight file in bytes.

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

    def to_dict(self) -> dict[str, Any]:
        """Return a dict for JSON."""
        adapter = None if self.adapter is None else str(self.adapter)
        return {**asdict(self), "destination": str(self.destination), "adapter": adapter}

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
        """A line that describes the LoRA adapter; empty if there is no adapter."""
        if self.adapter is None:
            return ()
        least, most = min(self.ranks.values()), max(self.ranks.values())
        return (
            f"LoRA adapter of {len(self.ranks)} low ranks, {least} to {most}, "
            f"{compact_bytes(self.adapter_bytes)}, to load with the model: {self.adapter}",
        )


@dataclass(frozen=True)
class IntegerMatrix:
    """Weight of a layer as integer codes, with the values `scale * point - minimum` (see `points`).

    The matrices are unpacked whenever they are read, so that only the layer itself takes memory.

    Args:
        core: the stored integers.
    """

    core: PackedCore

    @property
    def number_format(self) -> NumberFormat:
        """Number format of the codes."""
        return self.core.number_format

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the matrix, `(out, in)`."""
        return len(self.core.codes), self.core.columns

    @property
    def codes(self) -> Tensor:
        """Codes, uint8, shape `(out, in)`."""
        return self.number_format.unpack(self.core.codes, self.core.columns)

    @property
    def scales(self) -> Tensor:
        """Scales, float32, shape `(out, groups)`; a group is a part of a row."""
        return self.core.scale_values.float()

    @property
    def zeros(self) -> Tensor:
        """Codes of the value 0, float32, shape `(out, groups)`; may be half-integers; 0 with minima."""
        center = self.number_format.points.center
        return torch.full_like(self.core.scale_values, center, dtype=torch.float32)

    @property
    def minima(self) -> Tensor | None:
        """Minima, to subtract from scaled codes, float32, shape `(out, groups)`; None without them."""
        packed = self.core.tensors.get("zeros")
        return self.number_format.unpacked_minima(packed, self.core.scale_values)

    @property
    def points(self) -> Tensor:
        """Unscaled values: `code - zero`, or `level[code]` for level tables; float32, shape `(out, in)`."""
        points, divisor = self.number_format.points.values(self.codes)
        return points.float() / divisor

    @property
    def spread_scales(self) -> Tensor:
        """Scale of every element of the matrix, float32, shape `(out, in)`."""
        return self.number_format.spread(self.scales, self.core.columns).contiguous()

    @property
    def values(self) -> Tensor:
        """The matrix, float32, shape `(out, in)`."""
        return self.number_format.decode_packed(
            self.core.codes, self.scales, self.core.tensors.get("zeros"), self.core.columns
        )

    def rows(self, index: Tensor) -> "IntegerMatrix":
        """Return some rows of the matrix; `index` has shape `(n,)`."""
        core = self.core
        parts = {name: tensor.index_select(0, index.to(core.device)) for name, tensor in core.tensors.items()}
        return IntegerMatrix(PackedCore(core.number_format, (len(index), core.columns), core.columns, parts))


class LowRank(NamedTuple):
    """Low-rank part of a layer whose weight is the sum of a matrix of integers and `left @ right`.

    Args:
        left: float32, shape `(out, rank)`.
        right: float32, shape `(rank, in)`.
        integers: codes of the right factor if it is stored as integers, otherwise None.
    """

    left: Tensor
    right: Tensor
    integers: IntegerMatrix | None = None

    @property
    def rank(self) -> int:
        """Number of columns of the left factor."""
        return self.left.shape[1]


def refuse_mixtures(model: PreTrainedModel) -> None:
    """Raise TargetError if a model has mixtures of this library, which other runtimes cannot compute."""
    for name, spec in layer_descriptions(model).items():
        if not isinstance(model.get_submodule(name), NetworkModule):
            raise TargetError(
                f"{name} is a {spec['type']!r}, which no other runtime has. Convert a Llama, Mistral or Qwen "
                "3 by stock = tensornet_hf.stock_mixture(model) before it is compressed, then compress and "
                "export stock. Other models can only be saved: tensornet_hf.save(model, folder)."
            )


class SplitLayers(NamedTuple):
    """The tensor-network layers of a model by name, grouped by how an exporter writes them.

    Args:
        integers: integer matrices of the layers that can be packed.
        low_ranks: low-rank parts of some of these layers, to be written as adapters.
        dense: for each layer that is written dense, the reason.
    """

    integers: dict[str, IntegerMatrix]
    low_ranks: dict[str, LowRank]
    dense: dict[str, str]


def split_layers(model: nn.Module, networks: Networks) -> SplitLayers:
    """Split tensor-network layers into integers and low-rank parts, and list the layers to be written dense.

    Raises:
        TargetError: `networks` is "refuse", and a layer is not a single matrix of integers.
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
            found.dense[name] = f"integers plus a low rank; no adapter fits a layer of type {layer.source!r}"
        elif name in tied:
            found.dense[name] = (
                f"integers plus a low rank; an adapter would not apply to {tied[name]}, which is tied to it"
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
            "dense (networks='dense'), or compress the model with formats of the target, such as "
            "CompressionConfig(formats='gguf')."
        )
    return found


def tied_layers(model: nn.Module) -> dict[str, str]:
    """Map the name of each tied tensor-network layer to the name of another layer with the same tensors."""
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
    """Split a layer into integers and a low-rank part (or None), or return why this is impossible."""
    topology = layer.topology
    legs = (*topology.out_labels, *topology.in_labels)
    matrices = [parts for parts, part in topology.parts if [core.labels for core in part.cores] == [legs]]
    if not matrices or topology.shape != topology.padded_shape:
        return f"a network of the family {topology.family!r}, not one matrix"
    (position,) = matrices[0]
    integers = _integers(layer, position)
    if isinstance(integers, str):
        return integers
    others = [(positions, part) for positions, part in topology.parts if positions != matrices[0]]
    if not others:
        return integers, None
    cores = decode(layer.stored_cores, torch.float32)
    rows, columns = topology.shape
    if [part.family for _, part in others] == ["low_rank"]:
        left, right = others[0][0]
        found = _integers(layer, right)
        return integers, LowRank(
            cores[left].reshape(rows, -1).float(),
            cores[right].reshape(-1, columns).float(),
            None if isinstance(found, str) else found,
        )
    if cores[0].is_meta:
        return "integers plus a network, whose rank is not known before it is compressed"
    # For other networks, compute the sum of their matrices and check whether its rank is low.
    networks = [TensorNetwork(part, [cores[k].double() for k in positions]) for positions, part in others]
    u, s, vh = torch.linalg.svd(torch.stack([x.to_matrix() for x in networks]).sum(0), full_matrices=False)
    rank = max(1, int((s > s[0] * max(topology.shape) * torch.finfo(torch.float32).eps).sum()))
    if rank * (rows + columns) >= rows * columns:
        return f"integers plus a network of rank {rank}, too high for an adapter"
    root = s[:rank].sqrt()
    return integers, LowRank((u[:, :rank] * root).float(), (root[:, None] * vh[:rank]).float())


def _integers(layer: NetworkModule, position: int) -> IntegerMatrix | str:
    """Return the integers of a core, or the reason why it is not a matrix of integers."""
    core, name = layer.stored_cores[position], layer.topology.core_names[position]
    number_format = layer.storage.format_of(name)
    if not isinstance(core, PackedCore) or number_format.bits is None or core.axis is not None:
        return f"stored as {number_format.name}, not as integers"
    return IntegerMatrix(core)
