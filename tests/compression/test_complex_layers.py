"""Complex layers: ranks and chains keep them complex; formats of real numbers are refused, or not planned."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tensornet as tn
from tensornet.compression.plan import LayerPlan
from tensornet.errors import FormatError
from tensornet.nn.storage import Storage
from tensornet.topologies import topology_family


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 48, dtype=torch.complex64), nn.Linear(48, 64, dtype=torch.complex64))


@pytest.mark.parametrize("formats", [("int8",), ("int8", "bf16"), ("int3", "int2")])
def test_formats_without_float_are_refused(formats: tuple[str, ...]) -> None:
    made = model()
    config = tn.CompressionConfig(formats=formats, method="nearest", target_modules="all")
    with pytest.raises(FormatError, match=r"'0'.*complex64") as caught:
        tn.compress(made, config, progress=False)
    assert "multiple" not in str(caught.value)  # the reason is the dtype, not the number of inputs
    assert all(type(layer) is nn.Linear for layer in made)


def test_plans_choose_integers_only_for_real_layers() -> None:
    made = nn.ModuleDict({"complex": model(), "real": nn.Linear(64, 64)})
    config = tn.CompressionConfig(formats=("float", "int3"), bits_per_weight=42, method="nearest")
    plan = tn.plan(made, config)
    formats = {layer.name: layer.storage.number_format.name for layer in plan}
    assert formats == {"complex.0": "float", "complex.1": "float", "real": "int3"}


@pytest.mark.parametrize("name", ["int8", "bf16"])
def test_a_plan_with_integers_replaces_nothing(name: str) -> None:
    made, shape = model(), (48, 64)
    storage = Storage(number_format=name)  # type: ignore[arg-type]
    layer = LayerPlan("0", shape, topology_family("dense").build(*shape), "edited", None, storage=storage)
    plan = tn.CompressionPlan((layer.__class__(**{**vars(layer), "dtype": torch.complex64}),))
    with pytest.raises(FormatError, match="complex64"):
        tn.apply_plan(made, plan)
    assert type(made[0]) is nn.Linear


@pytest.mark.parametrize("topology", ["low_rank", "mpo"])
def test_ranks_stay_complex(topology: str) -> None:
    made = model()
    weight = made[0].weight.detach().clone()
    config = tn.CompressionConfig(topology=topology, topology_options={"rel_error": 0.5}, method="svd")
    tn.compress(made, config, progress=False)
    matrix = made[0].to_matrix().detach() if hasattr(made[0], "to_matrix") else made[0].weight.detach()
    assert matrix.is_complex()
    assert float((matrix - weight).norm() / weight.norm()) <= 0.5
