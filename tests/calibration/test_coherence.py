"""Coherence: gradients of whole rows, beside those of tokens taken as independent."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import tensornet as tn
from tensornet.calibration.coherence import CoherenceSum, by_rows, row_sizes, squared_row_gradients
from tensornet.compression.sensitivity import layer_weighting
from tensornet.nn.targets import LayerSelection, find_targets


class Pooled(nn.Module):
    """Two layers on the tokens of each row, the mean over tokens, and a head."""

    def __init__(self, time_first: bool = False, in_place: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(5, 8), nn.Linear(8, 6), nn.Linear(6, 3)
        self.time_first, self.in_place = time_first, in_place

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        mask = torch.ones(x.shape[:2]) if attention_mask is None else attention_mask.float()
        tokens = x.transpose(0, 1) if self.time_first else x
        hidden = 2 * self.first(tokens) if self.in_place else torch.tanh(self.first(tokens))
        found = self.second(hidden)
        if self.in_place:
            hidden.mul_(1)
        found = found.transpose(0, 1) if self.time_first else found
        return self.head((found * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


def losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(batch["x"], batch.get("attention_mask")).square().sum(-1)


def data(count: int = 1, padded: bool = False) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    made = []
    for _ in range(count):
        batch = {"x": torch.randn(4, 7, 5, generator=generator) + 1}
        if padded:
            batch["attention_mask"] = torch.ones(4, 7, dtype=torch.long)
            batch["attention_mask"][1, 4:] = 0
        made.append(batch)
    return made


def gradients(model: nn.Module, name: str, batch: dict[str, Tensor]) -> tuple[float, float]:
    """Squared gradients of one weight, of rows and of their tokens alone, by autograd."""
    layer, seen = model.get_submodule(name), []
    handle = layer.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    found = losses(model, batch)
    handle.remove()
    ((x, out),) = seen
    rows = sum(
        float(torch.autograd.grad(loss, layer.weight, retain_graph=True)[0].square().sum()) for loss in found
    )
    (g,) = torch.autograd.grad(found.sum(), out)
    return rows, float((x.detach().square().sum(-1) * g.square().sum(-1)).sum())


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("time_first", [False, True])
@pytest.mark.parametrize("name", ["first", "second", "head"])
def test_gradients_of_rows_relative_to_those_of_tokens(name: str, time_first: bool, padded: bool) -> None:
    torch.manual_seed(0)
    model, batches = Pooled(time_first), data(padded=padded)
    found = tn.calibrate(model, batches, loss_fn=losses).coherence[name]
    rows, tokens = gradients(model, name, batches[0])
    assert found == pytest.approx(rows / tokens, rel=1e-4)
    assert (found == pytest.approx(1)) == (name == "head")  # after the pooling: one token a row


def test_a_layer_before_the_pooling_weighs_more() -> None:
    torch.manual_seed(0)
    model = Pooled()
    stats = tn.calibrate(model, data(), loss_fn=losses)
    (target,) = find_targets(model, LayerSelection(target_modules=("second",)))
    known = layer_weighting(target, "curvature", stats, 0.0)
    alone = layer_weighting(target, "curvature", tn.CalibrationStats(stats.rows, stats.columns, 28, 0.0), 0.0)
    assert known is not None
    assert alone is not None
    assert stats.coherence["second"] > 2
    torch.testing.assert_close(known.rows, alone.rows * stats.coherence["second"])


def test_every_fourth_batch_is_measured() -> None:
    torch.manual_seed(0)
    model, batches = Pooled(), data(5)
    found = tn.calibrate(model, batches, loss_fn=losses).coherence
    assert found != tn.calibrate(model, batches[:4], loss_fn=losses).coherence
    assert tn.calibrate(model, batches[:4], loss_fn=losses).coherence == pytest.approx(
        tn.calibrate(model, batches[:1], loss_fn=losses).coherence
    )


def test_an_input_changed_in_place_is_left_out() -> None:
    stats = tn.calibrate(Pooled(in_place=True), data(), loss_fn=losses)
    assert sorted(stats.coherence) == ["first", "head"]


def test_large_inputs_do_not_overflow_under_float16() -> None:
    """The squared norm of such an input is beyond 65,504."""
    model = nn.Sequential(nn.Linear(64, 40, bias=False))
    batch = {"input": torch.full((3, 5, 64), 40.0)}

    def sums(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(batch["input"]).sum((1, 2))

    found = tn.calibrate(model, [batch], loss_fn=sums, autocast=torch.float16).coherence["0"]
    assert found == pytest.approx(5)  # five tokens that are all alike


def test_inputs_alone_have_none() -> None:
    assert not tn.calibrate(Pooled(), data(), loss_fn=losses, gradient_batches=0).coherence


def test_it_is_saved(tmp_path: Path) -> None:
    stats = tn.calibrate(Pooled(), data(), loss_fn=losses)
    stats.save(tmp_path / "stats.safetensors")
    assert tn.CalibrationStats.load(tmp_path / "stats.safetensors").coherence == stats.coherence


@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 6), st.integers(1, 6))
def test_squared_gradients_by_either_product(rows: int, tokens: int, inputs: int, outputs: int) -> None:
    x, gradient = torch.randn(rows, tokens, inputs), torch.randn(rows, tokens, outputs)
    expected = torch.einsum("rto,rti->roi", gradient.double(), x.double()).square().sum()
    torch.testing.assert_close(squared_row_gradients(x, gradient), expected, rtol=1e-4, atol=1e-6)


@given(st.integers(1, 5), st.integers(1, 9))
def test_bounds(rows: int, tokens: int) -> None:
    """1 for single tokens; the number of tokens where all of a row are alike; nothing is above it."""
    x, gradient = torch.randn(rows, 1, 3), torch.randn(rows, 1, 2)
    for repeats in (1, tokens):
        alike = CoherenceSum()
        alike.add(x.expand(-1, repeats, -1), gradient.expand(-1, repeats, -1))
        assert alike.ratio == pytest.approx(repeats, rel=1e-4)
    seen = CoherenceSum()
    seen.add(torch.randn(rows, tokens, 3), torch.randn(rows, tokens, 2))
    assert seen.ratio is not None
    assert 0 <= seen.ratio <= tokens * (1 + 1e-4)


def test_nothing_has_no_ratio() -> None:
    seen = CoherenceSum()
    seen.add(torch.zeros(2, 3, 4), torch.zeros(2, 3, 5))
    assert seen.ratio is None


def test_rows_of_windows_and_of_gathered_tokens() -> None:
    assert row_sizes({"pixel_values": torch.zeros(2, 3, 8, 8)}) == (2, frozenset({3}))
    windows = torch.arange(8.0).reshape(4, 2, 1)  # two windows of each image
    found = by_rows(windows, 2, {3})
    assert found is not None
    assert found[..., 0].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert by_rows(torch.zeros(0, 4), 2, {3}) is None
    assert by_rows(torch.zeros(3, 4), 2, {3}) is None
