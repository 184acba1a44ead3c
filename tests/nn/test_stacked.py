"""Stacks of matrices of any name and order: the code that multiplies by them decides what they are."""

from __future__ import annotations

import copy
import functools
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
from tensornet.nn import StackedMatrices
from tensornet.nn.expansion import matrices_apart, take_apart
from tensornet.nn.stack_uses import StackUse, stack_uses

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


class Looped(nn.Module):
    """Products with single experts, in other words."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(6, 8, 9)), nn.Parameter(torch.randn(6, 8, 9))

    def one(self, x: Tensor, k: int) -> Tensor:
        return torch.matmul((x @ self.a[k]).relu(), self.b[k].T)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.one(part, k) for k, part in enumerate(x)])


class Split(nn.Module):
    """One matrix each, one side of which is split into heads."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = nn.Parameter(torch.randn(8, 2, 3)), nn.Parameter(torch.randn(8, 2, 3))
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        heads = torch.einsum("eth,hnd->tnde", x.to(self.q.dtype), self.q)
        return self.norm(torch.einsum("tnde,hnd->eth", heads.sin(), self.o))


class Summed(nn.Module):
    """Stacks by the letters of sums, in both orders, and one that is summed over experts as well."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(6, 8, 9)), nn.Parameter(torch.randn(6, 8, 9))
        self.c = nn.Parameter(torch.randn(6, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.einsum("tef,edf->etd", torch.einsum("etd,edf->tef", x, self.a).sin(), self.b)
        return torch.einsum("etd,edf->tf", x.tanh(), self.c)[None]


class Flat(nn.Module):
    """Experts one below the other in parameters of two dimensions, followed through variables."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.experts = 7, 6
        self.first, self.last = nn.Parameter(torch.randn(6 * 7, 8)), nn.Parameter(torch.randn(6 * 7, 8))

    def forward(self, x: Tensor) -> Tensor:
        split = (-1, self.width, 8)
        results = []
        for k, part in enumerate(x):
            first = self.first.view(split)[k].T
            last = self.last.reshape(self.experts, -1, 8)[k]
            results.append(part.matmul(first).relu().matmul(last))
        return torch.stack(results)


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
        self.rows, self.scale = Rows(), nn.Parameter(torch.ones(8))

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


KINDS = {Batched: 12, Looped: 12, Split: 2, Summed: 13, Flat: 12, Parent: 12}


@pytest.mark.parametrize("kind", KINDS)
def test_exact_compression_and_back(kind: type[nn.Module]) -> None:
    model, x = holder(kind), X.transpose(0, 1)
    expected, state = model(x), copy.deepcopy(model.state_dict())
    with matrices_apart(model):
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


def test_the_code_decides_not_names_or_shapes() -> None:
    assert stack_uses(Batched()) == {"first": StackUse((1,), (2,), True), "last": StackUse((2,), (1,), True)}
    assert stack_uses(Looped()) == {"a": StackUse((1,), (2,), True), "b": StackUse((2,), (1,), True)}
    assert stack_uses(Split()) == {"q": StackUse((0,), (1, 2), False), "o": StackUse((1, 2), (0,), False)}
    assert take_apart(holder(Batched)) == ["body"]


def test_positions_are_those_of_the_view() -> None:
    seen = {"first": ((2,), (1,), True, (6, 7, 8)), "last": ((1,), (2,), True, (6, 7, 8))}
    assert stack_uses(Flat()) == {name: StackUse(*use) for name, use in seen.items()}
    seen = {"rows.up": ((2,), (1,), True, (6, 7, 8)), "rows.down": ((1,), (2,), True)}
    assert stack_uses(Parent()) == {name: StackUse(*use) for name, use in seen.items()}
    model = holder(Parent)
    with matrices_apart(model):
        assert [x for x, _ in model.body.named_parameters()][:2] == ["scale", "0.rows_up.matrix"]
        with pytest.raises(
            tn.TargetError, match=r"viewed as \(7, 6, 8\), only as \(6, 7, 8\); derive a class"
        ):
            model.body.rows.up.view(7, 6, 8)


class Both(nn.Module):
    """Uses one stack in both orientations."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x[k] @ self.w[k] + F.linear(x[k], self.w[k]) for k in range(6)])


class Read(Both):
    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x, self.w)


class Normed(nn.Module):
    """Also reads the numbers of its stack."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x, self.w) / self.w.norm()


