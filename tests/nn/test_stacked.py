"""Stacks of matrices of registered classes: one layer for each matrix, computed by the code of the class."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    DbrxConfig,
    DbrxForCausalLM,
    JetMoeConfig,
    JetMoeForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    PreTrainedModel,
    XLNetConfig,
    XLNetLMHeadModel,
)

import tensornet as tn
import tensornet_hf as th
from tensornet.compression.report import model_size
from tensornet.errors import TargetError
from tensornet.nn import register_stacked_matrices
from tensornet.nn.unfuse import StackedMatrices, unfuse, unfused

X = torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(0))
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
EXACT = tn.CompressionConfig(topology="mpo", objective="weight")
SMALL = tn.CompressionConfig(param_ratio=0.6)
SIZES = {"vocab_size": 31, "hidden_size": 12, "num_hidden_layers": 1, "pad_token_id": 0}
IDS = torch.arange(1, 25).reshape(3, 8)


class Batched(nn.Module):
    """Six experts, every token to each, `(E, in, out)` and `(E, out, in)` by their products alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Parameter(torch.randn(6, 8, 8)), nn.Parameter(torch.randn(6, 8, 8))
        self.scale = nn.Parameter(torch.ones(6, 1, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.bmm(x.view(self.first.shape[0], -1, 8), self.first).tanh() * self.scale
        return torch.stack([F.linear(x[k], self.last[k]) for k in range(len(x))])


class Split(nn.Module):
    """One matrix each, one side of which is split into heads."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = nn.Parameter(torch.randn(8, 2, 3)), nn.Parameter(torch.randn(8, 2, 3))
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        heads = torch.einsum("eth,hnd->tnde", x.to(self.q.dtype), self.q)
        return self.norm(torch.einsum("tnde,hnd->eth", heads.sin(), self.o))


class Rows(nn.Module):
    """Holds the stacks of its parent, and computes with what it is handed."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(6 * 7, 8)), nn.Parameter(torch.randn(6, 7, 8))
        self.activation = nn.GELU()

    def forward(self, x: Tensor, first: Tensor, second: Tensor) -> Tensor:
        return self.activation(x @ first.T) @ second


class Parent(nn.Module):
    """Takes single matrices from the stacks of a child, as DBRX does."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.scale, self.num_experts = Rows(), nn.Parameter(torch.ones(8)), 6

    def forward(self, x: Tensor) -> Tensor:
        one = [self.rows(part, self.rows.up.view(6, 7, 8)[k], self.rows.down[k]) for k, part in enumerate(x)]
        return torch.stack(one) * self.scale


class Holder(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x.transpose(0, 1)).mean(0))


def holder(kind: type[nn.Module]) -> Holder:
    torch.manual_seed(0)
    return Holder(kind()).eval()


def batches() -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(5, 6, 8), torch.arange(5) % 3) for _ in range(3)]


LAYOUTS = {
    Batched: {"first": "eio", "last": "eoi"},
    Split: {"q": "ioo", "o": "oii"},
    Parent: {"rows.up": "eoi", "rows.down": "eio"},
}
KINDS = {kind: 2 if kind is Split else 12 for kind in LAYOUTS}
for kind, layouts in LAYOUTS.items():
    register_stacked_matrices(f"{kind.__module__}.{kind.__qualname__}", layouts)


@pytest.mark.parametrize("kind", KINDS)
def test_exact_compression_and_back(kind: type[nn.Module]) -> None:
    model, x = holder(kind), X.transpose(0, 1)
    expected, state = model(x), copy.deepcopy(model.state_dict())
    with unfused(model):
        assert isinstance(model.body, StackedMatrices)
        torch.testing.assert_close(model(x), expected, **CLOSE)
    assert torch.equal(model(x), expected)
    report = tn.compress(model, EXACT, progress=False)
    assert sum(layer.name.startswith("body.") for layer in report.layers) == KINDS[kind]
    torch.testing.assert_close(model(x), expected, **CLOSE)
    tn.decompress(model)
    assert type(model.body) is kind
    assert list(model.state_dict()) == list(state)
    for name, value in state.items():
        torch.testing.assert_close(model.state_dict()[name], value, **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_calibrated_compression_is_saved_copied_and_trained(kind: type[nn.Module], tmp_path: Path) -> None:
    model, x = holder(kind), X.transpose(0, 1)
    torch.manual_seed(1)
    stats = tn.calibrate(model, batches(), config=SMALL)
    assert len(stats.columns) == len(stats.rows) == KINDS[kind] + 1
    report = tn.compress(model, SMALL, calibration=stats, progress=False)
    assert report.model_params_after == model_size(model)[0]
    assert report.model_params_after < report.model_params_before
    tn.save_model(model, tmp_path / "made")
    loaded = tn.load_model(holder(kind), tmp_path / "made")
    for twin in (loaded, copy.deepcopy(model)):
        assert torch.equal(twin(x), model(x))
    losses = []
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.02)
    for _ in range(6):
        loss = F.cross_entropy(model(x), torch.arange(5) % 3)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert not torch.equal(loaded(x), model(x))


class Unknown(Batched):
    """A subclass, whose code may differ."""


def test_other_classes_are_left_and_said() -> None:
    model = holder(Unknown)
    assert unfuse(model) == []
    report = tn.compress(model, EXACT, progress=False)
    assert report.coverage.unknown["Unknown"] == 2 * 6 * 8 * 8 + 6 * 8
    with pytest.raises(TargetError, match="'body' matches no layer"):
        tn.plan(model, tn.CompressionConfig(param_ratio=0.5, objective="weight", target_modules="body"))


def test_other_operations_are_refused() -> None:
    model = holder(Batched)
    with unfused(model):
        with pytest.raises(TargetError, match="mul cannot compute"):
            torch.mul(torch.ones(8), model.body.first)
        with pytest.raises(TargetError, match="mul cannot compute"):
            torch.mul(torch.ones(8), model.body.first[0])
        with pytest.raises(TargetError, match="one matrix at a time"):
            model.body.last[torch.tensor([0, 1])]
        assert model.body.last[torch.tensor(1)].layer is model.body.get_submodule("1.last")
        stack = model.body.last
        assert (stack.shape, stack.dtype, stack.device) == ((6, 8, 8), torch.float32, torch.device("cpu"))
    model = holder(Parent)
    with unfused(model):
        assert [x for x, _ in model.body.named_parameters()][:2] == ["scale", "0.rows_up.matrix"]
        with pytest.raises(TargetError, match="viewed"):
            model.body.rows.up.view(7, 6, 8)


def xlnet() -> PreTrainedModel:
    return XLNetLMHeadModel(XLNetConfig(vocab_size=31, d_model=12, n_layer=1, n_head=3, d_inner=20))


def jetmoe() -> PreTrainedModel:
    sizes = {"num_key_value_heads": 2, "kv_channels": 4, "intermediate_size": 20}
    return JetMoeForCausalLM(JetMoeConfig(**SIZES, **sizes, num_local_experts=3, num_experts_per_tok=2))


def dbrx() -> PreTrainedModel:
    experts = {"ffn_hidden_size": 20, "moe_num_experts": 3, "moe_top_k": 2}
    sizes = {"d_model": 12, "n_heads": 2, "n_layers": 1, "vocab_size": 31, "max_seq_len": 16}
    attention = {"kv_n_heads": 1, "clip_qkv": 9.0, "rope_theta": 1e4}
    return DbrxForCausalLM(DbrxConfig(**sizes, attn_config=attention, ffn_config=experts, pad_token_id=0))


def llama4() -> PreTrainedModel:
    sizes = {"intermediate_size": 20, "intermediate_size_mlp": 20, "head_dim": 6}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    experts = {"num_local_experts": 3, "num_experts_per_tok": 1}
    return Llama4ForCausalLM(Llama4TextConfig(**SIZES, **sizes, **heads, **experts))


LAYERS = {
    xlnet: "transformer.layer.0.rel_attn.q_matrix",
    jetmoe: "model.layers.0.mlp.input_linear.2.weight",
    dbrx: "transformer.blocks.0.ffn.experts.2.mlp_w2",
    llama4: "model.layers.0.feed_forward.experts.2.down_proj",
}


def _dense(make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    torch.manual_seed(0)
    model = make().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("make", LAYERS)
def test_models_of_transformers(make: Callable[[], PreTrainedModel], tmp_path: Path) -> None:
    model = _dense(make)
    expected, before = model(IDS).logits, list(model.state_dict())
    model.save_pretrained(tmp_path / "dense")
    report = tn.compress(model, EXACT, progress=False)
    assert LAYERS[make] in [layer.name for layer in report.layers]
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-3, atol=1e-3)
    th.decompress(model)
    assert list(model.state_dict()) == before
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-3, atol=1e-3)
    stats = tn.calibrate(model, [{"input_ids": IDS, "labels": IDS}], config=SMALL)
    tn.compress(model, SMALL, calibration=stats, progress=False)
    model.save_pretrained(tmp_path / "made")
    for loaded in (th.load(tmp_path / "made"), AutoModelForCausalLM.from_pretrained(tmp_path / "made")):
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    model.train()(IDS, labels=IDS).loss.backward()
