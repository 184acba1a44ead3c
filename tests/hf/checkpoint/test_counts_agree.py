"""Parameters of one compressed folder are the same wherever they are shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from folder_runs import compress_files

import tensornet as tn
import tensornet_hf as th
from tensornet.compression.report import model_size
from tensornet_hf.embedded import gpt2_path
from tensornet_hf.inspect import inspect_folder

MLP = ("h.1.mlp.c_fc", "h.1.mlp.c_proj")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int4", "int3:g32"])
def test_one_folder_has_one_number_of_parameters(name: str, tmp_path: Path) -> None:
    config = tn.CompressionConfig(target_modules=MLP, bits_per_weight=16, formats=(name,), method="nearest")
    planned = th.plan_folder(gpt2_path(), config)
    folder = tmp_path / "small"
    report = th.compress_folder(gpt2_path(), folder, config)
    count = report.model_params_before - report.plan.params_before + report.plan.params_after
    assert count > report.model_params_before  # a code for each weight, and scales
    assert json.loads(report.to_json())["model_params_after"] == count
    assert planned.model_params_after == count
    model = th.load(folder)
    assert model_size(model)[0] == count
    found = inspect_folder(folder)
    assert found["params"] == sum(found["dtypes"].values()) == count
    for layer in found["layers"]:
        assert layer["params"] == model.get_submodule(layer["name"]).num_params
    streamed = compress_files(gpt2_path(), tmp_path / "streamed", config)
    assert streamed.model_params_after == count
