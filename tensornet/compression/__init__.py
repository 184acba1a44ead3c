"""Compression of whole models: candidates of every layer, one plan, one report."""

from tensornet.compression.apply import apply_plan, decompress
from tensornet.compression.compress import compress
from tensornet.compression.config import CompressionConfig
from tensornet.compression.layer_plan import LayerPlan
from tensornet.compression.model_files import load_model, save_model
from tensornet.compression.plan import CompressionPlan
from tensornet.compression.planner import PreparedPlan, plan, prepare
from tensornet.compression.report import CompressionReport, LayerReport
from tensornet.deprecation import moved

__all__ = [
    "CompressionConfig",
    "CompressionPlan",
    "CompressionReport",
    "LayerPlan",
    "LayerReport",
    "PreparedPlan",
    "apply_plan",
    "compress",
    "decompress",
    "load_model",
    "plan",
    "prepare",
    "save_model",
]

#: Names that were exported here before packages had one job each; they go with the next release.
__getattr__ = moved(
    __name__,
    {
        **dict.fromkeys(
            (
                "CalibrationStats",
                "calibrate",
                "cosine_losses",
                "label_losses",
                "losses_against",
                "sampled_losses",
            ),
            "tensornet.calibration",
        ),
        **dict.fromkeys(("HealReport", "RefineReport", "heal", "refine"), "tensornet.healing"),
        **dict.fromkeys(("Target", "find_targets"), "tensornet.nn.targets"),
    },
)
