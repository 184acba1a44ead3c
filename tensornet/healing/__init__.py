"""Healing: training or refitting the cores of a compressed model against its dense teacher."""

from tensornet.healing.heal import HealingConfig, HealReport, trained_scales
from tensornet.healing.refine import RefineReport, refine

__all__ = [
    "HealReport",
    "HealingConfig",
    "RefineReport",
    "refine",
    "trained_scales",
]
