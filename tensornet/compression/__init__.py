"""Compression of whole models: candidates of every layer, one plan, one report."""

from tensornet.compression.apply import apply_plan, decompress
from tensornet.compression.compress import compress
from tensornet.compression.config import CompressionConfig
from tensornet.compression.layer_plan import LayerPlan
from tensornet.compression.model_files import load_model, save_model
from tensornet.compression.plan import CompressionPlan
from tensornet.compression.planner import PreparedPlan, plan, prepare
from tensornet.compression.report import CompressionReport, LayerReport

__all__ = [
    "CompressionConfig",
    "CompressionPlan",
    "CompressionReport",
    "LayerPlan",
    "LayerReport",
    "PreparedPlan",
    "apply_plan",
    "compress",
    "decompress",
    "load_model",
    "plan",
    "prepare",
    "save_model",
]
