"""float16 on the CPU: products of cores are computed in float32, which is more exact."""

from __future__ import annotations

import pytest
import torch

import tensornet as tn

FAMILIES = {"low_rank": {}, "mpo": {"sites": 3}, "tucker": {}}


def layer(family: str, shape: tuple[int, int] = (48, 36)) -> tn.nn.TensorNetworkLinear:
    dense = torch.nn.Linear(shape[1], shape[0])
    made = tn.nn.TensorNetworkLinear.from_linear(dense, topology=family, param_ratio=0.5, **FAMILIES[family])
    return made.half().eval()


@pytest.mark.parametrize("strategy", ["factorized", "reconstruct", "auto"])
@pytest.mark.parametrize("family", FAMILIES)
def test_products_are_as_exact_as_float32(family: str, strategy: str) -> None:
    half, wide = layer(family), layer(family).float()
    half.strategy, wide.strategy = strategy, "reconstruct"  # type: ignore[assignment]
    wide.load_state_dict(half.state_dict())
    x = torch.randn(5, 36).half()
    with torch.no_grad():
        expected = wide(x.float())
        for _ in range(3):  # by the long way, and by the fast path that it leaves
            got = half(x)
            assert got.dtype == torch.float16
            torch.testing.assert_close(got.float(), expected, rtol=2e-3, atol=2e-3)
        ulp = torch.finfo(torch.float16).eps  # each is rounded to half precision once
        torch.testing.assert_close(half.to_matrix().float(), wide.to_matrix(), rtol=ulp, atol=ulp**2)
    half.train()(x).float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float16 for p in half.parameters())
