"""LoRA beside cores: reached by name and by "all-linear", trained, saved, loaded, merged."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path

import pytest
import torch
from hf_models import llama
from peft import LoraConfig, PeftModel, get_peft_model
from pivoted_plans import pivoted as make_pivoted
from torch import nn
from transformers import PreTrainedModel

import tensornet as tn
import tensornet_hf as th
from tensornet.errors import TargetError
from tensornet_hf.peft import (
    LoraNetworkLinear,
    load_adapters,
    lora_config,
    merge_adapters,
)

# PEFT asks transformers for a property under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

IDS = torch.tensor([[5, 7, 9, 11, 13, 6]])
LAYER = "model.layers.0.self_attn.q_proj"
I8 = {"bits_per_weight": 9, "formats": ("int8",), "method": "nearest"}


@cache
def _compressed(topology: str, pivoted: bool) -> PreTrainedModel:
    model = llama().eval()
    config = tn.CompressionConfig(param_ratio=0.5, method="svd", topology=topology)
    plan = tn.plan(model, config)
    tn.apply_plan(model, make_pivoted(plan) if pivoted else plan)
    return model


def compressed(topology: str = "low_rank", *, pivoted: bool = False) -> PreTrainedModel:
    return copy.deepcopy(_compressed(topology, pivoted))


def disturb(model: nn.Module) -> None:
    """Adapters start at zero; give them something to say."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)


def adapted(model: PreTrainedModel, **options: object) -> nn.Module:
    made = get_peft_model(model, lora_config(model, r=3, lora_alpha=6, **options))  # type: ignore[arg-type]
    disturb(made)
    return made.eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("stock", [False, True])
def test_all_linear_means_compressed_and_stock_layers(stock: bool) -> None:
    model = llama().eval() if stock else compressed()
    if stock:  # attention stays dense
        config = tn.CompressionConfig(target_modules="*.mlp.*", param_ratio=0.5, method="svd")
        tn.compress(model, config, progress=False)
    names = lora_config(model).target_modules
    assert LAYER in names
    assert "lm_head" not in names
    made = adapted(model)
    assert len([name for name, _ in made.named_parameters() if "lora_A" in name]) == len(names) == 14
    assert sum(isinstance(x, LoraNetworkLinear) for x in made.modules()) == (6 if stock else 14)


def test_output_is_base_plus_adapter() -> None:
    model = compressed()
    x = torch.randn(3, 24)
    base = model.get_submodule(LAYER)
    made = adapted(model).get_submodule(f"base_model.model.{LAYER}")
    expected = base(x) + 2.0 * x @ made.lora_A["default"].weight.T @ made.lora_B["default"].weight.T
    torch.testing.assert_close(made(x), expected)
    torch.testing.assert_close(made.get_delta_weight("default") @ x.T, (expected - base(x)).T)


def test_a_fresh_adapter_changes_nothing_and_a_disabled_one_neither() -> None:
    model = compressed()
    before = logits(model)
    made = get_peft_model(model, lora_config(model, r=3)).eval()
    torch.testing.assert_close(logits(made), before)
    disturb(made)
    assert not torch.allclose(logits(made), before, atol=1e-4)
    with made.disable_adapter():
        torch.testing.assert_close(logits(made), before)


def test_training_moves_adapters_and_leaves_cores() -> None:
    model = compressed()
    made = get_peft_model(model, lora_config(model, r=3))
    cores = {name: p.detach().clone() for name, p in made.named_parameters() if "core_" in name}
    optimizer = torch.optim.SGD([p for p in made.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(4):
        loss = made(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, parameter in made.named_parameters():
        if name in cores:
            assert torch.equal(parameter, cores[name])
            assert parameter.grad is None


@pytest.mark.parametrize("pivoted", [False, True])
def test_merging_low_rank_is_exact_and_stays_compressed(tmp_path: Path, pivoted: bool) -> None:
    made = adapted(compressed(pivoted=pivoted))
    before = logits(made)
    rank = max(made.get_submodule(f"base_model.model.{LAYER}").base_layer.topology.bond_dims.values())
    merged = merge_adapters(made)
    layer = merged.get_submodule(LAYER)
    assert isinstance(layer, tn.nn.TensorNetworkLinear)
    assert max(layer.topology.bond_dims.values()) == rank + 3
    torch.testing.assert_close(logits(merged), before, atol=1e-4, rtol=1e-4)
    merged.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(th.load(tmp_path).eval()), before, atol=1e-4, rtol=1e-4)


def test_merging_another_topology_makes_it_dense() -> None:
    made = adapted(compressed("mpo"))
    before = logits(made)
    merged = merge_adapters(made)
    assert type(merged.get_submodule(LAYER)) is nn.Linear
    torch.testing.assert_close(logits(merged), before, atol=1e-4, rtol=1e-4)


def test_unmerging_gives_the_layers_back() -> None:
    made = adapted(compressed())
    before = logits(made)
    base = made.get_submodule(f"base_model.model.{LAYER}").base_layer
    made.merge_adapter()
    torch.testing.assert_close(logits(made), before, atol=1e-4, rtol=1e-4)
    made.unmerge_adapter()
    assert made.get_submodule(f"base_model.model.{LAYER}").base_layer is base
    torch.testing.assert_close(logits(made), before)


def test_model_and_adapters_are_saved_apart(tmp_path: Path) -> None:
    """Nothing is written of a model that is saved as a whole: PEFT would write the adapters alone."""
    made = adapted(compressed())
    before = logits(made)
    for whole in (made, made.get_base_model(), nn.DataParallel(made)):
        with pytest.raises(TargetError, match=r"load_adapters.*merge_adapters"):
            th.save(whole, tmp_path / "model")
        assert not (tmp_path / "model").exists()
    made.save_pretrained(tmp_path / "adapters")
    torch.testing.assert_close(
        logits(load_adapters(compressed(), tmp_path / "adapters")), before, rtol=1e-4, atol=1e-4
    )
    with pytest.raises(ValueError, match=r"MPOLinear.*not supported"):
        PeftModel.from_pretrained(compressed(), tmp_path / "adapters")  # PEFT alone does not know our layers
    with pytest.raises(ValueError, match=r"MPOLinear.*not supported"):
        get_peft_model(compressed(), LoraConfig(target_modules=["q_proj"]))
    th.save(made.unload(), tmp_path / "model")
    again = load_adapters(th.load(tmp_path / "model"), tmp_path / "adapters").eval()
    torch.testing.assert_close(logits(again), before, rtol=1e-4, atol=1e-4)


def test_broken_adapter_is_not_merged() -> None:
    made = adapted(compressed())
    layer = made.get_submodule(f"base_model.model.{LAYER}")
    with torch.no_grad():
        layer.lora_A["default"].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="contains NaN"):
        layer.merge()
    assert not layer.merged


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}, {"init_lora_weights": "pissa"}])
def test_adapters_that_need_a_dense_layer_are_refused(options: dict[str, object]) -> None:
    """They would train biases that are never added, or take the first core for the weight and change it."""
    model = compressed()
    with pytest.raises(TargetError, match=r"DoRA|lora_bias|init_lora_weights"):
        get_peft_model(model, lora_config(model, r=4, **options))
    made = get_peft_model(compressed(), lora_config(compressed(), r=4))
    with pytest.raises(TargetError, match=r"DoRA|lora_bias|init_lora_weights"):
        made.add_adapter("other", lora_config(compressed(), r=4, **options))


