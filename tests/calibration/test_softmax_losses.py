"""Cross entropies and divergences in blocks equal the plain formulas, in value and gradient."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import tensornet.softmax_losses as module
from tensornet.healing.heal import output_distance
from tensornet.softmax_losses import cross_entropies, kl_divergences


def divergence(
    student: Tensor, teacher: Tensor, mask: Tensor | None = None, temperature: float = 1.0
) -> Tensor:
    batch = {} if mask is None else {"attention_mask": mask}
    return output_distance({"logits": student}, {"logits": teacher}, batch, temperature)


def plain(student: Tensor, teacher: Tensor, mask: Tensor | None, temperature: float) -> Tensor:
    new, old = (x if mask is None else x[mask] for x in (student, teacher))
    new, old = (x.double().reshape(-1, x.shape[-1]) / temperature for x in (new, old))
    found = nn.functional.kl_div(
        new.log_softmax(-1), old.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    return found * temperature**2


def logits(dtype: torch.dtype = torch.float32, size: float = 4.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (size * torch.randn(3, 7, 33, generator=generator) for _ in range(2))
    return student.to(dtype).requires_grad_(), teacher.to(dtype)


MASKS = {
    "none": None,
    "all": torch.ones(3, 7, dtype=torch.bool),
    "some": torch.arange(21).reshape(3, 7) % 5 != 2,
}


@pytest.mark.parametrize("block", [1, 4 * 33 + 5, 2**18])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_value_and_gradient_of_the_plain_formula(
    block: int, mask: str, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BLOCK", block)
    student, teacher = logits(torch.float64)
    found, expected = (f(student, teacher, MASKS[mask], temperature) for f in (divergence, plain))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        *(torch.autograd.grad(3 * x, student)[0] for x in (found, expected)), rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_have_the_dtype_of_the_logits(dtype: torch.dtype) -> None:
    student, teacher = logits(dtype)
    found, expected = (f(student, teacher, MASKS["some"], 1.0) for f in (divergence, plain))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    gradient, wanted = (torch.autograd.grad(x, student)[0] for x in (found, expected))
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient, wanted)


def test_a_scaler_keeps_small_gradients_in_half_precision() -> None:
    """A scaler multiplies the loss so that gradients below the range of float16 are not lost."""
    student, teacher = (x.detach().expand(500, -1, -1, -1) for x in logits(torch.float16, size=0.02))
    student = student.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(2.0**14 * divergence(student, teacher), student)
    exact = (student.detach().double().softmax(-1) - teacher.double().softmax(-1)) * 2.0**14 / (500 * 21)
    assert float((gradient - exact).norm()) < 1e-2 * float(exact.norm())


def test_large_logits_and_equal_models() -> None:
    student, teacher = logits(size=1e4)
    assert math.isfinite(float(divergence(student.detach(), teacher)))
    assert float(divergence(teacher, teacher)) == 0


def test_no_token_counts() -> None:
    student, teacher = logits()
    found = divergence(student.detach(), teacher, torch.zeros(3, 7, dtype=torch.bool))
    assert math.isnan(float(found))


def test_the_teacher_and_losses_under_no_grad_have_no_gradient() -> None:
    student, teacher = logits()
    assert not divergence(student.detach(), teacher.requires_grad_()).requires_grad
    with torch.no_grad():
        assert not divergence(student, teacher).requires_grad


def test_divergences_of_rows() -> None:
    (student, teacher), rows = logits(torch.float64), torch.tensor([20, 3, 4])
    new, old = (x.reshape(21, -1) for x in (student, teacher))
    found = kl_divergences(new, old, rows, 2.0)
    expected = torch.stack([plain(new[[k]], old[[k]], None, 2.0) / 4 for k in rows.tolist()])
    torch.testing.assert_close(found, expected)
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    torch.testing.assert_close(
        *(torch.autograd.grad((weights * x).sum(), student)[0] for x in (found, expected))
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [0, 5, 12])
def test_cross_entropies_and_gradients_are_those_of_torch(
    dtype: torch.dtype, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BLOCK", 3 * 7)
    torch.manual_seed(0)
    logits = (3 * torch.randn(12, 7)).to(dtype).requires_grad_()
    rows, labels = torch.randperm(12)[:count], torch.randint(7, (count,))
    weights = torch.randn(count)
    wanted = nn.functional.cross_entropy(logits[rows].float(), labels, reduction="none")
    (expected,) = torch.autograd.grad((weights * wanted).sum(), logits)
    found = cross_entropies(logits, labels, rows)
    (gradient,) = torch.autograd.grad((weights * found).sum(), logits)
    torch.testing.assert_close(found, wanted)
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient, expected)
