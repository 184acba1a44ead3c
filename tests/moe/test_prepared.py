"""Banks prepared for inference: the same outputs from dense matrices, neither trained nor saved."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import tensornet as tn
import tensornet_moe as tm
from tensornet.errors import TargetError
from tensornet_moe.prepared import PreparedExperts

E, FEATURES, HIDDEN = 4, 12, 16
CHAIN = tn.topologies.mpo(out_dims=(2, 4, 2), in_dims=(2, 3, 2), max_bond=3)


def bank(shared: str = "center") -> tm.SharedCoreExperts:
    return tm.SharedCoreExperts(CHAIN, E, share=shared, dtype=torch.float64)


def mixture(shared: str = "center") -> tm.SharedCoreMoE:
    torch.manual_seed(0)
    back = tn.topologies.mpo(out_dims=(2, 3, 2), in_dims=(2, 4, 2), max_bond=3)
    down = tm.SharedCoreExperts(back, E, share=shared, dtype=torch.float64)
    network = tm.ExpertFFN({"up": bank(shared), "down": down}, bias=True).double()
    return tm.SharedCoreMoE(tm.TopKRouter(FEATURES, E, top_k=2), network).double().eval()


@pytest.mark.parametrize("rows", [1, 7, 300])
@pytest.mark.parametrize("shared", ["center", "ends", "none", "base"])
def test_outputs_stay(shared: str, rows: int) -> None:
    moe, x = mixture(shared), torch.randn(rows, FEATURES, dtype=torch.float64)
    expected = moe(x)
    matrices = [moe.experts.bank(name).expert_matrices() for name in moe.experts.names]
    tn.nn.prepare_for_inference(moe)
    pulled = x.clone().requires_grad_()
    torch.testing.assert_close(moe(pulled), expected)
    moe(pulled).sum().backward()
    assert pulled.grad is not None
    for name, before in zip(moe.experts.names, matrices, strict=True):
        made = moe.experts.bank(name)
        assert isinstance(made, PreparedExperts)
        assert made.num_params == before.numel() // (E if shared == "base" else 1)
        torch.testing.assert_close(made.expert_matrices(), before)
        torch.testing.assert_close(made.expert_matrices([2, 0, 2]), before[[2, 0, 2]])
        with pytest.raises(IndexError):
            made.expert_matrices([E])


def test_training_and_saving_are_refused() -> None:
    moe = tn.nn.prepare_for_inference(mixture())
    with pytest.raises(TargetError, match="cannot be trained"):
        moe.train()
    with pytest.raises(TargetError, match="cannot be saved"):
        moe.state_dict()
    with pytest.raises(TargetError, match="cannot be saved"):
        tn.nn.module_spec(moe)


def test_banks_that_stay() -> None:
    """Those of one core, of integers, with a strategy of their own, or too large for the limit."""
    dense = tm.SharedCoreExperts(tn.topologies.dense(out_features=8, in_features=8), E, share="none")
    packed, fixed, growing = bank(), bank(), bank()
    packed.quantize("int8")
    fixed.strategy = "factorized"
    growth = E * math.prod(CHAIN.shape) / growing.num_params
    model = nn.ModuleList([dense, packed, fixed, growing])
    before = list(model)
    tn.nn.prepare_for_inference(model, max_growth=0.99 * growth)
    assert all(new is old for new, old in zip(model, before, strict=True))
    tn.nn.prepare_for_inference(model, max_growth=1.01 * growth)
    assert [new is old for new, old in zip(model, before, strict=True)] == [True, True, True, False]


def test_layers_with_a_pool() -> None:
    experts = mixture().experts
    assert isinstance(experts, tm.ExpertFFN)
    pooled = nn.Module()
    pooled.pool = tm.ExpertPool(experts)
    pooled.layers = nn.ModuleList(
        tm.SharedCoreMoE(tm.TopKRouter(FEATURES, E, top_k=2).double(), pooled.pool).eval() for _ in "ab"
    )
    x = torch.randn(5, FEATURES, dtype=torch.float64)
    outputs = [layer(x) for layer in pooled.layers]
    tn.nn.prepare_for_inference(pooled)
    assert all(isinstance(experts.bank(name), PreparedExperts) for name in experts.names)
    for layer, y in zip(pooled.layers, outputs, strict=True):
        torch.testing.assert_close(layer(x), y)
