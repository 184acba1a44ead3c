"""Compressing whole models: targets, plans, reports."""

from tensornet.calibration.calibrate import calibrate
from tensornet.calibration.default_data import ProvidedData, register_calibration_provider
from tensornet.calibration.losses import cosine_losses, label_losses, losses_against, sampled_losses
from tensornet.calibration.stats import CalibrationStats
from tensornet.compression.apply import apply_plan, decompress
from tensornet.compression.compress import compress
from tensornet.compression.config import CompressionConfig
from tensornet.compression.model_files import load_model, save_model
from tensornet.compression.plan import CompressionPlan, LayerPlan
from tensornet.compression.planner import PreparedPlan, plan, prepare
from tensornet.compression.report import CompressionReport, LayerReport
from tensornet.healing.heal import HealReport, heal
from tensornet.healing.refine import RefineReport, refine
from tensornet.nn.expansion import expanded, register_expansion
from tensornet.nn.fused_paths import keep_off_fused_paths
from tensornet.nn.structure_hooks import register_structure_hook, structure_changed
from tensornet.nn.targets import Target, find_targets

__all__ = [
    "CalibrationStats",
    "CompressionConfig",
    "CompressionPlan",
    "CompressionReport",
    "HealReport",
    "LayerPlan",
    "LayerReport",
    "PreparedPlan",
    "ProvidedData",
    "RefineReport",
    "Target",
    "apply_plan",
    "calibrate",
    "compress",
    "cosine_losses",
    "decompress",
    "expanded",
    "find_targets",
    "heal",
    "keep_off_fused_paths",
    "label_losses",
    "load_model",
    "losses_against",
    "plan",
    "prepare",
    "refine",
    "register_calibration_provider",
    "register_expansion",
    "register_structure_hook",
    "sampled_losses",
    "save_model",
    "structure_changed",
]
