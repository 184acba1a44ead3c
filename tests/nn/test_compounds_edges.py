"""Modules that own several matrices: arguments, ties, refusals, and whoever asks them for something."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from nn.test_compounds import CASES, CLOSE, observed
from torch import Tensor, nn
from torch.nn.utils.prune import l1_unstructured
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import tensornet as tn
from tensornet.compounds.attention import MatrixAttention
from tensornet.compounds.recurrent import MatrixRecurrence
from tensornet.errors import FormatError, ShapeError, TargetError
from tensornet.nn.unfuse import fuse, unfuse, unfused


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("weights", ["none", "mean", "each"])
@pytest.mark.parametrize("mask", [None, "bool", "float", "each_head", "causal"])
@pytest.mark.parametrize("padding", [None, "bool", "float"])
def test_masks_and_weights_of_attention(
    batch_first: bool, weights: str, mask: str | None, padding: str | None
) -> None:
    stock = nn.MultiheadAttention(8, 2, batch_first=batch_first)
    ours = MatrixAttention(stock, {})
    query, key = (torch.randn(3, n, 8) for n in (4, 4 if mask == "causal" else 5))
    hidden = torch.rand(3 * 2, 4, key.shape[1]) > 0.7
    hidden[..., 0] = False  # somewhere to look at
    masks = {
        "bool": hidden[0],
        "float": torch.randn(4, key.shape[1]),
        "each_head": hidden,
        "causal": nn.Transformer.generate_square_subsequent_mask(4),
    }
    padded = torch.tensor([[False] * key.shape[1]] * 2 + [[False] + [True] * (key.shape[1] - 1)])
    if mask in ("float", "causal") and padding == "bool":
        padded = torch.zeros(padded.shape).masked_fill(padded, -torch.inf)
    elif padding == "float":
        if mask in ("bool", "each_head"):
            pytest.skip("PyTorch deprecates masks of two dtypes")
        padded = torch.zeros(padded.shape).masked_fill(padded, -torch.inf)
    options = {
        "key_padding_mask": None if padding is None else padded,
        "attn_mask": None if mask is None else masks[mask],
        "need_weights": weights != "none",
        "average_attn_weights": weights == "mean",
        "is_causal": mask == "causal",
    }
    given = [x if batch_first else x.transpose(0, 1) for x in (query, key, key.sin())]
    for mine, wanted in zip(ours(*given, **options), stock(*given, **options), strict=True):
        assert (mine is None) == (wanted is None)
        if mine is not None:
            torch.testing.assert_close(mine, wanted, **CLOSE)


def test_attention_without_a_batch() -> None:
    stock = nn.MultiheadAttention(8, 2)
    x, padded = torch.randn(5, 8), torch.tensor([False, False, True, False, True])
    ours = MatrixAttention(stock, {})
    for options in ({}, {"need_weights": False}, {"average_attn_weights": False}):
        mine, wanted = (each(x, x, x, key_padding_mask=padded, **options) for each in (ours, stock))
        torch.testing.assert_close(mine, wanted, **CLOSE)
    with pytest.raises(ShapeError, match="is_causal"):
        ours(x, x, x, is_causal=True)


def test_dropout_of_attention_follows_the_mode() -> None:
    ours = MatrixAttention(nn.MultiheadAttention(8, 2, dropout=0.5), {})
    x = torch.randn(5, 2, 8)
    for weights in (True, False):
        assert not torch.equal(ours(x, x, x, need_weights=weights)[0], ours(x, x, x, need_weights=weights)[0])
    ours.eval()
    assert torch.equal(ours(x, x, x)[0], ours(x, x, x)[0])


@pytest.mark.parametrize("make", [nn.RNN, nn.GRU, nn.LSTM])
@pytest.mark.parametrize("kind", ["batched", "batch_first", "alone", "packed"])
def test_states_of_recurrent_layers(make: type[nn.RNNBase], kind: str) -> None:
    """Given and returned states, in every form of input, fused and step by step."""
    stock = make(5, 6, num_layers=2, bidirectional=True, batch_first=kind == "batch_first")
    ours = MatrixRecurrence(stock, {})
    x: Any = torch.randn(*((7,) if kind == "alone" else (3, 7) if kind == "batch_first" else (7, 3)), 5)
    if kind == "packed":
        x = pack_padded_sequence(x, torch.tensor([2, 7, 4]), enforce_sorted=False)
    states = [torch.randn(4, *(() if kind == "alone" else (3,)), 6) for _ in range(2)]
    given = tuple(states) if make is nn.LSTM else states[0]
    for hx in (None, given):
        wanted = stock(x, hx)
        with observed(ours):
            stepwise = ours(x, hx)
        for mine in (ours(x, hx), stepwise):
            assert isinstance(mine[0], PackedSequence) == (kind == "packed")
            torch.testing.assert_close(mine, wanted, **CLOSE)


def test_recurrent_layers_refuse_other_shapes() -> None:
    ours = MatrixRecurrence(nn.LSTM(5, 6), {})
    with pytest.raises(ShapeError, match="input_size=5"):
        ours(torch.randn(4, 2, 6))
    with pytest.raises(ShapeError, match=r"initial states.*\(1, 3, 6\)"):
        ours(torch.randn(4, 2, 5), (torch.randn(1, 3, 6), torch.randn(1, 3, 6)))


class Tied(nn.Module):
    """Two convolutions with one kernel, and one recurrent layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(8, 8, 3, padding=1), nn.Conv1d(8, 8, 3, padding=2, dilation=2)
        self.second.weight = self.first.weight
        self.rnn = self.again = nn.GRU(8, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(x)).transpose(1, 2)
        return self.again(self.rnn(y)[0])[0]


