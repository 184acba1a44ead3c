"""Tensor networks for Hugging Face models: compressing, checkpoints, mixtures of experts, command line.

Importing this package registers the quantization method "tensornet" with transformers.
"""

from tensornet.optional import require

require(("transformers", "accelerate", "safetensors"), extra="hf", user="tensornet_hf")

import tensornet_hf.layer_kinds  # noqa: F401  (registers layers of single architectures)
from tensornet_hf.atomic import check_free, write_folder
from tensornet_hf.callbacks import GradientMaskCallback, RouterStatsCallback
from tensornet_hf.checkpoint import Checkpoint, StoredTensor, read_checkpoint
from tensornet_hf.config import TensorNetworkConfig
from tensornet_hf.default_calibration import embedded_text
from tensornet_hf.loading import load, resolve_folder
from tensornet_hf.moe import UpcycleReport, upcycle
from tensornet_hf.moe_config import MoEConfig
from tensornet_hf.quantizer import TensorNetworkQuantizer, prepare_for_saving
from tensornet_hf.saving import decompress, save_model
from tensornet_hf.sharded import (
    CheckpointReport,
    WorkerError,
    calibrate_checkpoint,
    compress_checkpoint,
    verify_manifest,
)

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
