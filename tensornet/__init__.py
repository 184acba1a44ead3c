"""Modular tensor networks for PyTorch.

Compress linear layers, build mixture-of-experts variants whose experts share cores, property-test
decompositions. Start with `tensornet.MPO.from_matrix` or `tensornet.compress`.
"""

from importlib import import_module
from types import ModuleType

from tensornet import nn, topologies
from tensornet.budget import Budget
from tensornet.calibration import CalibrationStats, calibrate
from tensornet.compression import (
    CompressionConfig,
    CompressionPlan,
    CompressionReport,
    LayerPlan,
    LayerReport,
    apply_plan,
    compress,
    decompress,
    load_model,
    plan,
    save_model,
)
from tensornet.contraction.cost import Machine, measure_machine
from tensornet.contrib import attention, convolution, recurrent  # noqa: F401 (register their kinds)
from tensornet.decompose import decompose
from tensornet.errors import (
    BudgetError,
    CalibrationWarning,
    DestinationError,
    FormatError,
    MissingDependencyError,
    NonFiniteError,
    ShapeError,
    TargetError,
    TensorNetError,
    TopologyError,
)
from tensornet.healing import HealingConfig, HealReport, heal
from tensornet.linalg.svd import TruncatedSVD, truncated_svd
from tensornet.mpo import MPO
from tensornet.network import TensorNetwork
from tensornet.nn.extension import ModelExtension, register_extension
from tensornet.topologies import register_topology
from tensornet.topology import CoreSpec, Topology

__version__ = "0.1.0"

__all__ = [
    "MPO",
    "Budget",
    "BudgetError",
    "CalibrationStats",
    "CalibrationWarning",
    "CompressionConfig",
    "CompressionPlan",
    "CompressionReport",
    "CoreSpec",
    "DestinationError",
    "FormatError",
    "HealReport",
    "HealingConfig",
    "LayerPlan",
    "LayerReport",
    "Machine",
    "MissingDependencyError",
    "ModelExtension",
    "NonFiniteError",
    "ShapeError",
    "TargetError",
    "TensorNetError",
    "TensorNetwork",
    "Topology",
    "TopologyError",
    "TruncatedSVD",
    "apply_plan",
    "calibrate",
    "compress",
    "decompose",
    "decompress",
    "heal",
    "load_model",
    "measure_machine",
    "nn",
    "plan",
    "register_extension",
    "register_topology",
    "save_model",
    "topologies",
    "truncated_svd",
]


def __getattr__(name: str) -> ModuleType:
    """Import `tensornet.testing` on first use: it needs hypothesis, which the core does not."""
    if name == "testing":
        return import_module("tensornet.testing")
    raise AttributeError(f"module 'tensornet' has no attribute {name!r}")