def test_ties_stay_ties(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Tied(), torch.randn(2, 8, 9)
    config = tn.CompressionConfig(param_ratio=0.6, method="svd")
    report = tn.compress(model, config, progress=False)
    assert [layer.name for layer in report.layers] == [
        "first.matrix",
        "rnn.matrix_ih_l0",
        "rnn.matrix_hh_l0",
    ]
    assert report.coverage.total == sum(p.numel() for p in Tied().parameters())
    assert model.rnn is model.again
    assert model.first.matrix.core_1 is model.second.matrix.core_1
    expected = model(x)
    tn.save_model(model, tmp_path / "made")
    loaded = tn.load_model(Tied(), tmp_path / "made")
    torch.testing.assert_close(loaded(x), expected, rtol=1e-4, atol=1e-4)
    assert loaded.rnn is loaded.again
    tn.decompress(model)
    assert model.first.weight is model.second.weight
    assert model.rnn is model.again
    torch.testing.assert_close(model(x), expected, **CLOSE)


def test_modules_that_are_something_else_are_left_alone() -> None:
    class Own(nn.Conv1d):
        pass

    pruned = nn.Conv1d(8, 8, 3)
    l1_unstructured(pruned, "weight", amount=0.5)
    normed = nn.utils.parametrizations.weight_norm(nn.Conv1d(8, 8, 3))
    modules = [
        *(nn.Conv1d(8, 8, 3, groups=8), nn.ConvTranspose2d(8, 8, 3)),
        *(Own(8, 8, 3), pruned, normed),
    ]
    model = nn.ModuleList([*modules, nn.Linear(8, 8)])
    assert unfuse(model) == []
    config = tn.CompressionConfig(param_ratio=0.5, method="svd")
    with pytest.warns(UserWarning, match=r"\b3 \(weight recomputed"):
        coverage = tn.compress(model, config, progress=False).coverage
    skipped = {"Conv1d (groups too small for low rank)", "Conv1d (weight recomputed by a hook)"}
    assert {*skipped, "Own", "ConvTranspose2d"} <= coverage.unknown.keys()


def test_a_module_that_nothing_holds_is_refused() -> None:
    with pytest.raises(TargetError, match="itself a LSTM"):
        tn.compress(nn.LSTM(8, 8), tn.CompressionConfig(param_ratio=0.5, method="svd"), progress=False)


def test_patterns_name_modules_and_matrices() -> None:
    def chosen(**patterns: Any) -> list[str]:
        config = tn.CompressionConfig(param_ratio=0.5, method="svd", **patterns)
        return [layer.name for layer in tn.plan(CASES["gru_packed"].model(), config)]

    both = ["body.matrix_ih_l0", "body.matrix_hh_l0"]
    assert chosen(target_modules="body") == both
    assert chosen(target_modules="body.matrix_hh_l0") == both[1:]
    assert chosen(exclude_modules="body") == ["head"]


def test_a_file_of_another_model_changes_nothing(tmp_path: Path) -> None:
    made = CASES["gru"].model()
    tn.compress(made, tn.CompressionConfig(param_ratio=0.5, method="svd"), progress=False)
    tn.save_model(made, tmp_path / "made")
    for other in ("lstm", "conv1d"):
        model = CASES[other].model()
        before = {name: (id(p), p.sum().item()) for name, p in model.named_parameters()}
        with pytest.raises(FormatError, match="another model"):
            tn.load_model(model, tmp_path / "made")
        assert {name: (id(p), p.sum().item()) for name, p in model.named_parameters()} == before


def test_one_matrix_alone_leaves_the_others_dense_and_owned() -> None:
    model, x = CASES["attention"].model(), CASES["attention"].x()
    config = tn.CompressionConfig(param_ratio=0.5, method="svd", target_modules="body.k_proj")
    tn.compress(model, config, progress=False)
    stored = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    assert sum(stored.values()) == sum(p.nbytes for p in model.parameters())  # in_proj_weight is gone
    again = tn.CompressionConfig(param_ratio=0.5, method="svd", target_modules="body.v_proj")
    tn.compress(model, again, progress=False)
    twin = pickle.loads(pickle.dumps(nn.ModuleList([model.body])))[0]
    x = x[:, :4]
    assert torch.equal(twin(x, x, x)[0], model.body(x, x, x)[0])


def test_half_precision_and_frozen_weights() -> None:
    model = nn.Sequential(nn.Conv1d(8, 8, 3)).to(torch.bfloat16).requires_grad_(False)
    tn.compress(model, tn.CompressionConfig(param_ratio=0.6, method="svd"), progress=False)
    assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in model.parameters())
    assert model[0].weight.dtype == torch.bfloat16
    assert model[0].kernel_size == (3,)
    tn.decompress(model)
    assert model[0].weight.dtype == torch.bfloat16
    assert not model[0].weight.requires_grad


