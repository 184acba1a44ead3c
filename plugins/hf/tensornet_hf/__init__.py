"""Tensor networks for Hugging Face models: compressing, checkpoints, mixtures of experts, command line.

Importing this package registers the quantization method "tensornet" with transformers.
"""

from tensornet.optional import require

require(("transformers", "accelerate", "safetensors"), extra="hf", user="tensornet_hf")

import tensornet_hf.falcon_linear  # noqa: F401  (registers a kind of layer)
from tensornet.extension import register_extension
from tensornet_hf.checkpoint.folders import check_free, write_folder
from tensornet_hf.checkpoint.headers import Checkpoint, StoredTensor, read_checkpoint
from tensornet_hf.checkpoint.load import load, resolve_folder
from tensornet_hf.checkpoint.quantization_config import TensorNetworkConfig
from tensornet_hf.checkpoint.quantizer import TensorNetworkQuantizer, prepare_for_saving
from tensornet_hf.checkpoint.save import decompress, save_model
from tensornet_hf.extension import TransformersExtension
from tensornet_hf.moe.upcycle import UpcycleReport, upcycle
from tensornet_hf.moe.upcycle_config import MoEConfig
from tensornet_hf.streaming import (
    CheckpointReport,
    WorkerError,
    calibrate_checkpoint,
    compress_checkpoint,
    verify_manifest,
)
from tensornet_hf.text.default_data import embedded_text
from tensornet_hf.training.callbacks import GradientMaskCallback, RouterStatsCallback

register_extension(TransformersExtension())

__all__ = [
    "Checkpoint",
    "CheckpointReport",
    "GradientMaskCallback",
    "MoEConfig",
    "RouterStatsCallback",
    "StoredTensor",
    "TensorNetworkConfig",
    "TensorNetworkQuantizer",
    "UpcycleReport",
    "WorkerError",
    "calibrate_checkpoint",
    "check_free",
    "compress_checkpoint",
    "decompress",
    "embedded_text",
    "load",
    "prepare_for_saving",
    "read_checkpoint",
    "resolve_folder",
    "save_model",
    "upcycle",
    "verify_manifest",
    "write_folder",
]
