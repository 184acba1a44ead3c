"""Upcycling and joint fits of experts whose squares overflow or vanish."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import tensornet_moe as tm
from tensornet.testing import reference
from tensornet.topologies import mpo

SCALES = [
    (torch.float64, 1e160),
    (torch.float64, 1e-160),
    (torch.float64, 1e-200),
    (torch.float32, 1e-30),
    (torch.float32, 1e25),
    (torch.float32, 1.0),
]


def experts(dtype: torch.dtype) -> Tensor:
    return torch.randn(3, 8, 12, generator=torch.Generator().manual_seed(2)).to(dtype)


def true_error(weights: Tensor, bank: tm.SharedCoreExperts, scale: float) -> float:
    made = bank.expert_matrices().detach().double() / scale
    return reference.relative_error(weights.double().flatten(), made.flatten())


@pytest.mark.parametrize(("dtype", "scale"), SCALES)
def test_error_of_a_joint_fit_knows_no_scale(dtype: torch.dtype, scale: float) -> None:
    weights = experts(dtype)
    bank, plain = (tm.SharedCoreExperts.from_experts(weights * x, max_bond=3) for x in (scale, 1.0))
    assert bank.error is not None
    assert plain.fit is not None
    assert bank.fit is not None
    assert bank.error > 0.1
    assert true_error(weights, bank, scale) == pytest.approx(bank.error, rel=1e-4)
    assert bank.error == pytest.approx(plain.error, rel=1e-3)
    assert bank.fit.alone_error == pytest.approx(plain.fit.alone_error, rel=1e-4)
    owner, banks = tm.share_across_layers(weights * scale, num_experts=2, max_bond=3)
    assert owner.names
    for weight, layer in zip(weights, banks, strict=True):
        made = layer.expert_matrices().detach().double()[0] / scale
        assert reference.relative_error(weight, made) == pytest.approx(layer.error, rel=1e-4)


@pytest.mark.parametrize("topology", ["mpo", "bonds that differ"])
@pytest.mark.parametrize(("dtype", "scale"), SCALES)
def test_error_of_an_upcycled_matrix_knows_no_scale(dtype: torch.dtype, scale: float, topology: str) -> None:
    """Where the bonds differ the error is that of the first expert; noise is relative to the cores."""
    weight, options = experts(dtype)[0], {"max_bond": 3}
    if topology != "mpo":
        topologies = [mpo(out_dims=(2, 4), in_dims=(4, 3), max_bond=bond) for bond in (2, 4)]
        options = {"topology": topologies, "shared": "none"}  # type: ignore[dict-item]
    for noise in (0.0, 0.1):
        bank = tm.SharedCoreExperts.from_dense(weight * scale, num_experts=2, noise=noise, **options)
        assert bank.error is not None
        assert bank.error > 0.1
        made = bank.expert_matrices().detach().double() / scale
        if noise == 0:
            assert reference.relative_error(weight, made[0]) == pytest.approx(bank.error, rel=1e-4)
        else:
            assert float((made[0] - made[1]).norm()) > 0.01
