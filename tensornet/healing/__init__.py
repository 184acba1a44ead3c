"""Healing: training or refitting the cores of a compressed model against its dense teacher."""

from tensornet.healing.heal import HealReport, trained_scales
from tensornet.healing.refine import RefineReport, refine

__all__ = [
    "HealReport",
    "RefineReport",
    "refine",
    "trained_scales",
]
