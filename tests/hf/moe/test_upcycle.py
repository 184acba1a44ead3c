"""Upcycling Hugging Face models: same function, saved and loaded, losses that respect padding."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hf_models import ARCHITECTURES, chains, enable_checkpointing, logits
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import tensornet as tn
import tensornet_hf as th
import tensornet_moe as tm
from tensornet.errors import FormatError, NonFiniteError, TargetError, TopologyError
from tensornet_hf.checkpoint import read_checkpoint
from tensornet_hf.embedded import gpt2_path
from tensornet_hf.feed_forwards import INSIDE, DoneBefore

CONFIG = chains(experts=4, sites=3)
THREE = chains(experts=3, sites=3)
WORDS = {"experts": 4}


def upcycled(name: str, config: dict[str, Any] = CONFIG) -> PreTrainedModel:
    model = ARCHITECTURES[name].dense
    th.upcycle(model, **config)
    return model


def mixtures(model: nn.Module) -> list[tm.SharedCoreMoE]:
    return [module for module in model.modules() if isinstance(module, tm.SharedCoreMoE)]


# --- the same function ---------------------------------------------------------------------------


TOPK = chains(experts=4, sites=3, router="topk", top_k=2)
NOISY = {**TOPK, "noise": 0.1}
CHOICE = {**CONFIG, "router": "expert_choice", "capacity_factor": 4.0}
POOLED = {"experts": 8, "pool": "all", "share": "center", "noise": 0.1}


def with_ends(weights: torch.Tensor) -> tm.SharedCoreExperts:
    """Experts whose ends are shared, in chains of the caller's own legs."""
    legs = {24: (2, 3, 4), 96: (4, 4, 6)}
    out_dims, in_dims = (legs[size] for size in weights.shape[1:])
    topology = tn.topologies.mpo(out_dims=out_dims, in_dims=in_dims)
    return tm.SharedCoreExperts.from_dense(weights[0], num_experts=4, topology=topology, share="ends")


#: Models and options after which a model computes what it did before, for any routing.
SAME = [
    *((name, CONFIG) for name in ("gpt2", "t5_relu", "t5_gated", "llama")),
    ("gpt2", TOPK),
    ("gpt2", chains(experts=4, sites=1)),  # Switch: dense experts
    ("gpt2", {"experts": with_ends}),
    ("bert", {**CONFIG, "capacity_factor": 4.0}),
    *(("gpt2", {**WORDS, "share": share}) for share in ("none", "center", "base")),
    ("t5_gated", {**WORDS, "shared_expert": 12}),
    ("bert", CHOICE),
    ("vit", {**CHOICE, "matrices": ("fc1", "fc2")}),
]


@pytest.mark.parametrize(("name", "config"), SAME)
def test_upcycled_model_computes_what_the_dense_one_did(name: str, config: dict[str, Any]) -> None:
    architecture = ARCHITECTURES[name]
    model = upcycled(name, config)
    expected = logits(architecture.dense, architecture)
    torch.testing.assert_close(logits(model, architecture), expected, atol=1e-4, rtol=1e-4)
    assert len(mixtures(model)) == (4 if name.startswith("t5") else 2)
    assert all(type(m.router).causal == (config.get("router") != "expert_choice") for m in mixtures(model))


def test_biases_and_dropout_come_along() -> None:
    gpt2 = ARCHITECTURES["gpt2"].dense
    gpt2.transformer.h[0].mlp.dropout.p = 0.25
    nn.init.normal_(gpt2.transformer.h[0].mlp.c_fc.bias)
    bias = gpt2.transformer.h[0].mlp.c_fc.bias.detach().clone()
    th.upcycle(gpt2, **CONFIG)
    moe = gpt2.transformer.h[0].mlp
    assert torch.equal(moe.experts.c_fc_bias.detach(), bias.expand(4, -1))
    assert (moe.dropout, moe.experts.dropout) == (0.25, 0.0)
    t5 = ARCHITECTURES["t5_relu"].dense
    t5.encoder.block[0].layer[1].DenseReluDense.dropout.p = 0.25
    th.upcycle(t5, **CONFIG)
    moe = t5.encoder.block[0].layer[1].DenseReluDense
    assert (moe.dropout, moe.experts.dropout) == (0.0, 0.25)


