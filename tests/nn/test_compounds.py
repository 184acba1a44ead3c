"""Modules that own several matrices: convolutions, attention and recurrent layers, by one set of laws."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import tensornet as tn
from tensornet.compression.report import model_size
from tensornet.nn.unfuse import Compound, PartMatrix, unfused

#: Of PyTorch, about its own layers as well.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

CLASSES = 3
BATCH = 12


class Classifier(nn.Module):
    """A module under test between its inputs and classes, so that there is a loss."""

    def __init__(self, body: nn.Module, run: Callable[[nn.Module, Tensor], Tensor], width: int) -> None:
        super().__init__()
        self.body, self.run = body, run
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.run(self.body, x))


def _pooled(body: nn.Module, x: Tensor) -> Tensor:
    return body(x).tanh().flatten(2).mean(2)


def _last(body: nn.Module, x: Tensor) -> Tensor:
    y = body(x if getattr(body, "batch_first", True) else x.transpose(0, 1))[0]
    return y.mean(1 if body.batch_first else 0)


def _packed(body: nn.Module, x: Tensor) -> Tensor:
    lengths = torch.arange(len(x)) % x.shape[1] + 1
    y, _ = body(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))
    return pad_packed_sequence(y, batch_first=True)[0].sum(1)


def _attended(body: nn.Module, x: Tensor) -> Tensor:
    return body(x, x, x)[0].mean(1)


def _crossed(body: nn.Module, x: Tensor) -> Tensor:
    other = x[:, 1:].sin()
    return body(x, other[..., : body.kdim], other[..., : body.vdim])[0].mean(1)


def _encoded(body: nn.Module, x: Tensor) -> Tensor:
    return body(x, src_key_padding_mask=torch.zeros(x.shape[:2], dtype=torch.bool)).mean(1)


class _Case:
    def __init__(
        self, make: Callable[[], nn.Module], run: Any, x: tuple[int, ...], width: int, layers: int
    ) -> None:
        self.make, self.run, self.shape, self.width, self.layers = make, run, x, width, layers

    def model(self) -> Classifier:
        torch.manual_seed(0)
        return Classifier(self.make(), self.run, self.width).eval()

    def x(self, seed: int = 0) -> Tensor:
        return torch.randn(BATCH, *self.shape, generator=torch.Generator().manual_seed(seed))

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        return [(self.x(seed), torch.arange(BATCH) % CLASSES) for seed in range(3)]


CASES = {
    "conv1d": _Case(lambda: nn.Conv1d(8, 12, 5, stride=2, padding=3, dilation=2), _pooled, (8, 19), 12, 1),
    "conv2d": _Case(
        lambda: nn.Conv2d(6, 10, (3, 2), stride=(2, 1), padding=(1, 2), bias=False), _pooled, (6, 9, 8), 10, 1
    ),
    "conv2d_groups": _Case(
        lambda: nn.Conv2d(12, 16, 3, groups=2, padding=1, padding_mode="circular"), _pooled, (12, 7, 6), 16, 2
    ),
    "conv2d_reflect": _Case(
        lambda: nn.Conv2d(6, 10, 4, padding="same", dilation=(1, 2), padding_mode="reflect"),
        _pooled,
        (6, 9, 11),
        10,
        1,
    ),
    "conv3d": _Case(
        lambda: nn.Conv3d(4, 9, (2, 3, 2), stride=(1, 2, 1), padding=(1, 0, 1), dilation=(2, 1, 1)),
        _pooled,
        (4, 5, 6, 4),
        9,
        1,
    ),
    "lstm": _Case(lambda: nn.LSTM(10, 12, batch_first=True), _last, (7, 10), 12, 2),
    "lstm_all": _Case(
        lambda: nn.LSTM(10, 12, num_layers=2, bidirectional=True, proj_size=7), _last, (7, 10), 14, 12
    ),
    "lstm_packed": _Case(
        lambda: nn.LSTM(10, 12, num_layers=2, bidirectional=True, batch_first=True), _packed, (7, 10), 24, 8
    ),
    "gru": _Case(lambda: nn.GRU(10, 12, bidirectional=True, batch_first=True), _last, (7, 10), 24, 4),
    "gru_packed": _Case(lambda: nn.GRU(10, 12, bias=False), _packed, (7, 10), 12, 2),
    "rnn": _Case(lambda: nn.RNN(10, 12, num_layers=2), _last, (7, 10), 12, 4),
    "attention": _Case(lambda: nn.MultiheadAttention(12, 3, batch_first=True), _attended, (6, 12), 12, 4),
    "attention_cross": _Case(
        lambda: nn.MultiheadAttention(
            12, 3, kdim=9, vdim=8, bias=False, add_bias_kv=True, add_zero_attn=True, batch_first=True
        ),
        _crossed,
        (6, 12),
        12,
        4,
    ),
    "encoder": _Case(
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(12, 4, 24, batch_first=True, dropout=0.0), 2
        ),
        _encoded,
        (6, 12),
        12,
        12,
    ),
}
EXACT = tn.CompressionConfig(topology="mpo", method="svd", target_modules="re:body.*")
SMALL = tn.CompressionConfig(param_ratio=0.6, target_modules="re:body.*")
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@contextmanager
def observed(model: nn.Module) -> Iterator[list[str]]:
    """Hooks on all matrices; gives the names of those that were called."""
    seen: list[str] = []
    handles = [
        module.register_forward_hook(lambda *_, name=name: seen.append(name))
        for name, module in model.named_modules()
        if isinstance(module, PartMatrix)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def results(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Outputs, and the gradient with respect to the input."""
    x = x.clone().requires_grad_()
    y = model(x)
    return [y, *torch.autograd.grad(y.square().sum(), [x])]


