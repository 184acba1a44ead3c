"""Compression of whole models: candidates of every layer, one plan, one report."""

from tensornet.compression.apply import apply_plan, decompress
from tensornet.compression.compress import compress
from tensornet.compression.config import CompressionConfig
from tensornet.compression.layer_plan import LayerPlan
from tensornet.compression.loss_check import check_loss, correct_by_measuring
from tensornet.compression.loss_increase import LossIncrease, measure, record_losses
from tensornet.compression.plan import CompressionPlan
from tensornet.compression.planning import Prepared, estimate_seconds, plan, prepare
from tensornet.compression.report import CompressionReport, LayerReport
from tensornet.compression.serialization import load_model, save_model

__all__ = [
    "CompressionConfig",
    "CompressionPlan",
    "CompressionReport",
    "LayerPlan",
    "LayerReport",
    "LossIncrease",
    "Prepared",
    "apply_plan",
    "check_loss",
    "compress",
    "correct_by_measuring",
    "decompress",
    "estimate_seconds",
    "load_model",
    "measure",
    "plan",
    "prepare",
    "record_losses",
    "save_model",
]
