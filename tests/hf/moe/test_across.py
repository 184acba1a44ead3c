"""One center for all layers of a Hugging Face model: owned once, saved, loaded by every class, trained."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hf_models import ARCHITECTURES
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedModel,
)

import tensornet_hf as th
import tensornet_moe as tm
from tensornet.errors import FormatError, TargetError
from tensornet_hf.upcycling import _share_across

CONFIG = th.MoEConfig(num_experts=3, sites=3, share_across_layers=True, noise=0.1)


def upcycled(name: str, config: th.MoEConfig = CONFIG) -> PreTrainedModel:
    model = ARCHITECTURES[name].dense
    th.upcycle(model, config)
    return model.eval()


def test_layers_on_several_devices_cannot_share_cores() -> None:
    weights = [torch.ones(8, 8), torch.ones(8, 8, device="meta")]
    networks: Any = [SimpleNamespace(matrices=("up",), matrix=lambda name, w=w: w) for w in weights]
    with pytest.raises(TargetError, match=r"up of these layers are on cpu, meta. Move the model to one"):
        _share_across(nn.Module(), networks, CONFIG, False)


def owners(model: nn.Module) -> dict[str, tm.SharedCores]:
    return {name: m for name, m in model.named_modules() if isinstance(m, tm.SharedCores)}


def banks(model: nn.Module) -> dict[str, tm.SharedCoreExperts]:
    return {name: m for name, m in model.named_modules() if isinstance(m, tm.SharedCoreExperts)}


def test_each_center_is_owned_and_counted_once() -> None:
    model = ARCHITECTURES["gpt2"].dense
    before = sum(p.numel() for p in model.parameters())
    report = th.upcycle(model, CONFIG)
    found = owners(model)
    up, down = "transformer.shared_cores.c_fc_96x24", "transformer.shared_cores.c_proj_24x96"
    assert list(found) == [up, down]
    assert all(bank.owner is found[up if "c_fc" in name else down] for name, bank in banks(model).items())
    shared = [name for name, _ in model.named_parameters() if "core_1" in name]
    assert shared == [f"{up}.core_1", f"{down}.core_1"]
    assert len(tm.shared_parameters(model)) == 2
    assert report.params - report.dense_params == sum(p.numel() for p in model.parameters()) - before
    assert report.to_dict()["across_params"] == report.across_params == report.layers[0].shared_params > 0
    worst = max(bank.error for bank in banks(model).values())
    assert max(layer.error for layer in report.layers) == worst > 0.1


def test_classes_with_and_without_a_head_share_checkpoints(tmp_path: Path) -> None:
    model = upcycled("gpt2")
    model.save_pretrained(tmp_path / "head")
    body = AutoModel.from_pretrained(tmp_path / "head")
    inputs = ARCHITECTURES["gpt2"].inputs(labels=False)
    wanted = model.transformer(**inputs).last_hidden_state
    torch.testing.assert_close(body(**inputs).last_hidden_state, wanted, atol=0, rtol=0)
    assert list(owners(body)) == ["shared_cores.c_fc_96x24", "shared_cores.c_proj_24x96"]
    body.save_pretrained(tmp_path / "body")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "body")
    torch.testing.assert_close(back.transformer(**inputs).last_hidden_state, wanted, atol=0, rtol=0)


def test_copies_share_their_own_center() -> None:
    model = upcycled("gpt2")
    twin = copy.deepcopy(model)
    assert {id(bank.owner) for bank in banks(twin).values()} == {id(owner) for owner in owners(twin).values()}
    inputs = ARCHITECTURES["gpt2"].inputs(labels=False)
    before = model(**inputs).logits
    with torch.no_grad():
        for owner in owners(twin).values():
            owner.core_1.mul_(2)
    assert torch.equal(model(**inputs).logits, before)
    assert not torch.equal(twin(**inputs).logits, before)


def test_a_shape_that_stands_alone_is_not_shared(tmp_path: Path) -> None:
    model = ARCHITECTURES["gpt2"].dense
    model.transformer.h = model.transformer.h[:1]
    model.config.n_layer = 1
    report = th.upcycle(model, CONFIG)
    assert (report.across_params, owners(model)) == (0, {})
    assert report.layers[0].error < 1e-5


def test_layers_that_are_upcycled_later_cannot_join() -> None:
    model = ARCHITECTURES["gpt2"].dense
    model.transformer.h.append(copy.deepcopy(model.transformer.h[0]))
    th.upcycle(model, replace(CONFIG, target_modules=["h.0.mlp", "h.1.mlp"]))
    with pytest.raises(TargetError, match="already share cores or experts"):
        th.upcycle(model, replace(CONFIG, target_modules=["h.2.mlp"]))


def test_a_container_is_refused() -> None:
    part = nn.Sequential()
    part.fc1, part.act, part.fc2 = nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8)
    with pytest.raises(TargetError, match="a Sequential would treat the submodule as a layer"):
        th.upcycle(nn.Sequential(part, copy.deepcopy(part)), CONFIG)


def test_a_checkpoint_without_its_owner_is_one_clear_error(tmp_path: Path) -> None:
    upcycled("gpt2").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    layers = config["quantization_config"]["layers"]
    del layers["transformer.shared_cores.c_fc_96x24"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        FormatError, match=r"shared_cores.c_fc_96x24.core_1, but config.json does not describe"
    ):
        th.load(tmp_path)