def types(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


LONG = ("encoder", "lstm_all", "lstm_packed")


@pytest.fixture(params=[pytest.param(x, marks=pytest.mark.slow if x in LONG else ()) for x in CASES])
def case(request: pytest.FixtureRequest) -> _Case:
    return CASES[request.param]


def test_taken_apart_it_computes_the_same(case: _Case) -> None:
    model, x = case.model(), case.x()
    expected, before = results(model, x), {name: id(p) for name, p in model.named_parameters()}
    weights = torch.autograd.grad(model(x).square().sum(), list(model.body.parameters()))
    with unfused(model):
        for each, wanted in zip(results(model, x), expected, strict=True):
            torch.testing.assert_close(each, wanted, **CLOSE)
        with observed(model) as seen:
            for each, wanted in zip(results(model, x), expected, strict=True):
                torch.testing.assert_close(each, wanted, **CLOSE)
        parts = [n for n, m in model.named_modules() if isinstance(m, PartMatrix)]
        assert set(seen) == set(parts)
        gradients = torch.autograd.grad(model(x).square().sum(), list(model.body.parameters()))
        torch.testing.assert_close(
            sum(g.square().sum() for g in gradients), sum(g.square().sum() for g in weights), **CLOSE
        )
    assert {name: id(p) for name, p in model.named_parameters()} == before
    assert all(torch.equal(a, b) for a, b in zip(results(model, x), expected, strict=True))


def test_exact_compression_and_back(case: _Case) -> None:
    model, x = case.model(), case.x()
    expected, stock, state = results(model, x), types(model), copy.deepcopy(model.state_dict())
    report = tn.compress(model, EXACT, progress=False)
    assert len(report.layers) == case.layers
    for each, wanted in zip(results(model, x), expected, strict=True):
        torch.testing.assert_close(each, wanted, **CLOSE)
    tn.decompress(model)
    assert types(model) == stock
    assert list(model.state_dict()) == list(state)
    for name, value in state.items():
        torch.testing.assert_close(model.state_dict()[name], value, **CLOSE)
    for each, wanted in zip(results(model, x), expected, strict=True):
        torch.testing.assert_close(each, wanted, **CLOSE)


def test_calibrated_compression_is_saved_copied_and_trained(case: _Case, tmp_path: Path) -> None:
    model, x = case.model(), case.x(9)
    topology = "low_rank" if hasattr(model.body, "kernel_size") else "mpo"
    config = tn.CompressionConfig(param_ratio=0.6, topology=topology, target_modules="re:body.*")
    stats = tn.calibrate(model, case.batches(), config=config)
    assert len(stats.columns) == len(stats.rows) == case.layers
    report = tn.compress(model, config, calibration=stats, progress=False)
    assert report.model_params_after == model_size(model)[0]
    assert report.model_params_after < report.model_params_before
    expected = results(model, x)
    tn.save_model(model, tmp_path / "made")
    loaded = tn.load_model(case.model(), tmp_path / "made")
    for twin in (loaded, copy.deepcopy(model)):
        assert types(twin) == types(model)
        for found, wanted in zip(results(twin, x), expected, strict=True):
            torch.testing.assert_close(found, wanted, **CLOSE)
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.data.zero_()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.05)
    losses = []
    for _ in range(8):
        loss = nn.functional.cross_entropy(model(x), torch.arange(BATCH) % CLASSES)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.is_floating_point())
        optimizer.step()
    assert losses[-1] < losses[0]
    trained = results(model.eval(), x)
    tn.decompress(model)
    assert not any(isinstance(module, Compound) for module in model.modules())
    for each, wanted in zip(results(model, x), trained, strict=True):
        torch.testing.assert_close(each, wanted, **CLOSE)


def test_calibration_beats_the_weights_alone() -> None:
    """The channels of the inputs have very different sizes, which the weights do not show."""
    model = nn.Sequential(CASES["conv2d_groups"].make())
    sizes = torch.logspace(0, -2, 6).repeat(2)[:, None, None]  # the 6 channels of each group
    *batches, held_out = (CASES["conv2d_groups"].x(seed) * sizes for seed in range(4))
    expected, gaps = model(held_out), {}
    methods: tuple[Literal["svd", "gptq"], ...] = ("svd", "gptq")
    for method in methods:
        smaller = copy.deepcopy(model)
        config = tn.CompressionConfig(param_ratio=0.6, topology="low_rank", method=method)
        calibration = None if method == "svd" else [(x,) for x in batches]
        tn.compress(smaller, config, calibration=calibration, progress=False)
        gaps[method] = (smaller(held_out) - expected).square().sum()
    assert gaps["gptq"] < 0.8 * gaps["svd"]