def test_no_linear_layer() -> None:
    with pytest.raises(TargetError, match="no linear layer"):
        lora_config(nn.Embedding(3, 4))


def test_merging_into_eight_bits_is_said() -> None:
    model = llama().eval()
    tn.compress(model, tn.CompressionConfig(**I8), progress=False)
    made = get_peft_model(model, lora_config(model, r=2))
    before = logits(made)
    with pytest.warns(UserWarning, match="integer cores"):
        made.merge_adapter()
    torch.testing.assert_close(logits(made), before, atol=0.1, rtol=0.1)


def adapted_by_peft() -> PeftModel:
    """Stock layers under stock adapters, which say something from the start."""
    config = LoraConfig(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False)
    return get_peft_model(llama(), config).eval()


@pytest.mark.parametrize("target_modules", [None, "all", "*.q_proj.*"])
def test_layers_under_adapters_are_not_compressed(target_modules: str | None) -> None:
    """Merging would add the adapter to a weight that is not there."""
    made = adapted_by_peft()
    before = logits(made)
    config = tn.CompressionConfig(target_modules=target_modules, **I8)
    told = (
        r"q_proj\.base_layer is wrapped by an adapter.*merge_and_unload.*hf\.peft\.lora_config.*'base_layer'"
    )
    with pytest.raises(TargetError, match=told):
        tn.compress(made, config, progress=False)
    torch.testing.assert_close(logits(made), before, atol=0, rtol=0)


def test_adapters_stay_beside_layers_that_are_left_dense() -> None:
    made = adapted_by_peft()
    with pytest.warns(UserWarning, match=r"q_proj\.lora_A\.default"):
        report = tn.compress(made, tn.CompressionConfig(exclude_modules="base_layer", **I8), progress=False)
    assert "of an adapter" in str(report.coverage)
    assert len(report.plan) == 10
    before = logits(made)
    merged = merge_adapters(made)
    assert isinstance(merged.get_submodule("model.layers.0.mlp.up_proj"), tn.nn.TensorNetworkLinear)
    torch.testing.assert_close(logits(merged), before, atol=1e-5, rtol=1e-5)


def test_adapters_that_merge_into_cores_let_dense_layers_be_compressed_again() -> None:
    made = tn.decompress(adapted(compressed(), target_modules=["q_proj"]))
    assert isinstance(made.get_submodule(f"base_model.model.{LAYER}"), LoraNetworkLinear)
    with pytest.warns(UserWarning, match="Left dense"):
        tn.compress(made, tn.CompressionConfig(param_ratio=0.5, method="svd"), progress=False)
    before = logits(made)
    torch.testing.assert_close(logits(merge_adapters(made)), before, atol=1e-4, rtol=1e-4)


def test_stock_adapters_over_cores_do_not_merge() -> None:
    made = adapted_by_peft()
    layer = made.get_submodule(f"base_model.model.{LAYER}")
    held = nn.ModuleList([layer.base_layer])
    tn.compress(held, tn.CompressionConfig(**I8), progress=False)
    layer.base_layer = held[0]
    before = logits(made)
    with pytest.raises(TargetError, match=r"q_proj\.base_layer is compressed.*tensornet\.decompress"):
        merge_adapters(made)
    torch.testing.assert_close(logits(made), before, atol=0, rtol=0)
    with pytest.raises(TargetError, match="compressed layer"):
        copy.deepcopy(made).merge_and_unload()
    merged = merge_adapters(tn.decompress(made))
    torch.testing.assert_close(logits(merged), before, atol=1e-5, rtol=1e-5)
