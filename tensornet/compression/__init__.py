"""Compressing whole models: targets, plans, reports."""

from tensornet.compression.apply import apply_plan, decompress
from tensornet.compression.compress import compress
from tensornet.compression.config import CompressionConfig
from tensornet.compression.hooks import register_structure_hook, structure_changed
from tensornet.compression.plan import CompressionPlan, LayerPlan
from tensornet.compression.planner import plan
from tensornet.compression.report import CompressionReport, LayerReport
from tensornet.compression.targets import Target, find_targets

__all__ = [
    "CompressionConfig",
    "CompressionPlan",
    "CompressionReport",
    "LayerPlan",
    "LayerReport",
    "Target",
    "apply_plan",
    "compress",
    "decompress",
    "find_targets",
    "plan",
    "register_structure_hook",
    "structure_changed",
]
