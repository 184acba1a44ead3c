"""What may be given as a batch: data loaders of plain PyTorch, and arguments of Hugging Face's models."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import ViTConfig, ViTForImageClassification

import tensornet as tn
from tensornet.calibration.batches import as_batch, some_rows
from tensornet.calibration.losses import label_losses, sampled_losses
from tensornet.errors import TargetError
from tensornet.healing import refine

CPU = torch.device("cpu")
X, Y = torch.randn(64, 16, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 10


def classifier() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 10))


class Sums(nn.Module):
    """Takes two inputs by name, and regresses."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(16, 12), nn.Linear(16, 12)

    def forward(self, left: Tensor, right: Tensor | None = None) -> Tensor:
        return self.left(left) + (0 if right is None else self.right(right))


def same(a: tn.CalibrationStats, b: tn.CalibrationStats) -> None:
    assert (a.tokens, a.loss) == (b.tokens, pytest.approx(b.loss))
    for side in ("rows", "columns"):
        for name, moment in getattr(a, side).items():
            torch.testing.assert_close(getattr(b, side)[name], moment)


def test_a_data_loader_of_pairs() -> None:
    model = classifier()
    loader = DataLoader(TensorDataset(X, Y), batch_size=16)
    stats = tn.calibrate(model, loader)
    assert stats.loss == pytest.approx(nn.functional.cross_entropy(model(X), Y).item(), rel=1e-5)

    def own(model: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")

    same(stats, tn.calibrate(model, [{"x": x, "y": y} for x, y in loader], loss_fn=own))
    same(stats, tn.calibrate(model, [({"input": x}, y) for x, y in loader]))
    same(stats, tn.calibrate(model, [{"input": x, "labels": y} for x, y in loader]))
    report = tn.compress(model, tn.CompressionConfig(param_ratio=0.5), calibration=loader, progress=False)
    assert report.plan.predicted_loss_increase > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrap",
    [nn.DataParallel, lambda model: torch.compile(model, backend="aot_eager")],
    ids=["data", "compiled"],
)
def test_wrapped_models(wrap: Any) -> None:
    model, pairs = classifier(), [(X, Y)]
    wrapped = wrap(model)
    stats = tn.calibrate(wrapped, pairs)
    plain = tn.calibrate(model, pairs)
    for (name, moment), other in zip(stats.columns.items(), plain.columns.values(), strict=True):
        torch.testing.assert_close(moment, other, msg=name)
    teacher = copy.deepcopy(model)
    tn.compress(wrapped, tn.CompressionConfig(param_ratio=0.5), calibration=stats, progress=False)
    refine(wrapped, wrap(teacher), pairs)
    tn.heal(wrapped, wrap(teacher), pairs, steps=2)
    torch.testing.assert_close(wrapped(X), model(X))


def test_ignored_labels_have_no_loss() -> None:
    model = classifier()
    masked = Y.masked_fill(torch.arange(64) < 16, -100)
    assert label_losses(model, as_batch((X, masked), model, CPU)).numel() == 48
    stats = tn.calibrate(model, [(X, masked)])
    scored = tn.calibrate(model, [(X[16:], Y[16:])])
    assert stats.loss == pytest.approx(scored.loss)
    for name, moment in scored.rows.items():
        torch.testing.assert_close(stats.rows[name], moment)
    assert stats.tokens == 64  # the layers read the other rows all the same
    torch.testing.assert_close(stats.columns["0"], X.T @ X / 64)


def test_labels_that_are_numbers_are_regressed() -> None:
    model, wanted = Sums(), torch.randn(64, 12)
    stats = tn.calibrate(model, [(X, wanted)], config=tn.CompressionConfig(target_modules="left"))
    assert stats.loss == pytest.approx(nn.functional.mse_loss(model(X), wanted).item(), rel=1e-5)
    with pytest.raises(TargetError, match="no logits"):
        sampled_losses(model, as_batch((X, wanted), model, CPU))


def test_a_tensor_is_the_first_argument_of_any_model() -> None:
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=8,
        patch_size=4,
    )
    model, pixels, labels = (
        ViTForImageClassification(config).eval(),
        torch.randn(4, 3, 8, 8),
        torch.ones(4).long(),
    )
    assert list(as_batch(pixels, model, CPU)) == ["pixel_values"]
    stats = tn.calibrate(model, [(pixels, labels)])
    assert stats.loss == pytest.approx(model(pixels, labels=labels).loss.item(), rel=1e-5)
    same(stats, tn.calibrate(model, [[pixels, labels]]))


def test_a_loss_of_labels_without_labels_is_refused() -> None:
    with pytest.raises(TargetError, match=r"no labels"):
        label_losses(classifier(), as_batch(X, classifier(), CPU))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((X, Y[:5]), r"shape \(5,\)"),
        ((X, torch.randn(64)), r"torch\.float32"),
        ({"input_ids": X}, "no input_ids"),
        ({"input": X, "mask": X, "labels": Y}, "takes no mask"),
        ((X, Y, Y), "tuple of Tensor, Tensor"),
        ([], "list of nothing"),
        ("text", "got a str"),
    ],
)
def test_other_batches_are_refused(given: Any, message: str) -> None:
    model = classifier()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TargetError, match=message):
        tn.compress(model, tn.CompressionConfig(param_ratio=0.5), calibration=[given], progress=False)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_rows_are_cut_only_where_all_arguments_have_them() -> None:
    model = nn.Linear(2, 2)
    ids, mask = torch.ones(8, 4096).long(), torch.ones(8, 4096).long()
    (long,) = some_rows([{"input_ids": ids, "attention_mask": mask}], model, 1024)
    assert long["input_ids"].shape == long["attention_mask"].shape == (1, 1024)
    padded = mask.clone()
    padded[:, :100] = 0
    (left,) = some_rows([{"input_ids": ids, "attention_mask": padded}], model, 1024)
    assert left["input_ids"].shape == (1, 4096)
    graph = {"x": torch.ones(10, 4), "edges": torch.ones(2, 30), "scale": 2.0}
    assert some_rows([graph], model, 4) == [graph]
    (images,) = some_rows([(torch.ones(64, 3, 8, 8), torch.ones(64).long())], model, 784)
    assert images["input"].shape == (4, 3, 8, 8)
    assert images["labels"].shape == (4,)
    assert some_rows([], model, 4) == []