def test_the_report_counts() -> None:
    model = ARCHITECTURES["gpt2"].dense
    before = sum(p.numel() for p in model.parameters())
    report = th.upcycle(model, **CONFIG)
    after = sum(p.numel() for p in model.parameters())
    assert report.params - report.dense_params == after - before
    assert len(report.layers) == 2
    assert report.layers[0].shared_params == sum(p.numel() for p in tm.shared_parameters(mixtures(model)[0]))
    assert report.dense_experts_ratio == report.params / (4 * report.dense_params)
    assert report.to_dict()["layers"][1]["name"] == "transformer.h.1.mlp"
    assert "2 feed-forward networks became 4 experts each" in str(report)


def test_noise_and_routers_are_drawn_from_the_seed() -> None:
    config = chains(experts=4, sites=3, noise=0.1, seed=3)
    torch.manual_seed(1)
    first = upcycled("gpt2", config)
    torch.manual_seed(2)
    second = upcycled("gpt2", config)
    for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b), name
    routers = [m.router.weight for m in mixtures(first)]
    assert not torch.equal(routers[0], routers[1])


def test_a_shared_network_stays_shared() -> None:
    model = ARCHITECTURES["gpt2"].dense
    model.transformer.h[1].mlp = model.transformer.h[0].mlp
    report = th.upcycle(model, **CONFIG)
    assert len(report.layers) == 1
    assert model.transformer.h[1].mlp is model.transformer.h[0].mlp


# --- saving, loading, generating -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("gpt2", POOLED),
        ("t5_relu", POOLED),
        ("bert", POOLED),
        *(pytest.param(x, NOISY, marks=pytest.mark.slow) for x in ("gpt2", "t5_relu", "t5_gated", "llama")),
    ],
)
def test_saved_and_loaded_by_both_doors(name: str, config: dict[str, Any], tmp_path: Path) -> None:
    architecture, model = ARCHITECTURES[name], upcycled(name, config)
    model.save_pretrained(tmp_path)
    owned = {n for n, p in model.named_parameters() if n.endswith("core_1") and "expert_pools.pool." in n}
    if config.get("pool") is not None:  # stored once, in the pool
        assert owned == {n for n in read_checkpoint(tmp_path).tensors if n.endswith("core_1")} != set()
    for loaded in (th.load(tmp_path), type(model).from_pretrained(tmp_path)):
        torch.testing.assert_close(
            logits(loaded, architecture), logits(model, architecture), rtol=1e-4, atol=1e-4
        )
        assert [m.spec() for m in mixtures(loaded)] == [m.spec() for m in mixtures(model)]
        assert len(tm.shared_parameters(loaded)) == len(tm.shared_parameters(model))
        # Owned once, there is nothing to tie: transformers is told of its own pairs only.
        assert loaded.all_tied_weights_keys == architecture.dense.all_tied_weights_keys
        inputs = architecture.inputs(labels=True)
        loaded.train()(**inputs).loss.backward()
        assert float(mixtures(loaded)[0].router.weight.grad.abs().sum()) > 0


def test_a_checkpoint_with_another_number_of_experts_is_one_clear_error(tmp_path: Path) -> None:
    upcycled("gpt2").save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"num_experts": 4', '"num_experts": 6'))
    with pytest.raises(FormatError, match=r"\[4, 24\].*\[6, 24\]"):
        th.load(tmp_path)


