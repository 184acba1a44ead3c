"""Number formats of weights, and functions that round weights to them with a small loss increase."""

from tensornet.quantization.formats import NumberFormat
from tensornet.quantization.low_rank import RoundedProduct, round_product
from tensornet.quantization.predict import predict_losses
from tensornet.quantization.rounding import RoundedWeight, Rounding, round_weight

__all__ = [
    "NumberFormat",
    "RoundedProduct",
    "RoundedWeight",
    "Rounding",
    "predict_losses",
    "round_product",
    "round_weight",
]
