"""Tensor-network layers, and the stock layers that they replace."""

from tensornet.nn.embedding import MPOEmbedding
from tensornet.nn.layer_kinds import (
    CompoundKind,
    LayerKind,
    compound_of,
    kind_of,
    layer_kind,
    register_compound_kind,
    register_layer_kind,
)
from tensornet.nn.linear import MPOLinear, TensorNetworkLinear
from tensornet.nn.module import NetworkModule
from tensornet.nn.prepare import prepare_for_inference
from tensornet.nn.serialization import build_module, module_spec, register_module_type
from tensornet.nn.strategy import Explanation, StrategyCost, cached_bytes, set_strategy
from tensornet.nn.unfuse import Compound, PartMatrix, Stack, register_stacked_matrices

__all__ = [
    "Compound",
    "CompoundKind",
    "Explanation",
    "LayerKind",
    "MPOEmbedding",
    "MPOLinear",
    "NetworkModule",
    "PartMatrix",
    "Stack",
    "StrategyCost",
    "TensorNetworkLinear",
    "build_module",
    "cached_bytes",
    "compound_of",
    "kind_of",
    "layer_kind",
    "module_spec",
    "prepare_for_inference",
    "register_compound_kind",
    "register_layer_kind",
    "register_module_type",
    "register_stacked_matrices",
    "set_strategy",
]
