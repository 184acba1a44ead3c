"""A topology is accepted wherever the name of a family is, and leaves no choice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from folder_runs import compress_files
from hf_models import gpt2
from torch import nn
from transformers import AutoModelForCausalLM

import tensornet as tn
import tensornet_hf as th
from tensornet.errors import TopologyError
from tensornet.topologies import mpo
from tensornet.topologies.mpo import MPOFamily

UP = mpo(out_dims=(6, 8), in_dims=(4, 6), max_bond=5)
DOWN = mpo(out_dims=(24, 1), in_dims=(1, 48), max_bond=6)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 48), nn.Tanh(), nn.Linear(48, 24))


def test_every_layer_becomes_the_topology_of_its_shape(tmp_path: Path) -> None:
    made = model()
    config = tn.CompressionConfig(topology=[UP, DOWN], method="svd")
    report = tn.compress(made, config, progress=False)
    assert [layer.topology for layer in report.plan] == [UP, DOWN]
    assert {layer.bound_by for layer in report.layers} == {"topology"}
    best = tn.decompose(model()[0].weight, UP)
    assert report.layers[0].error == pytest.approx(best.error, rel=1e-3)
    tn.save_model(made, tmp_path / "made")
    assert tn.load_model(model(), tmp_path / "made")[0].topology == UP
    again = tn.CompressionConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert [layer.topology for layer in tn.plan(model(), again)] == [UP, DOWN]


def test_calibration_weighs_its_errors() -> None:
    batches = [(x := torch.randn(40, 24) * torch.logspace(0, -3, 24), x.sin()) for _ in range(3)]
    gaps = []
    for calibration in (None, batches):
        made = model()
        method = "svd" if calibration is None else "auto"
        config = tn.CompressionConfig(topology=[UP, DOWN], method=method)
        report = tn.compress(made, config, calibration=calibration, progress=False)
        gaps.append(sum(float((made(x) - model()(x)).square().mean().detach()) for x, _ in batches))
    assert gaps[1] < 0.8 * gaps[0]
    assert report.plan.calibration == "calibration data"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"topology": UP, "param_ratio": 0.5, "topology_options": {"max_bond": 2}},
            "topology_options, param_ratio",
        ),
        ({"topology": UP, "bits_per_weight": 4}, "formats, bits_per_weight"),
        ({"topology": [UP, UP]}, r"Two topologies.*\(48, 24\)"),
        ({"topology": [UP, "mpo"]}, "list of topologies"),
        ({"topology": 3}, "topologies, got 3"),
    ],
)
def test_contradictions_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TopologyError, match=message):
        tn.CompressionConfig(**options)


def test_a_layer_without_a_topology_is_named() -> None:
    with pytest.raises(TopologyError, match=r"'2'.*\(24, 48\).*\(48, 24\)"):
        tn.plan(model(), tn.CompressionConfig(topology=UP))


def test_families_that_are_not_registered_are_refused() -> None:
    class Own(MPOFamily):
        name = "own"

    topology = Own().build(48, 24, max_bond=3)
    for value in (topology, [topology], topology.to_dict()):
        with pytest.raises(TopologyError, match="'own'"):
            tn.CompressionConfig(topology=value)
    with pytest.raises(TopologyError, match=r"call tensornet\.register_topology"):
        tn.CompressionConfig(topology=Own())


def test_layers_take_it() -> None:
    layer, table = nn.Linear(24, 48), nn.Embedding(48, 24)
    made = tn.nn.TensorNetworkLinear.from_linear(layer, topology=UP)
    torch.testing.assert_close(made.to_matrix(), tn.decompose(layer.weight, UP).network.to_matrix())
    assert tn.nn.MPOEmbedding.from_embedding(table, topology=UP).topology == UP
    family = tn.topologies.topology_family("mpo")
    assert tn.nn.TensorNetworkLinear.from_linear(layer, topology=family, max_bond=2).topology.family == "mpo"
    with pytest.raises(TopologyError, match="max_bond"):
        tn.nn.TensorNetworkLinear.from_linear(layer, topology=UP, max_bond=2)
    assert tn.decompose(layer.weight, family, max_bond=2).network.topology.family == "mpo"


def test_models_are_compressed_while_they_load_and_from_file_to_file(tmp_path: Path) -> None:
    dense = gpt2()
    dense.save_pretrained(tmp_path / "dense")
    width = dense.config.n_embd
    topology = mpo(out_dims=(4 * width, 1), in_dims=(1, width), max_bond=3)
    options: dict[str, Any] = {"topology": topology, "target_modules": "c_fc", "method": "svd"}
    compress_files(tmp_path / "dense", tmp_path / "made", tn.CompressionConfig(**options))
    streamed = th.load(tmp_path / "made")
    config = th.TensorNetworkConfig(**options)
    assert config.compression_config.fixed == (topology,)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    for found in (streamed, loaded):
        assert found.transformer.h[0].mlp.c_fc.topology.core_shapes == topology.core_shapes
