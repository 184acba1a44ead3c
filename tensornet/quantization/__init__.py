"""Number formats, their packing, and rounding with the curvature of the loss."""

from tensornet.quantization.codes import dequantize
from tensornet.quantization.expected_loss import predict_loss_increase
from tensornet.quantization.factors import RoundedProduct, round_product
from tensornet.quantization.formats import NumberFormat, format_names
from tensornet.quantization.packing import pack, packed_bytes, unpack
from tensornet.quantization.product_loss import predict_product_losses
from tensornet.quantization.rounding import RoundedWeight, Rounding, round_weight
from tensornet.quantization.scales import GroupScales, refit_scales, search_scales
from tensornet.quantization.trained_codes import TrainedCodes, rounded_values

__all__ = [
    "GroupScales",
    "NumberFormat",
    "RoundedProduct",
    "RoundedWeight",
    "Rounding",
    "TrainedCodes",
    "dequantize",
    "format_names",
    "pack",
    "packed_bytes",
    "predict_loss_increase",
    "predict_product_losses",
    "refit_scales",
    "round_product",
    "round_weight",
    "rounded_values",
    "search_scales",
    "unpack",
]
