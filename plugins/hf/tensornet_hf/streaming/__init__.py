"""Compress checkpoints of any size: shard by shard, with many workers, across interruptions."""

from tensornet.streaming.pool import WorkerError
from tensornet_hf.streaming.calibrate import calibrate_checkpoint
from tensornet_hf.streaming.checkpoint_report import CheckpointReport
from tensornet_hf.streaming.manifest import verify_manifest
from tensornet_hf.streaming.run import compress_checkpoint

__all__ = [
    "CheckpointReport",
    "WorkerError",
    "calibrate_checkpoint",
    "compress_checkpoint",
    "verify_manifest",
]
