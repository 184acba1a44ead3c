"""Moments from half of their products, and of models that run in 16 bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tensornet as tn
from tensornet.calibration import moment_sums as gram


@settings(max_examples=30)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 50))
def test_sums_grow_by_half_of_the_products(tokens: int, size: int, block: int) -> None:
    x = torch.randn(3, tokens, size, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gram, "_BLOCK", block)
        total = torch.zeros(size, size, dtype=torch.float64)
        gram.add_gram(total, x[0])
        total += gram.upper_gram(x[1])
        gram.add_gram(total, x[2])
        found = gram.mirrored(total)
    torch.testing.assert_close(found, sum(part.T @ part for part in x), rtol=1e-5, atol=1e-5)
    assert torch.equal(found, found.T)


def losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(batch["input"]).square().sum(-1)


def test_calibration_in_16_bits_sums_exact_products() -> None:
    """Moments are those of the inputs that a layer reads in 16 bits, but their products are not rounded."""
    torch.manual_seed(0)
    model, x = nn.Linear(6, 4), torch.randn(400, 6)
    exact = tn.calibrate(model, [{"input": x}], loss_fn=losses)
    fast = tn.calibrate(model, [{"input": x}], loss_fn=losses, autocast=torch.bfloat16)
    read = x.bfloat16().double()
    torch.testing.assert_close(fast.columns[""], (read.T @ read / 400).float(), rtol=1e-5, atol=1e-5)
    assert fast.rows[""].dtype == torch.float32
    assert not torch.equal(fast.rows[""], exact.rows[""])
    torch.testing.assert_close(fast.rows[""], exact.rows[""], rtol=0.02, atol=0.1)


def test_calibration_leaves_the_precision_of_products_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The setting belongs to the whole process: other threads would compute with it, too."""
    products = type(torch.backends.mkldnn.matmul)
    changed = []

    def refuse(self: object, name: str, value: object) -> None:
        changed.append((name, value))

    monkeypatch.setattr(products, "__setattr__", refuse)
    x = torch.randn(40, 6).bfloat16()
    gram.add_products(torch.ones(6, 6), x, x)
    tn.calibrate(nn.Linear(6, 4), [{"input": x.float()}], loss_fn=losses, autocast=torch.bfloat16)
    assert not changed


def test_correlated_outliers_keep_positive_moments() -> None:
    """Products in 16 bits would have negative eigenvalues of the size of the other channels."""
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(256, 8, generator=generator)
    gradient[:, :4] += 200 * torch.randn(256, 1, generator=generator)
    batch = {"input": torch.randn(256, 4, generator=generator), "gradient": gradient}

    def along(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return (model(batch["input"]) * batch["gradient"].bfloat16()).float().sum(-1)

    moment = tn.calibrate(nn.Linear(4, 8), [batch], loss_fn=along, autocast=torch.bfloat16).rows[""].double()
    assert torch.linalg.eigvalsh(moment)[0] > 0.1 * moment.diagonal()[4:].mean()


def test_many_batches_in_16_bits_do_not_lose_digits() -> None:
    """Sums in 16 bits would stop growing after some 256 equal batches."""
    torch.manual_seed(0)
    model, x = nn.Linear(4, 3), torch.randn(20, 4)
    once = tn.calibrate(model, [{"input": x}], loss_fn=losses, autocast=torch.bfloat16)
    often = tn.calibrate(model, [{"input": x}] * 600, loss_fn=losses, autocast=torch.bfloat16)
    torch.testing.assert_close(often.rows[""], once.rows[""], rtol=1e-4, atol=1e-5)


def test_the_callers_autocast_stays_on() -> None:
    seen = []

    def observed(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        return losses(model, batch).float()

    with torch.autocast("cpu", torch.bfloat16):
        tn.calibrate(nn.Linear(6, 4), [{"input": torch.randn(5, 6)}], loss_fn=observed)
    assert all(seen)
