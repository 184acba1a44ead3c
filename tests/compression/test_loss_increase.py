"""The one measure of the loss increase, its divergence, and the correction of predictions by it."""

from __future__ import annotations

import copy
import json
import math
import warnings

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import tensornet as tn
from tensornet.calibration.losses import label_losses
from tensornet.compression import LossIncrease, measure, record_losses
from tensornet.compression.loss_increase import REPORT_TOKENS, warn_of_loss

X = torch.randn(256, 16, generator=torch.Generator().manual_seed(0))
Y = torch.arange(256) % 4
numbers = st.floats(1e-6, 1e3)


def loader() -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(X, Y), 64)


def classifier(steps: int) -> nn.Sequential:
    """Model that is trained on random labels, which it can only learn by heart."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 128), nn.ReLU(), nn.Linear(128, 4))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(X), Y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@torch.no_grad()
def loss(model: nn.Module) -> float:
    return float(nn.functional.cross_entropy(model(X), Y))


class LettersForCausalLM(nn.Module):
    """Predicts tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer, self.head = nn.Embedding(20, 16), nn.Linear(16, 16), nn.Linear(16, 20)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        return {"logits": self.head(torch.tanh(self.layer(self.table(input_ids))))}


def regression(seed: int) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """A regression near its optimum, whose targets are noisy."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(32, 16))
    x = torch.randn(400, 32)
    with torch.no_grad():
        targets = model(x) + torch.randn(400, 16)
    return model, [(x, targets)]


def rounded(model: nn.Module, bits: str) -> nn.Module:
    made = copy.deepcopy(model)
    tn.compress(made, tn.CompressionConfig(formats=(bits,), method="nearest"), progress=False)
    return made


# --- measuring --------------------------------------------------------------------------------------


def test_a_small_increase_is_measured_far_below_the_noise_of_its_text() -> None:
    """The expected increase is the mean of `|E x|^2` over outputs, known here."""
    model, text = regression(0)
    before = record_losses(model, text)
    made = rounded(model, "int8")
    with torch.no_grad():
        true = float((made(text[0][0]) - model(text[0][0])).square().mean())
    assert before is not None
    plain, found = measure(made, before), measure(made, model, text)
    assert plain.stderr > 5 * true  # hopeless
    assert found.mean == pytest.approx(true, rel=0.01)
    assert found.stderr < 0.1 * true
    assert (found.significant, plain.significant) == (True, False)
    assert not any(module._forward_hooks for module in made.modules())


def test_a_shift_that_is_no_noise_stays() -> None:
    """An error along the gradient of the text lowers its loss, and is not taken for noise."""
    model, text = regression(1)
    made = rounded(model, "int2")
    with torch.no_grad():
        better = [(text[0][0], 0.5 * (text[0][1] + made(text[0][0])))]
    before = record_losses(model, better)
    assert before is not None
    found = measure(made, model, better)
    assert found.mean == pytest.approx(measure(made, before).mean)


def test_divergence_is_that_of_the_predictions_without_padding() -> None:
    torch.manual_seed(0)
    model, made = LettersForCausalLM(), LettersForCausalLM()
    ids = torch.randint(20, (4, 12))
    mask = torch.ones(4, 12, dtype=torch.long)
    mask[:, 9:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}

    def losses(m: nn.Module, b: object) -> Tensor:
        return label_losses(m, {**batch, "labels": ids})

    found = measure(made, model, [batch], loss_fn=losses)
    with torch.no_grad():
        p, q = (x(ids[:, :9])["logits"].double().log_softmax(-1) for x in (model, made))
    wanted = (p.exp() * (p - q)).sum(-1)
    assert found.kl_mean == pytest.approx(float(wanted.mean()), rel=1e-4)
    assert found.kl_stderr == pytest.approx(float(wanted.std()) / 6, rel=1e-3)
    assert measure(model, model, [batch], loss_fn=losses).kl_mean == pytest.approx(0, abs=1e-7)


def test_outputs_without_labels_are_compared_with_the_dense_ones() -> None:
    model = classifier(20)
    dense = copy.deepcopy(model)
    config = tn.CompressionConfig(param_ratio=0.7)
    report = tn.compress(model, config, calibration=[X[:64], X[64:]], progress=False)
    with torch.no_grad():
        gap = (model(X) - dense(X)).square().sum(1) / dense(X).square().sum(1)
    assert report.measured is not None
    assert report.measured.mean == pytest.approx(float(gap.mean()) / 2, rel=1e-3)
    assert report.measured.kl_mean is None


def test_the_work_is_bounded() -> None:
    model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 50))
    seen: list[int] = []
    model[0].register_forward_hook(lambda _, args, output: seen.append(args[0].numel()))
    ids = torch.randint(50, (64, 100))
    before = record_losses(model, [(ids, ids)] * 100)
    assert before is not None
    assert REPORT_TOKENS / 2 < measure(model, before).tokens <= 1.1 * REPORT_TOKENS
    assert sum(seen) < 4 * REPORT_TOKENS  # dense, compressed, and a look at the first batch


def test_models_without_a_loss_are_not_measured() -> None:
    class Whole(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            if len(input) != 4096:
                raise ValueError("takes batches of 4,096 rows")
            return super().forward(input)

    assert record_losses(Whole(2, 2), [torch.randn(4096, 2)]) is None
    assert record_losses(nn.Linear(2, 2), [(torch.randn(8, 2), torch.arange(5))]) is None
    assert record_losses(nn.Linear(2, 2), []) is None
    with pytest.raises(tn.errors.TargetError, match="No loss"):
        measure(nn.Linear(2, 2), nn.Linear(2, 2), [])


# --- in reports -------------------------------------------------------------------------------------


def test_the_report_says_what_was_measured_and_where() -> None:
    model = classifier(20)
    before = loss(model)
    report = tn.compress(
        model, tn.CompressionConfig(param_ratio=0.7), calibration=iter([*loader()]), progress=False
    )
    found = report.measured
    assert found is not None
    assert (found.tokens, found.source) == (256, "calibration data")
    assert found.dense_loss == pytest.approx(before, rel=1e-4)
    assert found.mean == pytest.approx(loss(model) - before, abs=1e-5)
    assert f"measured loss increase: {found.mean:.4f}" in str(report)
    assert json.loads(report.to_json())["measured"]["mean"] == found.mean
    model = classifier(20)
    stats = tn.calibrate(model, loader())
    report = tn.compress(model, tn.CompressionConfig(param_ratio=0.7), calibration=stats, progress=False)
    assert report.measured is None
    assert "measured loss increase: none" in str(report)


@pytest.mark.parametrize("budget", [{"loss_increase": 0.02}, {"param_ratio": 0.2}], ids=str)
def test_a_model_that_fits_its_calibration_data_is_named(budget: dict[str, float]) -> None:
    model = classifier(300)
    before = loss(model)
    assert before < 1e-2
    with pytest.warns(tn.errors.CalibrationWarning, match="trained on") as seen:
        report = tn.compress(model, tn.CompressionConfig(**budget), calibration=loader(), progress=False)  # type: ignore[arg-type]
    assert ("loss_increase=0.02 allowed" in str(seen[0].message)) == ("loss_increase" in budget)
    assert report.measured is not None
    assert report.measured.mean == pytest.approx(loss(model) - before, rel=1e-3)
    assert report.measured.mean > 10 * report.plan.predicted_loss_increase  # type: ignore[operator]


def test_when_a_warning_is_given() -> None:
    def said(found: LossIncrease, predicted: float | None, allowed: float | None = None) -> str:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            warn_of_loss(found, predicted, allowed)
        return str(seen[0].message) if seen else ""

    def increase(mean: float, stderr: float = 0.001, tokens: int = 100) -> LossIncrease:
        return LossIncrease(mean, stderr, tokens, "calibration data", 1.5)

    assert not said(increase(0.05), 0.04)
    assert not said(increase(0.01), 1e-9)  # far above, but next to nothing
    assert not said(increase(0.5, stderr=0.2), 1e-3)  # noise
    assert not said(increase(0.5, tokens=4), 1e-3)
    assert not said(increase(0.5), None)
    assert "fits them" in said(increase(0.05), 0.01)
    assert "set a budget of bytes" in said(increase(0.05), 0.01, allowed=0.04)
    assert "fits them" in said(increase(math.nan, tokens=4), 0.01)
    assert "predictions are too low" in said(increase(0.05), 0.03, allowed=0.04)
    assert not said(increase(0.05, stderr=0.01), 0.03, allowed=0.04)
