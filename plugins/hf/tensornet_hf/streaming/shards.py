"""From cores and untouched tensors to the files of the new folder: names, shards, index, configuration."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from tensornet.compression import CompressionConfig
from tensornet.compression.apply import set_submodule
from tensornet.io.safetensors_files import FLOATS, Slice
from tensornet.nn.expansion import settle
from tensornet.nn.linear import TensorNetworkLinear
from tensornet.nn.module import NetworkModule
from tensornet.nn.serialization import build_module
from tensornet.streaming.worker import Piece
from tensornet_hf.checkpoint.describe import describe
from tensornet_hf.checkpoint.guards import GUARD_SHAPE, replaced_names
from tensornet_hf.checkpoint.headers import WEIGHTS
from tensornet_hf.checkpoint.quantization_config import TensorNetworkConfig
from tensornet_hf.streaming.source import total_bytes


@dataclass(frozen=True)
class Part:
    """Tensors that stay together in one file: the cores of a layer, or one tensor that is not changed.

    Args:
        key: name of the layer or tensor.
        tensors: where each lies now, by the name it gets.
    """

    key: str
    tensors: Mapping[str, Slice]


def layout(parts: Iterable[Part], max_bytes: int) -> dict[str, list[Part]]:
    """Spread parts over files of at most `max_bytes` (one part may be larger), in order.

    Returns:
        The parts of each file, by the file names that transformers uses.
    """
    shards: list[list[Part]] = [[]]
    size = 0
    for part in parts:
        more = total_bytes(part.tensors.values())
        if shards[-1] and size + more > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(part)
        size += more
    if len(shards) == 1:
        return {WEIGHTS: shards[0]}
    return {f"model-{k:05d}-of-{len(shards):05d}.safetensors": s for k, s in enumerate(shards, start=1)}


def index_text(shards: Mapping[str, Sequence[Part]]) -> str:
    """Content of `model.safetensors.index.json`."""
    parts = [(file, part) for file, content in shards.items() for part in content]
    weight_map = {name: file for file, part in parts for name in part.tensors}
    total = sum(total_bytes(part.tensors.values()) for _, part in parts)
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(content, indent=2) + "\n"


def config_text(
    source: Mapping[str, Any],
    skeleton: nn.Module,
    pieces: Iterable[Piece],
    config: CompressionConfig,
) -> str:
    """Content of `config.json`: that of the source, and the description of the compressed layers.

    Args:
        source: content of the old `config.json`.
        skeleton: the model on the meta device; its compressed layers are replaced.
        pieces: the finished layers.
        config: options to record.
    """
    for piece in pieces:
        _put_in_place(skeleton, piece)
    settle(skeleton)
    described: TensorNetworkConfig = describe(skeleton, compression=config.to_dict())
    return json.dumps({**source, "quantization_config": described.to_dict()}, indent=2, sort_keys=True) + "\n"


def guards(
    dense: Iterable[str], skeleton: nn.Module, pieces: Iterable[Piece], source: Iterable[Slice]
) -> Part:
    """Make empty tensors in place of the dense weights, as saving a model writes them (`checkpoint.guards`).

    Args:
        dense: names of the tensors of the dense model.
        skeleton: the compressed model on the meta device.
        pieces: the finished layers.
        source: tensors of files that stay; they tell the dtype.
    """
    layers = [name for piece in pieces for name in piece.specs]
    floating = [part for part in source if part.dtype in FLOATS]
    if not layers or not floating:
        return Part("guards", {})
    counted = [part.dtype for part in floating]
    dtype = max(sorted(set(counted)), key=counted.count)
    empty = Slice(floating[0].file, dtype, GUARD_SHAPE, floating[0].start, floating[0].start)
    return Part("guards", dict.fromkeys(replaced_names(dense, skeleton.state_dict(), layers), empty))


def _put_in_place(skeleton: nn.Module, piece: Piece) -> None:
    first: NetworkModule | None = None
    for name, spec in piece.specs.items():
        stock: Any = skeleton.get_submodule(name)
        module = build_module(spec, device="meta", dtype=stock.weight.dtype)
        assert isinstance(module, NetworkModule)
        if isinstance(module, TensorNetworkLinear) and module.bias is not None:
            assert isinstance(stock.bias, nn.Parameter)
            module.bias = stock.bias  # the parameter itself: a tied bias stays tied
        if first is not None:
            module.share_cores(first)
        first = first or module
        set_submodule(skeleton, name, module)
