"""Lay out the files of the new folder: parts, shards, index, configuration."""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import split_state_dict_into_shards_factory
from torch import nn

from tensornet.compression import CompressionConfig, LayerPlan
from tensornet.io import FLOATS, Slice
from tensornet.nn.encoding import hold
from tensornet.nn.linear import TensorNetworkLinear
from tensornet.nn.module import NetworkModule
from tensornet.nn.serialization import build_module
from tensornet.nn.unfuse import fuse
from tensornet.streaming.worker import Piece, is_of_core
from tensornet_hf.checkpoint.describe import describe
from tensornet_hf.checkpoint.guards import GUARD_SHAPE, replaced_names
from tensornet_hf.checkpoint.headers import WEIGHTS
from tensornet_hf.checkpoint.quantization_config import TensorNetworkConfig
from tensornet_hf.streaming.expert_slices import ExpertSource
from tensornet_hf.streaming.source import Source, total_bytes


@dataclass(frozen=True)
class Part:
    """Tensors that stay together in one file: the cores of a layer, or one tensor that is not changed.

    Args:
        key: name of the layer or tensor.
        tensors: where each lies now, by the name it gets.
    """

    key: str
    tensors: Mapping[str, Slice]


def collect_parts(
    source: Source,
    stored: Mapping[str, str],
    experts: ExpertSource,
    known: Collection[str],
    layer_of: Mapping[str, str],
    pieces: Mapping[str, Piece],
) -> tuple[list[Part], list[str]]:
    """List all contents of the new files, in the order of the old ones.

    Args:
        source: the folder that is compressed.
        stored: `{parameter of the model: stored name}` of those that are stored as they are.
        experts: matrices of modules that own several.
        known: names of the tensors of the model.
        layer_of: layers by the parameters that are their weights.
        pieces: finished weights by layer.

    Returns:
        The parts, and the stored names that are left out, since the model does not have them.
    """
    name_of = {key: name for name, key in stored.items()}
    parts: dict[str, Part] = {}
    left_out = []
    for key, part in sorted(
        source.tensors.items(), key=lambda item: (item[1].file.name, item[1].start, item[0])
    ):
        name = name_of.get(key, key)  # stored in another form: loading converts it, under its old name
        layers = [*experts.layers.get(key, ()), *([layer_of[name]] if name in layer_of else [])]
        made = [layer for layer in layers if layer in pieces and pieces[layer].written is not None]
        for layer in made:
            parts.setdefault(layer, Part(layer, pieces[layer].tensors))
        if not made and key in name_of and name not in known and key not in experts.layers:
            left_out.append(key)
        elif not made:
            parts[name] = Part(name, {name: part})
    return list(parts.values()), left_out


def layout(parts: Sequence[Part], max_bytes: int) -> dict[str, list[Part]]:
    """Spread parts over files of at most `max_bytes`, in order; a larger part gets a file of its own.

    Returns:
        The parts of each file, by the file names that transformers uses.
    """
    split = split_state_dict_into_shards_factory(
        {str(number): part for number, part in enumerate(parts)},
        get_storage_size=lambda part: total_bytes(part.tensors.values()),
        filename_pattern=WEIGHTS.replace(".", "{suffix}."),
        max_shard_size=max_bytes,
    )
    return {file: [parts[int(key)] for key in keys] for file, keys in split.filename_to_tensors.items()}


def index_text(shards: Mapping[str, Sequence[Part]]) -> str:
    """Return the content of `model.safetensors.index.json`."""
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
    """Build the content of `config.json`: that of the source, with the description of compressed layers.

    Args:
        source: content of the old `config.json`.
        skeleton: the model on the meta device; its compressed layers are replaced.
        pieces: the finished layers.
        config: options to record.
    """
    pieces = list(pieces)
    for piece in pieces:
        _put_in_place(skeleton, piece)
    for piece in pieces:
        _share_core(skeleton, piece.plan)
    fuse(skeleton)
    described: TensorNetworkConfig = describe(skeleton, compression=config.to_dict())
    return json.dumps({**source, "quantization_config": described.to_dict()}, indent=2, sort_keys=True) + "\n"


def guards(
    dense: Iterable[str], skeleton: nn.Module, pieces: Iterable[Piece], source: Iterable[Slice]
) -> Part:
    """Create the guards that saving writes in place of dense weights (see `checkpoint.guards`).

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
        skeleton.set_submodule(name, module)


def _share_core(skeleton: nn.Module, layer: LayerPlan) -> None:
    """Give a layer the stored tensors of the core that it shares with the layer that owns it."""
    if not layer.shared_core or layer.shared_with == layer.name:
        return
    module, owner = skeleton.get_submodule(layer.name), skeleton.get_submodule(layer.shared_with)
    assert isinstance(owner, NetworkModule)
    for part, tensor in owner.stored.items():
        if is_of_core(part, layer.shared_core):
            hold(module, part, tensor)