@pytest.mark.parametrize("name", ["gpt2", "t5_gated"])
def test_generates_the_same_with_and_without_cache_and_prepared(name: str, tmp_path: Path) -> None:
    # In float32 ties of rounding would say nothing of the cache.
    model = upcycled(name, chains(experts=4, sites=3, noise=0.3)).eval().double()
    inputs = ARCHITECTURES[name].inputs(labels=False)
    inputs = {k: v for k, v in inputs.items() if not k.startswith("decoder")}
    with_cache, without = (
        model.generate(**inputs, max_new_tokens=8, do_sample=False, use_cache=cache)
        for cache in (True, False)
    )
    assert torch.equal(with_cache, without)
    tn.nn.prepare_for_inference(model)
    assert not any(isinstance(m, tm.SharedCoreExperts) for m in model.modules())
    assert torch.equal(model.generate(**inputs, max_new_tokens=8, do_sample=False), without)
    with pytest.raises(TargetError, match="cannot be saved"):
        th.save(model, tmp_path / "prepared")


@pytest.mark.slow
# torch's own: dynamo looks at .grad of whatever enters a graph, here of the losses the hook collects.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_copies_in_half_precision_and_compiles() -> None:
    architecture = ARCHITECTURES["gpt2"]
    model = upcycled("gpt2")
    model.transformer.h = model.transformer.h[:1]
    model.loss_type = "ForCausalLM"  # transformers logs a warning otherwise, which cannot be compiled
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    inputs = architecture.inputs(labels=True)
    for run in (model, compiled):
        run.train()
        run(**inputs).loss.backward()
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-4, msg=name)
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert half.eval()(**inputs).logits.dtype == torch.bfloat16


# --- losses --------------------------------------------------------------------------------------


