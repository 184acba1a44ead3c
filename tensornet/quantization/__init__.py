"""Number formats, their packing, and rounding with the curvature of the loss."""

from tensornet.quantization.formats import NumberFormat, format_names, pack, packed_bytes, unpack
from tensornet.quantization.low_rank import RoundedProduct, round_factor, round_product
from tensornet.quantization.predict import predict_losses, predict_product_losses
from tensornet.quantization.rounding import RoundedWeight, Rounding, round_weight
from tensornet.quantization.scales import refit_scales, search_scales
from tensornet.quantization.trained_codes import TrainedCodes, rounded_values

__all__ = [
    "NumberFormat",
    "RoundedProduct",
    "RoundedWeight",
    "Rounding",
    "TrainedCodes",
    "format_names",
    "pack",
    "packed_bytes",
    "predict_losses",
    "predict_product_losses",
    "refit_scales",
    "round_factor",
    "round_product",
    "round_weight",
    "rounded_values",
    "search_scales",
    "unpack",
]
