"""Compression of whole models: find candidates for every layer, plan, check the loss, replace layers."""

from tensornet.compression.loss_increase import LossIncrease, measure, record_losses
from tensornet.compression.plan import LayerPlan
from tensornet.compression.planning import survey_from_stats
from tensornet.compression.survey import Survey

__all__ = [
    "LayerPlan",
    "LossIncrease",
    "Survey",
    "measure",
    "record_losses",
    "survey_from_stats",
]
