"""Law that a topology family behaves the same under any name."""

import copy
import tempfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tensornet.calibration.stats import CalibrationStats
from tensornet.compression.apply import apply_plan
from tensornet.compression.config import CompressionConfig
from tensornet.compression.layer_plan import LayerPlan
from tensornet.compression.planning import plan
from tensornet.compression.serialization import load_model, save_model
from tensornet.errors import BudgetError
from tensornet.topologies import TopologyFamily, registered

#: Ways to plan: by the weight alone, by calibrated sensitivities, and with another encoding of the cores.
_CONFIGS: tuple[dict[str, Any], ...] = (
    {"objective": "weight"},
    {"objective": "curvature", "pivoted": True},
    {"objective": "activation"},
)


def renamed(family: TopologyFamily, name: str | None = None) -> TopologyFamily:
    """Make an instance of a subclass that differs from its parent only in the name.

    Args:
        family: the parent.
        name: of the subclass; `"renamed_..."` if absent.

    Example:
        >>> renamed(tn.topologies.topology_family("mpo")).build(4, 4).family
        'renamed_mpo'
    """
    twin = copy.copy(family)
    twin.__class__ = type(f"Renamed{type(family).__name__}", (type(family),), {})
    twin.name = name or f"renamed_{family.name}"
    return twin


def check_name_does_not_matter(
    family: TopologyFamily,
    matrix: Tensor,
    *,
    param_ratio: float = 0.6,
    options: Mapping[str, Any] | None = None,
) -> None:
    """Check that a renamed subclass plans, predicts, encodes, saves and loads as its parent does.

    Args:
        family: registered or not.
        matrix: weight of the layer that is compressed; scaled to entries of at most 1.
        param_ratio: budget.
        options: see `CompressionConfig.topology_options`.
    """
    twin = renamed(family)
    weight = (matrix.real if matrix.is_complex() else matrix).float()
    weight = weight / weight.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    for settings in _CONFIGS:
        results = []
        for member in (family, twin):
            with registered(member):
                config = CompressionConfig(
                    topology=member.name, topology_options=options, param_ratio=param_ratio, **settings
                )
                results.append(_journey(weight, config))
        (parent, parent_tensors), (child, child_tensors) = results
        name = f"{twin.name!r}, {settings}"
        assert (parent is None) == (child is None), f"{name}: only one of the two fits the budget"
        if parent is None or child is None:
            continue
        if child.topology is not None:
            assert child.topology.family == twin.name, f"{name}: build records {child.topology.family!r}"
            child = replace(child, topology=replace(child.topology, family=family.name))
        assert child.loss_increase == parent.loss_increase, (
            f"{name}: predicted loss increase {child.loss_increase}, of its parent {parent.loss_increase}"
        )
        assert child.storage == parent.storage, f"{name}: encoding {child.storage}, {parent.storage}"
        assert child == parent, f"{name}: planned {child}, by its parent {parent}"
        assert child_tensors.keys() == parent_tensors.keys(), f"{name}: other tensors in the file"
        for key, tensor in parent_tensors.items():
            assert torch.equal(tensor, child_tensors[key]), f"{name}: tensor {key!r} differs"


def _journey(weight: Tensor, config: CompressionConfig) -> tuple[LayerPlan | None, dict[str, Tensor]]:
    """Plan, compress, save and load one layer; return its plan and loaded tensors, None if nothing fits."""
    model, stats = _model(weight), _statistics(weight.shape[0], weight.shape[1])
    known = stats if config.objective != "weight" else None
    try:
        made = plan(model, config, known)
    except BudgetError:
        return None, {}
    apply_plan(model, made, known)
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, Path(folder) / "model.safetensors")
        loaded = load_model(_model(torch.zeros_like(weight)), Path(folder) / "model.safetensors")
    state = {key: value.clone() for key, value in loaded.state_dict().items()}
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), f"{key!r} is not what was saved"
    kind = type(loaded.get_submodule("layer")).__name__
    return made["layer"], {f"{kind}.{key}": value for key, value in state.items()}


def _model(weight: Tensor) -> nn.Sequential:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data.copy_(weight)
    return nn.Sequential(OrderedDict(layer=layer))


def _statistics(rows: int, columns: int) -> CalibrationStats:
    generator = torch.Generator().manual_seed(0)

    def moment(size: int) -> Tensor:
        sample = torch.randn(2 * size, size, generator=generator, device="cpu")
        sample = sample * torch.logspace(0, 1, size, device="cpu")
        return sample.T @ sample / len(sample)

    sides = {"layer": moment(rows)}, {"layer": moment(columns)}
    return CalibrationStats(*sides, tokens=100, loss=1.0, source="random numbers")
