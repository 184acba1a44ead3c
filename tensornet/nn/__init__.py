"""Layers made of cores, and the stock layers they stand for."""

from tensornet.nn.adapters import LayerKind, kind_of, layer_kind, register_layer_kind
from tensornet.nn.build import build_module, module_spec, register_module_type
from tensornet.nn.embedding import MPOEmbedding
from tensornet.nn.linear import MPOLinear, TensorNetworkLinear
from tensornet.nn.module import NetworkModule

__all__ = [
    "LayerKind",
    "MPOEmbedding",
    "MPOLinear",
    "NetworkModule",
    "TensorNetworkLinear",
    "build_module",
    "kind_of",
    "layer_kind",
    "module_spec",
    "register_layer_kind",
    "register_module_type",
]
