"""Tensor-network layers, and the stock layers that they replace."""

from tensornet.nn.embedding import MPOEmbedding
from tensornet.nn.extension import ModelExtension, register_extension
from tensornet.nn.layer_kinds import LayerKind, ScaledEmbedding, register_layer_kind
from tensornet.nn.linear import MPOLinear, TensorNetworkLinear
from tensornet.nn.module import build_module, module_spec, register_module_type
from tensornet.nn.prepare import prepare_for_inference
from tensornet.nn.strategy import set_strategy

__all__ = [
    "LayerKind",
    "MPOEmbedding",
    "MPOLinear",
    "ModelExtension",
    "ScaledEmbedding",
    "TensorNetworkLinear",
    "build_module",
    "module_spec",
    "prepare_for_inference",
    "register_extension",
    "register_layer_kind",
    "register_module_type",
    "set_strategy",
]
