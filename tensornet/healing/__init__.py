"""Healing: train or refit the cores of a compressed model, with the dense model as teacher."""

from tensornet.healing.heal import HealReport, trained_scales
from tensornet.healing.refine import RefineReport, refine

__all__ = [
    "HealReport",
    "RefineReport",
    "refine",
    "trained_scales",
]
