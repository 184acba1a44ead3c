"""Compression of whole models: find candidates for every layer, plan, check the loss, replace layers."""

from tensornet.compression.loss_increase import LossIncrease, measure, record_losses
from tensornet.compression.plan import LayerPlan
from tensornet.compression.planning import price
from tensornet.compression.prices import PriceList

__all__ = [
    "LayerPlan",
    "LossIncrease",
    "PriceList",
    "measure",
    "price",
    "record_losses",
]