def task_loss(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The model's own loss, its mixtures silenced."""
    quiet = copy.deepcopy(model)
    for moe in mixtures(quiet):
        moe.balance_coef = moe.z_coef = 0.0
    return quiet(**inputs).loss


@pytest.mark.parametrize("name", ["gpt2", "t5_relu"])
def test_auxiliary_losses_join_in_training_only(name: str) -> None:
    model = upcycled(name, chains(experts=4, sites=3, balance_coef=0.5, z_coef=0.25))
    inputs = ARCHITECTURES[name].inputs(labels=True)
    model.train()
    loss = model(**inputs).loss
    stats = [m.stats for m in mixtures(model)]
    wanted = sum(0.5 * s.balance + 0.25 * s.z for s in stats)
    torch.testing.assert_close(loss - task_loss(model, inputs), wanted, atol=1e-5, rtol=1e-5)
    as_tuple = model(**inputs, return_dict=False)[0]
    torch.testing.assert_close(as_tuple, loss)
    share = 0.25
    items = inputs["labels"].ne(-100).sum() / share
    part = model(**inputs, num_items_in_batch=items).loss if name == "gpt2" else None
    if part is not None:
        quiet = task_loss(model, {**inputs, "num_items_in_batch": items})
        torch.testing.assert_close(part - quiet, share * wanted, atol=1e-5, rtol=1e-5)
    model.eval()
    torch.testing.assert_close(model(**inputs).loss, task_loss(model, inputs))


@pytest.mark.parametrize("by_hand", [True, False])
def test_saving_and_loading_do_not_change_the_loss(by_hand: bool, tmp_path: Path) -> None:
    """The loop of a mixture put in by hand adds its losses; those of `upcycle` join the model's loss."""
    inputs = ARCHITECTURES["gpt2"].inputs(labels=True)
    if by_hand:
        model = ARCHITECTURES["gpt2"].dense
        width = model.config.n_embd
        model.transformer.h[1].mlp = tm.mixture(d_model=width, d_ff=24, experts=4, balance_coef=0.5)
    else:
        model = upcycled("gpt2", chains(experts=4, sites=3, balance_coef=0.5))
    th.save(model, tmp_path / "saved")
    for each in (model, th.load(tmp_path / "saved")):
        for module in each.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        each.train()
        loss, task = each(**inputs).loss, task_loss(each, inputs)
        if by_hand:
            torch.testing.assert_close(loss, task)
            assert float(tm.collect_aux_losses(each).total.detach()) > 0.25
        else:
            assert float((loss - task).detach()) > 0.25


def test_padding_of_a_decoder_counts_for_nothing() -> None:
    model = upcycled("gpt2").train()
    ids = torch.randint(3, 100, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0  # padded left
    model(input_ids=ids, attention_mask=mask, labels=ids)
    assert [int(m.stats.load.sum()) for m in mixtures(model)] == [14, 14]
    model(
        ids, None, mask, labels=ids
    )  # by position, as in forward(input_ids, past_key_values, attention_mask)
    assert [int(m.stats.load.sum()) for m in mixtures(model)] == [14, 14]
    model(input_ids=ids, labels=ids)
    assert [int(m.stats.load.sum()) for m in mixtures(model)] == [18, 18]
    model.transformer(input_ids=ids, attention_mask=mask)  # the body alone
    assert [int(m.stats.load.sum()) for m in mixtures(model)] == [14, 14]


def test_padding_of_encoder_and_decoder_counts_for_nothing() -> None:
    model = upcycled("t5_relu").train()
    ids, labels = torch.randint(3, 100, (2, 7)), torch.randint(3, 100, (2, 7))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    labels[0, 3:] = -100
    model(input_ids=ids, attention_mask=mask, labels=labels)
    assert [int(m.stats.load.sum()) for m in mixtures(model)] == [12, 12, 10, 10]
    model(input_ids=ids, decoder_input_ids=labels.clamp_min(0), decoder_attention_mask=(labels >= 0).long())
    assert [int(m.stats.load.sum()) for m in mixtures(model)] == [14, 14, 10, 10]
    model.get_encoder()(input_ids=ids, attention_mask=mask)
    assert [int(m.stats.load.sum()) for m in mixtures(model)][:2] == [12, 12]
    model.eval().generate(ids[:, :5], max_new_tokens=3)  # other shapes than the call before


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    inputs = ARCHITECTURES["gpt2"].inputs(labels=True)
    plain = upcycled("gpt2").train()
    checked = copy.deepcopy(plain)
    enable_checkpointing(checked)
    for model in (plain, checked):
        model(**inputs, use_cache=False).loss.backward()
    for (name, a), b in zip(plain.named_parameters(), checked.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b[1].grad, atol=1e-6, rtol=1e-5, msg=name)


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"top_k": 9}, ValueError, "top_k=9 with experts=8"),
        ({"top_k": 2, "router": "switch"}, TypeError, 'top_k=2 needs router="topk"'),
        ({"router": "hash"}, ValueError, "Unknown router 'hash'"),
        ({"experts": 0}, ValueError, "experts"),
        ({"share": "ends"}, ValueError, "Unknown share='ends'"),
        ({"rank": 0, "share": "base"}, ValueError, "rank"),
        ({"rank": 2}, ValueError, "rank= is"),
        ({"capacity_factor": float("nan")}, ValueError, "capacity_factor"),
        ({"num_experts": 5}, TypeError, "num_experts"),
        ({"noise": -0.1}, ValueError, "noise"),
        ({"z_coef": float("nan")}, ValueError, "z_coef"),
        ({"balance_coef": -1.0}, ValueError, "balance_coef"),
        ({"jitter": 1.0}, ValueError, "jitter"),
        ({"balance": "layer"}, ValueError, "balance='layer' needs pool="),
        ({"target_modules": "mlp"}, ValueError, r"target_modules.*'mlp'"),
        ({"combine": "x"}, ValueError, "combine"),
        ({"share_across_layers": True}, TypeError, r"similar are \['shared_expert'|options are"),
        ({"top_p": 0.5}, TypeError, "top_p"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        th.upcycle(nn.Linear(2, 2), **options)


def test_experts_that_do_not_fit_name_their_matrix() -> None:
    model = ARCHITECTURES["gpt2"].dense
    before = {name: type(module) for name, module in model.named_modules()}
    legs = {"out_dims": (2, 2), "in_dims": (4, 4)}
    with pytest.raises(TopologyError, match=r"h\.0\.mlp\.c_fc: .*less than"):
        th.upcycle(model, experts=lambda w: tm.SharedCoreExperts.from_dense(w[0], num_experts=2, **legs))
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_the_words_are_those_of_a_mixture() -> None:
    """`mixture` and `upcycle` have the same words, and the same defaults for each."""
    signature = inspect.signature(tm.mixture).parameters
    options = inspect.signature(th.upcycle).parameters
    only_new = {"d_model", "d_ff", "activation", "gated", "device", "dtype"}
    only_upcycled = {"model", "balance", "noise", "seed", "target_modules", "matrices", "causal", "progress"}
    assert signature.keys() - only_new == options.keys() - only_upcycled
    assert options["experts"].default == 8  # None in a mixture, since a pool has experts already
    for name in signature.keys() - only_new - {"experts", "router_options"}:
        assert signature[name].default == options[name].default, name


def test_a_weight_with_nan_is_named() -> None:
    model = ARCHITECTURES["gpt2"].dense
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"transformer\.h\.1\.mlp\.c_proj: .*1 NaN"):
        th.upcycle(model, **CONFIG)


