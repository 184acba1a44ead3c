"""Coherence: errors that add up over the tokens of a row, beside those of independent tokens."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import tensornet as tn
from tensornet.calibration.batches import by_rows, row_sizes
from tensornet.calibration.coherence import (
    SAMPLED_ROWS,
    SAMPLED_TOKENS,
    CoherenceSample,
    whitened,
)
from tensornet.damping import COLUMN_DAMPING, ROW_DAMPING


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


class NotInPlace(Pooled):
    """What `Pooled(in_place=True)` computes."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(2 * self.first(x)).mean(1))


def losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).square().sum(-1)


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


def of_rows(
    model: nn.Module, name: str, batches: list[dict[str, Tensor]], stats: tn.CalibrationStats
) -> float:
    """Whitened squared gradients of rows relative to those of their tokens alone, by autograd."""
    layer, joint, alone = model.get_submodule(name), 0.0, 0.0
    columns = whitened(torch.eye(layer.in_features), stats.columns[name], COLUMN_DAMPING).float()
    rows = whitened(torch.eye(layer.out_features), stats.rows[name], ROW_DAMPING).float()
    for batch in batches:
        seen = []
        handle = layer.register_forward_hook(lambda _, args, out, seen=seen: seen.append((args[0], out)))
        found = losses(model, batch)
        handle.remove()
        ((x, out),) = seen
        for loss in found:
            (gradient,) = torch.autograd.grad(loss, layer.weight, retain_graph=True)
            joint += float((rows.mT @ gradient @ columns).square().sum())
        (g,) = torch.autograd.grad(found.sum(), out)
        alone += float(((x.detach() @ columns).square().sum(-1) * (g @ rows).square().sum(-1)).sum())
    return joint / alone


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("time_first", [False, True])
@pytest.mark.parametrize("name", ["first", "second"])
def test_whitened_gradients_of_rows_relative_to_those_of_tokens(
    name: str, time_first: bool, padded: bool
) -> None:
    torch.manual_seed(0)
    model, batches = Pooled(time_first), data(3, padded=padded)
    stats = tn.calibrate(model, batches, loss_fn=losses)
    assert stats.coherence[name] == pytest.approx(of_rows(model, name, batches, stats), rel=1e-4)
    assert stats.coherence[name] > 1.2
    assert "head" not in stats.coherence  # after the pooling: one token a row


def test_it_is_that_of_errors_that_are_alike_in_all_directions() -> None:
    """Of errors that rounding under both moments leaves: `E = R^(-1/2) Z C^(-1/2)` with independent `Z`."""
    torch.manual_seed(0)
    x, gradient = torch.randn(6, 9, 5) * torch.arange(1, 6), torch.randn(6, 9, 4) + 1
    columns, rows = (torch.einsum("rti,rtj->ij", y, y) for y in (x, gradient))
    sample = CoherenceSample("layer")
    sample.add(sample.hold(x, None, {"x": x}), gradient, {"x": x})
    sides = (rows, ROW_DAMPING), (columns, COLUMN_DAMPING)
    white = [whitened(torch.eye(len(moment)), moment, damping).double() for moment, damping in sides]
    errors = white[0] @ torch.randn(4000, 4, 5, dtype=torch.float64) @ white[1].mT
    changes = torch.einsum("rto,noi,rti->nrt", gradient.double(), errors, x.double())
    expected = changes.sum(-1).square().sum() / changes.square().sum()
    assert sample.ratio(columns, rows) == pytest.approx(float(expected), rel=0.05)


def long_rows(count: int) -> tuple[Tensor, Tensor]:
    """Inputs and gradients whose tokens share a part in each row."""
    generator = torch.Generator().manual_seed(1)
    return tuple(
        torch.randn(count, 1, size, generator=generator) + torch.randn(count, 300, size, generator=generator)
        for size in (24, 20)
    )


def test_some_tokens_stand_for_all() -> None:
    x, gradient = long_rows(SAMPLED_ROWS)
    columns, rows = (torch.einsum("rti,rtj->ij", y, y) for y in (x, gradient))
    a, b = (
        whitened(x.flatten(0, 1), columns, COLUMN_DAMPING),
        whitened(gradient.flatten(0, 1), rows, ROW_DAMPING),
    )
    joint = torch.einsum("rti,rto->rio", a.view(x.shape), b.view(gradient.shape)).square().sum()
    exact = float(joint / (a.square().sum(-1) * b.square().sum(-1)).sum())
    found = []
    for name in range(20):
        sample = CoherenceSample(str(name))
        sample.add(sample.hold(x, None, {"x": x}), gradient, {"x": x})
        found.append(sample.ratio(columns, rows))
    assert exact > 10
    assert sum(found) / 20 == pytest.approx(exact, rel=0.03)
    assert max(abs(value - exact) for value in found) < 0.15 * exact


