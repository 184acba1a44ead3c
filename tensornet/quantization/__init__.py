"""Number formats, their packing, and rounding with the curvature of the loss."""

from tensornet.quantization.codes import dequantize
from tensornet.quantization.expected_loss import predict_loss_increase
from tensornet.quantization.factors import RoundedFactors, RoundedProduct, round_factors, round_product
from tensornet.quantization.formats import NumberFormat, format_names
from tensornet.quantization.packing import pack, packed_bytes, unpack
from tensornet.quantization.product_loss import predict_product_losses
from tensornet.quantization.residual import ResidualFit, fit_residual
from tensornet.quantization.rounding import Method, RoundedWeight, round_weight
from tensornet.quantization.scales import GroupScales, refit_scales, search_scales
from tensornet.quantization.trained_codes import TrainedCodes, rounded_values

__all__ = [
    "GroupScales",
    "Method",
    "NumberFormat",
    "ResidualFit",
    "RoundedFactors",
    "RoundedProduct",
    "RoundedWeight",
    "TrainedCodes",
    "dequantize",
    "fit_residual",
    "format_names",
    "pack",
    "packed_bytes",
    "predict_loss_increase",
    "predict_product_losses",
    "refit_scales",
    "round_factors",
    "round_product",
    "round_weight",
    "rounded_values",
    "search_scales",
    "unpack",
]
