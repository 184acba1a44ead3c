"""Tensor networks for Hugging Face models: compression, checkpoints, mixtures of experts, command line.

Importing this package registers the quantization method "tensornet" with transformers.
"""

from typing import Any

from tensornet._util import require
from tensornet.gone import no_attribute

require(("transformers", "accelerate"), extra="hf", user="tensornet_hf")

import tensornet_hf.extension  # noqa: F401  (registers itself)
from tensornet_hf.checkpoint import decompress, load, save
from tensornet_hf.compress import CompressOptions, compress_folder, plan_folder
from tensornet_hf.exporters.base import ExportReport
from tensornet_hf.exporters.target import export
from tensornet_hf.packing import PackReport, pack
from tensornet_hf.quantizer import TensorNetworkConfig
from tensornet_hf.receipts import Receipt
from tensornet_hf.recipes import Recipe, plan_recipe
from tensornet_hf.rotation import rotate
from tensornet_hf.specialist_files import PretrainedSpecialists, load_specialists, specialists
from tensornet_hf.specializing import SpecializeReport, specialize
from tensornet_hf.stock_mixtures import stock_mixture
from tensornet_hf.trainer import GradientMaskCallback, RouterBiasCallback, RouterStatsCallback
from tensornet_hf.upcycling import UpcycleReport, upcycle
from tensornet_hf.verification import Verification, verify

__all__ = [
    "CompressOptions",
    "ExportReport",
    "GradientMaskCallback",
    "PackReport",
    "PretrainedSpecialists",
    "Receipt",
    "Recipe",
    "RouterBiasCallback",
    "RouterStatsCallback",
    "SpecializeReport",
    "TensorNetworkConfig",
    "UpcycleReport",
    "Verification",
    "compress_folder",
    "decompress",
    "export",
    "load",
    "load_specialists",
    "pack",
    "plan_folder",
    "plan_recipe",
    "rotate",
    "save",
    "specialists",
    "specialize",
    "stock_mixture",
    "upcycle",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Raise an error that says what took the place of a name of earlier versions."""
    raise no_attribute("tensornet_hf", name)