def test_memory_is_bounded_and_every_row_has_the_same_chance() -> None:
    kept: Counter[int] = Counter()
    for name in range(300):
        sample = CoherenceSample(str(name))
        for run in range(16):
            x = torch.full((4, 50, 1), float(run))
            sample.add(sample.hold(x, None, {"x": x}), x, {"x": x})
        assert len(sample._kept) == SAMPLED_ROWS
        assert {tuple(one.x.shape) for one in sample._kept.values()} == {(SAMPLED_TOKENS, 1)}
        kept.update(int(one.x[0]) for one in sample._kept.values())
    expected = 300 * SAMPLED_ROWS / 16
    assert all(abs(kept[run] - expected) < 6 * expected**0.5 for run in range(16))


def test_the_choice_is_repeatable_and_leaves_the_generators_alone() -> None:
    model, state = Pooled(), random.getstate()
    before = torch.get_rng_state()
    found = [tn.calibrate(model, data(9), loss_fn=losses).coherence for _ in range(2)]
    assert found[0] == found[1]
    assert random.getstate() == state
    assert torch.equal(torch.get_rng_state(), before)


def test_an_input_changed_in_place_later_does_no_harm() -> None:
    torch.manual_seed(0)
    model = Pooled(in_place=True)
    stats = tn.calibrate(model, data(3), loss_fn=losses)
    plain = NotInPlace()
    plain.load_state_dict(model.state_dict())
    expected = tn.calibrate(plain, data(3), loss_fn=losses).coherence["second"]
    assert stats.coherence["second"] == pytest.approx(expected, rel=1e-5)


def test_large_inputs_do_not_overflow_under_float16() -> None:
    """The squared norm of such an input is beyond 65,504."""
    model = nn.Sequential(nn.Linear(64, 40, bias=False))
    batch = {"input": torch.full((3, 5, 64), 40.0)}

    def sums(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(batch["input"]).sum((1, 2))

    found = tn.calibrate(model, [batch], loss_fn=sums, autocast=torch.float16).coherence["0"]
    assert found == pytest.approx(5)  # five tokens that are all alike


def test_inputs_alone_have_none() -> None:
    assert not tn.calibrate(Pooled(), data(), loss_fn=losses, gradients=False).coherence


@given(st.integers(1, 5), st.integers(2, 9))
def test_bounds(rows: int, tokens: int) -> None:
    """The number of tokens where all of a row are alike; nothing is above it, for any moments."""
    x, gradient = torch.randn(rows, 1, 3), torch.randn(rows, 1, 2)
    alike = CoherenceSample("layer")
    wide = [y.expand(-1, tokens, -1) for y in (x, gradient)]
    alike.add(alike.hold(wide[0], None, {"x": wide[0]}), wide[1], {"x": wide[0]})
    for moments in ((torch.eye(3), torch.eye(2)), (x[:, 0].mT @ x[:, 0], gradient[:, 0].square().mean(0))):
        assert alike.ratio(*moments) == pytest.approx(tokens, rel=1e-6)
    x, gradient = torch.randn(rows, tokens, 3), torch.randn(rows, tokens, 2)
    seen = CoherenceSample("layer")
    seen.add(seen.hold(x, None, {"x": x}), gradient, {"x": x})
    assert 0 < seen.ratio(torch.eye(3), torch.eye(2)) <= tokens * (1 + 1e-6)


def test_nothing_has_no_ratio() -> None:
    sample = CoherenceSample("layer")
    assert sample.ratio(torch.eye(4), torch.eye(5)) is None
    x = torch.zeros(2, 3, 4)
    sample.add(sample.hold(x, None, {"x": x}), torch.zeros(2, 3, 5), {"x": x})
    assert sample.ratio(torch.zeros(4, 4), torch.eye(5)) is None
    assert sample.ratio(torch.eye(4), torch.eye(5)) is None
    assert sample.hold(torch.zeros(2, 1, 4), None, {"x": torch.zeros(2, 1, 4)}) == []


def test_tokens_that_cancel_out_still_cost_something() -> None:
    x, gradient = torch.ones(1, 4, 1), torch.tensor([1.0, -1.0, 1.0, -1.0]).reshape(1, 4, 1)
    sample = CoherenceSample("layer")
    sample.add(sample.hold(x, None, {"x": x}), gradient, {"x": x})
    assert sample.ratio(torch.ones(1), torch.ones(1)) == pytest.approx(0.1)


def test_rows_of_windows_and_of_gathered_tokens() -> None:
    assert row_sizes({"pixel_values": torch.zeros(2, 3, 8, 8)}) == (2, frozenset({3}))
    windows = torch.arange(8.0).reshape(4, 2, 1)  # two windows of each image
    found = by_rows(windows, 2, {3})
    assert found is not None
    assert found[..., 0].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert by_rows(torch.zeros(0, 4), 2, {3}) is None
    assert by_rows(torch.zeros(3, 4), 2, {3}) is None