def test_mixtures_are_not_upcycled_again() -> None:
    with pytest.raises(TargetError, match=r"mixtures already.*transformer\.h\.0\.mlp"):
        th.upcycle(upcycled("gpt2"), **CONFIG)


@pytest.mark.slow
def test_five_sites_by_default() -> None:
    model = AutoModelForCausalLM.from_pretrained(gpt2_path()).eval()
    ids = torch.randint(0, model.config.vocab_size, (2, 64))
    with torch.no_grad():
        before = model(ids).logits
        report = th.upcycle(model, **chains(experts=8))
        torch.testing.assert_close(model(ids).logits, before, atol=1e-3, rtol=1e-3)
    assert report.layers[0].error < 1e-5
    assert len(model.transformer.h[0].mlp.experts.bank("c_fc").topology.core_names) == 5


# --- which networks may use later tokens ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_capacities_are_refused_where_tokens_see_only_earlier_ones(name: str) -> None:
    model = ARCHITECTURES[name].dense
    with pytest.raises(TargetError, match=r"capacity_factor=1.0 .* Leave out capacity_factor="):
        th.upcycle(model, **{**CONFIG, "capacity_factor": 1.0})
    assert len(mixtures(model)) == 0
    th.upcycle(model, **{**CONFIG, "capacity_factor": 1.0}, causal=False)


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2", "opt"])
def test_expert_choice_is_refused_where_tokens_see_only_earlier_ones(name: str) -> None:
    model = ARCHITECTURES[name].dense
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(TargetError, match=r"2 of 2 .*encoder"):
        th.upcycle(model, **CHOICE)
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_expert_choice_in_an_encoder_decoder_is_for_the_encoder() -> None:
    model = ARCHITECTURES["t5_relu"].dense
    with pytest.raises(TargetError, match=r"2 of 4 .*decoder\.block\.0"):
        th.upcycle(model, **CHOICE)
    th.upcycle(model, **{**CHOICE, "target_modules": ["encoder.block.*.DenseReluDense"]})
    assert len(mixtures(model)) == len(mixtures(model.get_encoder())) == 2


