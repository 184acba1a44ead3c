"""Healing: training or refitting the cores of a compressed model against its dense teacher."""

from tensornet.healing.config import HealingConfig
from tensornet.healing.heal import HealReport, heal
from tensornet.healing.refine import RefineReport, refine
from tensornet.healing.trained_scales import trained_scales

__all__ = ["HealReport", "HealingConfig", "RefineReport", "heal", "refine", "trained_scales"]
