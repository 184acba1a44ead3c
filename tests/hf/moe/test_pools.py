"""Pools of experts in Hugging Face models: what upcycling starts from, owned once, saved, loaded, trained."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import ARCHITECTURES, enable_checkpointing, logits
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

import tensornet_hf as th
import tensornet_moe as tm
from tensornet.errors import FormatError, NonFiniteError, ShapeError, TargetError
from tensornet_hf.checkpoint import read_checkpoint
from tensornet_moe.pool import find_pools

#: Four experts of its own for a layer of GPT-2, two for one of T5.
POOL: dict[str, Any] = {"pool": "all", "experts": 8}


def upcycled(name: str, **words: Any) -> PreTrainedModel:
    model = ARCHITECTURES[name].dense
    th.upcycle(model, **words)
    return model


def mixtures(model: nn.Module) -> list[tm.SharedCoreMoE]:
    return [module for module in model.modules() if isinstance(module, tm.SharedCoreMoE)]


# --- the start -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gpt2", POOL),
        ("t5_relu", POOL),
        ("t5_gated", {"pool": 2, "experts": 5}),
        ("llama", {**POOL, "router": "switch", "normalize": True}),
        ("bert", {**POOL, "noise": 0.0, "share": "none"}),
        *(("gpt2", {"experts": 3, "share": share}) for share in ("none", "base", "center")),
    ],
)
def test_the_model_computes_what_it_did(name: str, words: dict[str, Any]) -> None:
    architecture, model = ARCHITECTURES[name], upcycled(name, **words)
    expected = logits(architecture.dense, architecture)
    torch.testing.assert_close(logits(model, architecture), expected, atol=1e-4, rtol=1e-4)
    sizes = {len({id(m.experts.pool) for m in mixtures(model)})} if "pool" in words else set()
    assert sizes == (
        {2} if words.get("pool") == 2 and name == "t5_gated" else {1} if "pool" in words else set()
    )


@pytest.mark.parametrize("words", [POOL, {**POOL, "normalize": True, "bias_rate": 0.03, "jitter": 0.2}])
def test_a_layer_chooses_its_own_experts_whatever_the_token(words: dict[str, Any]) -> None:
    layers = mixtures(upcycled("t5_relu", **words).train())
    tokens = torch.cat([scale * torch.randn(200, 24) for scale in (1e-3, 1.0, 1e3, 1e6)])
    for place, layer in enumerate(layers):
        assert set((layer.router(tokens).expert_indices % 4).flatten().tolist()) == {place}


def test_biases_fade_until_a_layer_uses_all_experts() -> None:
    model = upcycled("gpt2", **POOL, balance="layer", bias_rate=0.05).train()
    layer, x = mixtures(model)[0], torch.randn(50, 24)
    chosen = []
    for _ in range(8):
        for other in mixtures(model):
            other(x)
        chosen.append(set(layer.router(x).expert_indices.flatten().tolist()))
        tm.update_biases(model)
    assert chosen[0] <= {0, 2, 4, 6}
    assert set().union(*chosen) > {0, 2, 4, 6}


@pytest.mark.parametrize("share", ["center", "base"])
@torch.no_grad()
def test_different_networks_with_one_center_have_the_error_of_the_report(share: str) -> None:
    dense, model = (ARCHITECTURES["gpt2"].dense for _ in range(2))
    report = th.upcycle(model, **POOL, share=share)
    experts = model.transformer.expert_pools.pool.experts
    errors = []
    for name in ("c_fc", "c_proj"):
        want = torch.stack([getattr(dense.transformer.h[e % 2].mlp, name).weight.T for e in range(8)])
        errors.append(float((experts.bank(name).expert_matrices() - want).norm() / want.norm()))
    assert max(layer.error for layer in report.layers) == pytest.approx(max(errors), rel=1e-4)
    assert 0.1 < max(errors) < 1
    assert (report.pools, report.layers[0].params) == (1, 8 * 24)
    assert report.across_params == sum(p.numel() for p in experts.parameters())
    assert f"8 experts in 1 pool: {report.dense_params:,}" in str(report)


def test_words_mean_what_they_do_in_a_mixture() -> None:
    for share in ("none", "center", "base"):
        model = upcycled("llama", share=share, experts=3, top_k=2, balance_coef=0.5, normalize=True)
        same = {"activation": "silu", "balance_coef": 0.5, "combine": "unit", "normalize": True}
        want = tm.mixture(d_model=24, d_ff=44, experts=3, top_k=2, share=share, **same)  # type: ignore[arg-type]
        found = mixtures(model)[0].spec()
        assert found["router"] == want.router.spec()
        assert found["balance_coef"] == 0.5
        banks, wanted = found["experts"]["matrices"], want.spec()["experts"]["matrices"]
        assert [banks[f"{name}_proj"] for name in wanted] == list(wanted.values())


# --- saving and loading --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [("gpt2", {**POOL, "share": "center"}), ("t5_relu", {"pool": 2, "experts": 4}), ("bert", POOL)],
)
def test_saved_once_and_loaded_by_both_doors(name: str, words: dict[str, Any], tmp_path: Path) -> None:
    architecture, model = ARCHITECTURES[name], upcycled(name, **words)
    with torch.no_grad():  # biases that are not those of the start
        mixtures(model)[0].router.bias_steps += torch.arange(len(mixtures(model)[0].router.bias_steps))
    model.save_pretrained(tmp_path)
    pools = find_pools(model)
    assert len(pools) == (2 if words.get("pool") == 2 else 1)
    stored = {n for n in read_checkpoint(tmp_path).tensors if "core_" in n}
    assert stored == {f"{p}.{n}" for p, x in pools.items() for n in x.state_dict() if "core_" in n} != set()
    for loaded in (th.load(tmp_path), type(model).from_pretrained(tmp_path)):
        torch.testing.assert_close(
            logits(loaded, architecture), logits(model, architecture), rtol=1e-4, atol=1e-4
        )
        assert list(find_pools(loaded)) == list(pools)
        assert [m.spec() for m in mixtures(loaded)] == [m.spec() for m in mixtures(model)]
        assert torch.equal(mixtures(loaded)[0].router.bias_steps, mixtures(model)[0].router.bias_steps)
    inputs = architecture.inputs(labels=True)
    loaded.train()(**inputs).loss.backward()
    assert all(p.grad is not None for pool in find_pools(loaded).values() for p in pool.parameters())


def test_a_body_alone_has_the_pool(tmp_path: Path) -> None:
    model = upcycled("gpt2", **POOL).eval()
    model.save_pretrained(tmp_path)
    body = AutoModel.from_pretrained(tmp_path)
    inputs = ARCHITECTURES["gpt2"].inputs()
    wanted = model.transformer(**inputs).last_hidden_state
    torch.testing.assert_close(body(**inputs).last_hidden_state, wanted, rtol=1e-4, atol=1e-4)
    assert list(find_pools(body)) == ["expert_pools.pool"]


def test_classes_with_and_without_a_head_share_checkpoints(tmp_path: Path) -> None:
    model = upcycled("gpt2", **POOL, share="center").eval()
    model.save_pretrained(tmp_path / "head")
    AutoModel.from_pretrained(tmp_path / "head").save_pretrained(tmp_path / "body")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "body")
    inputs = ARCHITECTURES["gpt2"].inputs(labels=False)
    wanted = model.transformer(**inputs).last_hidden_state
    torch.testing.assert_close(back.transformer(**inputs).last_hidden_state, wanted, rtol=1e-4, atol=1e-4)
    assert list(find_pools(back)) == ["transformer.expert_pools.pool"]


def by_hand(place: str) -> PreTrainedModel:
    """A model whose mixtures, each with a range of a pool's experts, were not made by `upcycle`."""
    torch.manual_seed(0)
    model = ARCHITECTURES["llama"].dense
    pool = tm.ExpertPool(tm.mixture(d_model=24, d_ff=8, experts=4).experts)
    for k, layer in enumerate(model.model.layers):
        layer.mlp = tm.mixture(d_model=24, pool=pool, experts=range(2 * k, 2 * k + 2))
    owner, _, name = place.rpartition(".")
    if place == "model.pools.0":
        model.model.pools = nn.ModuleList([pool])
    elif place:
        model.get_submodule(owner).add_module(name, pool)
    return model.eval()