class Shared(nn.Module):
    """Sums over a side that the input does not have: no product with a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("eti,eij->eti", x, self.w)


def _wrapped(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(forward)
    def other(self: nn.Module, x: Tensor) -> Tensor:
        return torch.bmm(x, self.w.mT)

    return other


class Decorated(nn.Module):
    """Runs other code than it shows."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 8, 8))

    @_wrapped
    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x, self.w)


class Rebound(nn.Module):
    """Uses a name for a stack and for something else."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(6 * 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        w = self.w.view(6, 8, 8)[0]
        x = x @ w
        w = x.mean((0, 1))
        return x * w


class Scaled(nn.Module):
    """Changes a matrix before it multiplies by it."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(6 * 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            w = self.w.view(6, 8, 8)[0]
            w += 0
            return x @ w


class Mixed(nn.Module):
    """Views columns as experts, which are no rows below each other."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 6 * 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x[k] @ self.w.view(6, 8, 8)[k] for k in range(6)])


class Reader(nn.Module):
    """Reads its stack itself, beside its parent."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 8, 8))

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        return x @ w * self.w.norm()


class Double(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Reader()
        self.w = nn.Parameter(torch.randn(6 * 8, 8))  # multiplied by as one matrix

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.inner(x[k], self.inner.w[k]) for k in range(6)]) + (x @ self.w.T).mean()


class Gathered(nn.Module):
    """Takes a matrix for each row by a tensor of indices."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        order = x.mean((1, 2)).argsort()
        return torch.bmm(x, self.w[order])


class Masked(nn.Module):
    """Sums the matrices that a mask selects."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w[x.mean((1, 2)) > 0].sum(0)


class GatheredByMethod(nn.Module):
    """Takes them in a method that is handed the indices."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 8, 8))

    def some(self, x: Tensor, order: Tensor) -> Tensor:
        return torch.bmm(x, self.w[order])

    def forward(self, x: Tensor) -> Tensor:
        return self.some(x, x.mean((1, 2)).argsort())


LEFT = [Both, Read, Normed, Shared, Decorated, Rebound, Scaled, Mixed, Double]
LEFT += [Gathered, Masked, GatheredByMethod]


@pytest.mark.parametrize("kind", LEFT)
def test_what_cannot_be_decided_is_left_and_said(kind: type[nn.Module]) -> None:
    model = holder(kind)
    expected = model(X.transpose(0, 1))
    assert take_apart(model) == []
    report = tn.compress(model, EXACT, progress=False)
    assert report.reach.unknown[kind.__name__] == 6 * 8 * 8
    torch.testing.assert_close(model(X.transpose(0, 1)), expected, **CLOSE)
    with pytest.raises(tn.TargetError, match=r"'body' matches no layer that can be compressed"):
        tn.plan(model, tn.CompressionConfig(param_ratio=0.5, objective="weight", target_modules="body"))


def test_a_stand_in_refuses_what_was_not_found_in_the_code() -> None:
    model = holder(Batched)
    with matrices_apart(model):
        with pytest.raises(tn.TargetError, match=r"mul cannot compute with a stack.*derive a class"):
            torch.mul(torch.ones(8), model.body.first)
        with pytest.raises(tn.TargetError, match=r"mul cannot compute with a matrix.*derive a class"):
            torch.mul(torch.ones(8), model.body.first[0])
        with pytest.raises(tn.TargetError, match=r"indexed by a tensor of shape \(2,\); derive a class"):
            model.body.last[torch.tensor([0, 1])]
        assert model.body.last[torch.tensor(1)].layer is model.body.get_submodule("1.last")
        stack = model.body.last
        assert (stack.shape, stack.size(1), stack.ndim, stack.dim()) == ((6, 8, 8), 8, 3, 3)
        assert stack.size() == (6, 8, 8)
        assert (stack.dtype, stack.device) == (torch.float32, torch.device("cpu"))


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


@pytest.mark.parametrize("make", LAYERS)
def test_their_checkpoints(make: Callable[[], PreTrainedModel], tmp_path: Path) -> None:
    model = _dense(make)
    model.save_pretrained(tmp_path / "dense", max_shard_size="8KB")
    config = tn.CompressionConfig(param_ratio=0.6, objective="weight")
    streamed = th.compress_checkpoint(tmp_path / "dense", tmp_path / "made", config)
    report = tn.compress(model, config, progress=False)
    assert streamed.compression.reach == report.reach
    torch.testing.assert_close(th.load(tmp_path / "made")(IDS).logits, model(IDS).logits, **CLOSE)