class Network(nn.Module):
    """A model that declares nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj, self.act, self.down_proj = nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act(self.up_proj(x)))


@pytest.mark.parametrize("causal", [None, True])
def test_other_models_are_refused_unless_the_caller_declares_them(causal: bool | None) -> None:
    with pytest.raises(TargetError, match="causal=False"):
        th.upcycle(nn.ModuleDict({"ffn": Network()}), **CHOICE, causal=causal)
    model = nn.ModuleDict({"ffn": Network()})
    assert len(th.upcycle(model, **CHOICE, causal=False).layers) == 1


def switch_transformers() -> PreTrainedModel:
    """One dense and one sparse block in the encoder and in the decoder."""
    sizes = {"d_model": 24, "d_kv": 6, "d_ff": 44, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}
    sparse = {"num_experts": 3, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
    config = transformers.SwitchTransformersConfig(
        **sizes, **sparse, vocab_size=101, decoder_start_token_id=0, pad_token_id=0
    )
    return transformers.SwitchTransformersForConditionalGeneration(config).eval()


def test_experts_of_a_model_are_not_upcycled() -> None:
    model = switch_transformers()
    report = th.upcycle(model, **CONFIG)
    assert [layer.name for layer in report.layers] == [
        "encoder.block.0.layer.1.mlp",
        "decoder.block.0.layer.2.mlp",
    ]
    with pytest.raises(TargetError, match="already an expert"):
        th.upcycle(model, **{**CONFIG, "target_modules": ["encoder.*.expert_0"]})
    with pytest.raises(TargetError, match=r"no feed-forward.*already an expert"):
        th.upcycle(model, **CONFIG)


# --- networks with other names, and without a module of their own ------------------------------------------

SMALL: dict[str, Any] = {
    "vocab_size": 40,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}


ENCODER: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "pad_token_id": 0,
}
WHISPER = {"max_source_positions": 20, "suppress_tokens": None, "begin_suppress_tokens": None}
BLOOM = {"vocab_size": 40, "hidden_size": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2}
OPT = {
    "vocab_size": 40,
    "hidden_size": 16,
    "word_embed_proj_dim": 16,
    "ffn_dim": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "bos_token_id": 1,
}
#: Models whose networks lie inside larger layers, by the name of their configuration.
LARGER = {
    "Bert": ("BertForMaskedLM", ENCODER),
    "Roberta": ("RobertaForMaskedLM", ENCODER),
    "XLMRoberta": ("XLMRobertaForMaskedLM", ENCODER),
    "Camembert": ("CamembertForMaskedLM", ENCODER),
    "Electra": ("ElectraForMaskedLM", ENCODER),
    "Bart": ("BartForConditionalGeneration", SMALL),
    "MBart": ("MBartForConditionalGeneration", SMALL),
    "Marian": ("MarianMTModel", SMALL),
    "Whisper": ("WhisperForConditionalGeneration", SMALL | WHISPER),
    "OPT": ("OPTForCausalLM", OPT),
    "Bloom": ("BloomForCausalLM", BLOOM),
}


def larger(name: str) -> transformers.PreTrainedModel:
    kind, options = LARGER[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**options)
    return getattr(transformers, kind)(config).eval()


def outputs(model: nn.Module) -> torch.Tensor:
    ids = torch.tensor([[5, 9, 3, 7], [4, 8, 6, 2]])
    sound = {"input_features": torch.linspace(-1, 1, 6400).reshape(2, 80, 40), "decoder_input_ids": ids}
    with torch.no_grad():
        if "Whisper" in type(model).__name__:
            return model(**sound).logits
        decoder = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
        return model(ids, **decoder).logits


# --- named by the caller -------------------------------------------------------------------------


class Own(nn.Module):
    def __init__(self, *, between: float = 1.0) -> None:
        super().__init__()
        self.expand, self.shrink, self.activation = nn.Linear(8, 12), nn.Linear(12, 8), nn.SiLU()
        self.between = between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shrink(self.between * self.activation(self.expand(x)))


def test_a_network_that_the_caller_names() -> None:
    model = nn.Sequential(Own(), Own())
    x = torch.randn(5, 8)
    wanted = model(x)
    config = chains(experts=2, sites=2, target_modules=["0"], matrices=("expand", "shrink"))
    th.upcycle(model, **config)
    assert isinstance(model[0], tm.SharedCoreMoE)
    assert isinstance(model[1], Own)
    torch.testing.assert_close(model(x), wanted, atol=1e-4, rtol=1e-4)
    tm.collect_aux_losses(model).total.backward()


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (
            nn.Sequential(nn.Linear(4, 4)),
            {},
            "no feed-forward",
        ),
        (nn.Sequential(Own()), {"target_modules": ["mlp"]}, "'mlp' matches"),
        (
            nn.Sequential(Own(between=2.0)),
            {"matrices": ("expand", "shrink"), "target_modules": ["0"]},
            "Own is not",
        ),
        (
            nn.Sequential(Own(between=2.0)),
            {"matrices": ("expand", "shrink")},
            "refused: 0",
        ),
        (
            nn.Sequential(nn.ModuleDict({"up": nn.Linear(4, 6), "down": nn.Linear(6, 4)})),
            {"matrices": ("up", "down"), "target_modules": ["0"]},
            "activation named act",
        ),
    ],
)
def test_no_expert_network_is_one_clear_error(
    model: nn.Module, options: dict[str, Any], message: str
) -> None:
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TargetError, match=message):
        th.upcycle(model, **chains(experts=2, **options))
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert not any(isinstance(module, DoneBefore | tm.SharedCoreMoE) for module in model.modules())


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(TypeError, match="model must be"):
        th.upcycle("gpt2")  # type: ignore[arg-type]


def test_looking_leaves_a_model_as_it_was() -> None:
    model = nn.Sequential(Own(between=2.0)).train()
    model[0].activation.eval()
    with pytest.raises(TargetError, match="checked and refused"):
        th.upcycle(model, **chains(experts=2, matrices=("expand", "shrink")))
    assert [m.training for m in model[0].children()] == [True, True, False]
    assert [type(m) for m in model[0].children()] == [nn.Linear, nn.Linear, nn.SiLU]


# --- without a module of their own ---------------------------------------------------------------


@pytest.mark.parametrize("name", LARGER)
def test_networks_inside_larger_layers(name: str) -> None:
    model = larger(name)
    wanted, before = outputs(model), sum(p.numel() for p in model.parameters())
    report = th.upcycle(model, **THREE)
    assert 2 * len(mixtures(model)) == sum(isinstance(m, DoneBefore) for m in model.modules()) > 0
    torch.testing.assert_close(outputs(model), wanted, atol=1e-4, rtol=1e-4)
    assert sum(p.numel() for p in model.parameters()) == before - report.dense_params + report.params


def test_every_class_that_is_listed_is_tested() -> None:
    found = {type(module).__name__ for name in LARGER for module in larger(name).modules()}
    assert INSIDE.keys() <= found


def test_bert_is_found_by_the_dotted_names_of_its_layers() -> None:
    architecture = ARCHITECTURES["bert"]
    model = architecture.dense
    config = chains(
        experts=2, sites=3, target_modules=["*.layer.1"], matrices=("intermediate.dense", "output.dense")
    )
    report = th.upcycle(model, **config)
    assert [layer.name for layer in report.layers] == ["bert.encoder.layer.1"]
    torch.testing.assert_close(
        logits(model, architecture), logits(architecture.dense, architecture), atol=1e-4, rtol=1e-4
    )


def test_a_mask_over_sound_is_no_mask_over_tokens() -> None:
    model = larger("Whisper")
    th.upcycle(model, **THREE)
    sound = torch.randn(2, 80, 40)
    mask = torch.ones(2, 40)
    mask[0, 20:] = 0
    labels = torch.tensor([[5, 6, 7], [8, 9, -100]])
    model.train()(input_features=sound, attention_mask=mask, labels=labels).loss.backward()
    encoder, decoder = mixtures(model)
    assert encoder.stats.tokens == 2 * 20
    assert decoder.stats.tokens == 5