@pytest.mark.parametrize("place", ["pool", "model.pool", "model.layers.0.pool", "model.pools.0"])
def test_a_pool_made_by_hand_is_loaded_where_it_was(place: str, tmp_path: Path) -> None:
    model = by_hand(place)
    th.save(model, tmp_path)
    for loaded in (th.load(tmp_path).eval(), type(model).from_pretrained(tmp_path).eval()):
        torch.testing.assert_close(
            logits(loaded, ARCHITECTURES["llama"]),
            logits(model, ARCHITECTURES["llama"]),
            rtol=1e-4,
            atol=1e-4,
        )
        assert list(find_pools(loaded)) == [place]
        assert [layer.experts.experts for layer in mixtures(loaded)] == [range(2), range(2, 4)]


def test_a_pool_that_no_model_owns_is_not_saved(tmp_path: Path) -> None:
    model = by_hand("")
    with pytest.raises(TargetError, match=r"model\.pool = pool"):
        th.save(model, tmp_path / "saved")
    with pytest.raises(TargetError, match=r"model\.pool = pool"):
        model.save_pretrained(tmp_path / "written")
    assert not (tmp_path / "saved").exists()
    assert not list((tmp_path / "written").glob("*.safetensors"))


def test_experts_of_the_callers_own_in_a_pool() -> None:
    """A function gets the matrices of all layers of the pool, and makes as many experts as it likes."""
    dense, model = (ARCHITECTURES["gpt2"].dense for _ in range(2))
    seen: list[tuple[int, ...]] = []

    def every_layer_twice(weights: torch.Tensor) -> tm.SharedCoreExperts:
        seen.append(tuple(weights.shape))
        return tm.SharedCoreExperts.from_experts(weights.repeat(2, 1, 1), share="none")

    report = th.upcycle(model, experts=every_layer_twice, pool="all")
    assert (report.num_experts, seen) == (4, [(2, 96, 24), (2, 24, 96)])
    expected = logits(dense, ARCHITECTURES["gpt2"])
    torch.testing.assert_close(logits(model, ARCHITECTURES["gpt2"]), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("lost", ["description", "tensors", "both"])
def test_a_checkpoint_without_its_pool_is_one_clear_error(lost: str, tmp_path: Path) -> None:
    upcycled("gpt2", **POOL).save_pretrained(tmp_path)
    pool, weights = "transformer.expert_pools.pool", tmp_path / "model.safetensors"
    if lost != "tensors":
        config = json.loads((tmp_path / "config.json").read_text())
        del config["quantization_config"]["layers"][pool]
        (tmp_path / "config.json").write_text(json.dumps(config))
    if lost != "description":
        kept = {name: x for name, x in load_file(weights).items() if not name.startswith(pool)}
        save_file(kept, weights, metadata={"format": "pt"})
    message = {
        "description": r"expert_pools\.pool.* config\.json does not describe",
        "tensors": r"expert_pools\.pool.* is missing",
        "both": r"pool labelled 'pool', of which GPT2LMHeadModel has 0",
    }
    with pytest.raises(FormatError, match=message[lost]):
        th.load(tmp_path)


# --- training ------------------------------------------------------------------------------------


def test_a_step_trains_the_pool_with_the_gradients_of_all_layers() -> None:
    inputs, model = ARCHITECTURES["gpt2"].inputs(labels=True), upcycled("gpt2", **POOL).train()
    copies, checked = copy.deepcopy(model), copy.deepcopy(model)
    for layer in mixtures(copies):
        layer.experts = copy.deepcopy(layer.experts.pool.experts)
    enable_checkpointing(checked)
    for run in (model, copies, checked):
        run(**inputs, use_cache=False).loss.backward()
    pool = model.transformer.expert_pools.pool
    for name, parameter in pool.experts.named_parameters():
        each = [layer.experts.get_parameter(name).grad for layer in mixtures(copies)]
        torch.testing.assert_close(parameter.grad, sum(each), atol=1e-6, rtol=1e-4, msg=name)
    for (name, a), b in zip(model.named_parameters(), checked.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-6, rtol=1e-4, msg=name)
    before = copy.deepcopy(pool.state_dict())
    optimizer = torch.optim.AdamW(tm.parameter_groups(model, lr=1e-3))
    assert [group["sharers"] for group in optimizer.param_groups] == [1, 2]
    optimizer.step()
    tm.update_biases(model)
    layers = mixtures(model)
    assert layers[0].experts.pool is layers[1].experts.pool is pool
    assert not torch.equal(before["experts.c_fc.core_matrix"], pool.experts.bank("c_fc").core("matrix"))


def test_parameters_that_layers_share_by_hand_are_saved_once(tmp_path: Path) -> None:
    model = upcycled("gpt2", **POOL).eval()
    first, second = (model.get_submodule(f"transformer.h.{k}.attn.c_attn") for k in (0, 1))
    second.weight = first.weight  # which the class of the model does not tie
    for number in range(2):  # what was loaded can be saved again
        th.save(model, tmp_path / str(number))
        stored = load_file(tmp_path / str(number) / "model.safetensors")
        assert not stored.keys() >= {f"transformer.h.{k}.attn.c_attn.weight" for k in (0, 1)}
        loaded = th.load(tmp_path / str(number)).eval()
        torch.testing.assert_close(
            logits(loaded, ARCHITECTURES["gpt2"]), logits(model, ARCHITECTURES["gpt2"])
        )
        model = loaded
        first, second = (model.get_submodule(f"transformer.h.{k}.attn.c_attn") for k in (0, 1))
        assert first.weight is second.weight


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": "ends"}, "share='ends'"),
        ({"pool": "layers"}, r"pool.*at least 2"),
        ({"pool": 1}, "got 1"),
        ({"pool": 2, "balance": "expert"}, "Unknown balance='expert'"),
        ({"pool": 2, "router": "expert_choice"}, 'A pool needs router="switch" or "topk"'),
        ({"pool": 2, "bias_rate": 0.0}, "bias_rate above 0"),
        ({"bias_rate": -1.0}, "bias_rate"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        th.upcycle(nn.Linear(2, 2), **options)


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        ({"pool": 3, "experts": 8}, ValueError, "pool=3"),
        ({"pool": "all", "experts": 7}, ValueError, r"top_k=2.*at least 8"),
        ({"pool": "all", "experts": 2, "top_k": 3}, ValueError, "top_k=3 with experts=2"),
        ({"experts": 4, "share": "base", "noise": 0.1}, ValueError, r"noise=0\.1"),
        (
            {"pool": "all", "target_modules": ["encoder.block.0.layer.1.DenseReluDense"]},
            ValueError,
            "only network",
        ),
        ({"num_experts": 3}, TypeError, r"num_experts; similar.*'experts'"),
        ({"d_ff": 3}, TypeError, "d_ff"),
    ],
)
def test_words_that_do_not_fit_leave_the_model_as_it_was(
    words: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = ARCHITECTURES["t5_relu"].dense
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(error, match=message):
        th.upcycle(model, **words)
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_layers_that_differ_cannot_use_one_pool() -> None:
    model = ARCHITECTURES["llama"].dense
    other = copy.deepcopy(model.model.layers[1].mlp)
    model.model.layers[1].mlp.act_fn = nn.ReLU()
    with pytest.raises(ShapeError, match=r"same pool.*relu"):
        th.upcycle(model, **POOL)
    for name in ("gate_proj", "up_proj", "down_proj"):
        layer = getattr(other, name)
        layer.weight = nn.Parameter(layer.weight[:20] if name != "down_proj" else layer.weight[:, :20])
    model.model.layers[1].mlp = other
    with pytest.raises(ShapeError, match=r"\(44, 24\).*\(20, 24\).*target_modules"):
        th.upcycle(model, **POOL)


def test_models_without_a_place_for_a_pool_are_refused() -> None:
    part = nn.Sequential()
    part.fc1, part.act, part.fc2 = nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8)
    with pytest.raises(TargetError, match="Sequential"):
        th.upcycle(nn.Sequential(part, copy.deepcopy(part)), **POOL)
    model = ARCHITECTURES["t5_relu"].dense
    th.upcycle(model, pool=2, experts=4, target_modules=["encoder.*.DenseReluDense"])
    with pytest.raises(TargetError, match="already use"):
        th.upcycle(model, pool=2, experts=4, target_modules=["decoder.*.DenseReluDense"])


def test_a_weight_with_nan_is_named() -> None:
    model = ARCHITECTURES["gpt2"].dense
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"h\.1\.mlp\.c_proj: .*NaN"):
        th.upcycle(model, **POOL)
