"""Modular tensor networks for PyTorch.

Compress linear layers, build mixture-of-experts layers whose experts share cores, and property-test
decompositions. Start with `tensornet.MPO.from_matrix` for one matrix or `tensornet.compress` for a model.
"""

from importlib import import_module
from types import ModuleType

from tensornet import errors, nn, qtt, topologies
from tensornet.calibration.blockwise import calibrate
from tensornet.calibration.stats import CalibrationStats
from tensornet.compounds import attention, convolution, recurrent  # noqa: F401 (register their kinds)
from tensornet.compression.apply import apply_plan, decompress
from tensornet.compression.compress import compress
from tensornet.compression.config import CompressionConfig
from tensornet.compression.plan import CompressionPlan
from tensornet.compression.planning import plan
from tensornet.compression.report import CompressionReport
from tensornet.compression.serialization import load_model, save_model
from tensornet.compression.survey import Survey
from tensornet.compression.surveying import survey_model as survey
from tensornet.decompose import decompose
from tensornet.errors import TensorNetError
from tensornet.gone import no_attribute
from tensornet.healing.heal import heal
from tensornet.linalg.svd import truncated_svd
from tensornet.mpo import MPO
from tensornet.network import TensorNetwork
from tensornet.topologies.registry import register_topology
from tensornet.topology import Topology

__version__ = "0.1.0"

__all__ = [
    "MPO",
    "CalibrationStats",
    "CompressionConfig",
    "CompressionPlan",
    "CompressionReport",
    "Survey",
    "TensorNetError",
    "TensorNetwork",
    "Topology",
    "apply_plan",
    "calibrate",
    "compress",
    "decompose",
    "decompress",
    "errors",
    "heal",
    "load_model",
    "nn",
    "plan",
    "qtt",
    "register_topology",
    "save_model",
    "survey",
    "topologies",
    "truncated_svd",
]


def __getattr__(name: str) -> ModuleType:
    """Import `tensornet.testing` on first use, since it needs hypothesis, an optional package."""
    if name == "testing":
        return import_module("tensornet.testing")
    raise no_attribute("tensornet", name)