@pytest.mark.slow
@pytest.mark.parametrize("name", ["conv2d", "attention", "gru"])
@torch.no_grad()
def test_they_compile_as_one_graph(name: str) -> None:
    model, x = CASES[name].model(), CASES[name].x()
    tn.compress(model, tn.CompressionConfig(param_ratio=0.6, method="svd"), progress=False)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), model(x), **CLOSE)


def test_settling_twice_and_nested_blocks() -> None:
    model = CASES["lstm_packed"].model()
    with unfused(model), unfused(model):
        assert isinstance(model.body, MatrixRecurrence)
    assert type(model.body) is nn.LSTM
    fuse(model)
    assert type(model.body) is nn.LSTM


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
        self.stack = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor, padded: Tensor | None = None) -> Tensor:
        return self.head(self.stack(x, src_key_padding_mask=padded).mean(1))


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
def test_encoders_that_would_fuse_their_layers_in_eval(gradients: bool, whole: bool) -> None:
    """In eval PyTorch's encoders pass weights to one fused operation and call no layer."""
    x = torch.randn(12, 6, 32)
    padded = None if whole else torch.arange(6)[None] >= torch.arange(12)[:, None] % 5 + 2
    torch.manual_seed(0)
    model = Encoder().eval()
    batch = ({"x": x} if padded is None else {"x": x, "padded": padded}, torch.arange(12) % 5)
    config = tn.CompressionConfig(param_ratio=0.5, target_modules=["*.linear1", "*.linear2"])
    stats = tn.calibrate(model, [batch], config=config)
    assert set(stats.columns) == {f"stack.layers.{k}.linear{i}" for k in (0, 1) for i in (1, 2)}
    tn.compress(model, config, calibration=stats, progress=False)
    training = copy.deepcopy(model).train()
    with torch.set_grad_enabled(gradients):
        torch.testing.assert_close(model(x, padded), training(x, padded), rtol=1e-4, atol=1e-5)
