"""Layers made of cores, and the stock layers they stand for."""

from tensornet.nn.embedding import MPOEmbedding
from tensornet.nn.explain import Explanation, StrategyCost
from tensornet.nn.linear import MPOLinear, TensorNetworkLinear
from tensornet.nn.module import NetworkModule
from tensornet.nn.serialization import build_module, module_spec, register_module_type
from tensornet.nn.set_strategy import cached_bytes, set_strategy
from tensornet.nn.stock_layers import LayerKind, kind_of, layer_kind, register_layer_kind

__all__ = [
    "Explanation",
    "LayerKind",
    "MPOEmbedding",
    "MPOLinear",
    "NetworkModule",
    "StrategyCost",
    "TensorNetworkLinear",
    "build_module",
    "cached_bytes",
    "kind_of",
    "layer_kind",
    "module_spec",
    "register_layer_kind",
    "register_module_type",
    "set_strategy",
]
