"""What mixtures and their parts refuse: each call has one error of the right type, with a decisive word."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tensornet as tn
import tensornet_moe as tm
from tensornet.errors import NonFiniteError, ShapeError, TargetError, TopologyError
from tensornet_moe.pool import PooledExperts

E, FEATURES, HIDDEN = 5, 8, 12
LEGS = {FEATURES: (2, 2, 2), HIDDEN: (2, 3, 2)}
PARAMETER = nn.Parameter(torch.zeros(1))
LINEAR: Any = nn.Linear(2, 2)


def chain(rows: int, columns: int, max_bond: int = 3) -> tn.Topology:
    return tn.topologies.mpo(out_dims=LEGS[rows], in_dims=LEGS[columns], max_bond=max_bond)


def bank(rows: int = HIDDEN, columns: int = FEATURES, experts: int = E, **options: Any) -> Any:
    return tm.SharedCoreExperts(chain(rows, columns), experts, **options)


def network(**banks: Any) -> tm.ExpertFFN:
    return tm.ExpertFFN({"up": bank(), "down": bank(FEATURES, HIDDEN), **banks})


def moe(router: Any = None, experts: Any = None, **options: Any) -> object:
    return tm.SharedCoreMoE(router or tm.SwitchRouter(FEATURES, E), experts or network(), **options)


def pooled(experts: range) -> object:
    return PooledExperts(tm.ExpertPool(network()), experts)


def mask(parameters: Any = PARAMETER, p: float = 0.5, **options: Any) -> tm.GradientMask:
    return tm.GradientMask([parameters] if parameters is PARAMETER else parameters, p=p, **options)


def holed(value: float, *shape: int) -> Tensor:
    weight = torch.randn(*shape)
    weight.view(-1)[7] = value
    return weight


def from_dense(weight: Any = None, experts: Any = 2, **options: Any) -> object:
    weight = torch.ones(4, 4) if weight is None else weight
    return tm.SharedCoreExperts.from_dense(weight, num_experts=experts, **options)


from_experts = tm.SharedCoreExperts.from_experts
deltas_of = tm.LowRankDeltaExperts.from_experts
Call = Callable[[], object]
EXPERTS: list[tuple[Call, type[Exception], str]] = [
    (lambda: tm.SharedCoreExperts([chain(8, 8, 2), chain(8, 12)], 2), TopologyError, r"0 and 1.*\(8, 12\)"),
    (
        lambda: tm.SharedCoreExperts([chain(8, 8), tn.topologies.mpo(out_dims=(2, 4), in_dims=(2, 4))], 2),
        TopologyError,
        "0 and 1 differ",
    ),
    (lambda: tm.SharedCoreExperts([chain(8, 8), chain(8, 8, 2)], 3), ValueError, "num_experts=3"),
    (lambda: bank(share="middle"), ValueError, "ends, center"),
    (lambda: bank(share=["7"]), TopologyError, r"\['7'\]"),
    (lambda: bank().expert_matrices([E]), IndexError, r"in \[0, 5\)"),
    (
        lambda: tm.SharedCoreExperts(tn.topologies.residual(out_features=8, in_features=8, rank=2), 2),
        TopologyError,
        "'residual' is a sum",
    ),
    (lambda: from_dense(torch.randn(10, 12), topology=chain(12, 12)), TopologyError, r"shape \(10, 12\)"),
    (
        lambda: from_dense(torch.randn(12, 12), topology=chain(12, 12), max_bond=3),
        TopologyError,
        "drop max_bond",
    ),
    (lambda: from_dense(holed(math.nan, 12, 12)), NonFiniteError, "1 NaN"),
    (lambda: from_experts(torch.randn(12, 12)), ShapeError, r"got \(12, 12\)"),
    (
        lambda: from_experts(torch.randn(2, 12, 10), topology=chain(12, 12)),
        ShapeError,
        r"\(num_experts, 12, 12\)",
    ),
    (lambda: from_experts(holed(math.inf, 2, 12, 12), topology=chain(12, 12)), NonFiniteError, "contains 1"),
    (lambda: tm.LowRankDeltaExperts(bank(), 9), ShapeError, "rank=9"),
    (lambda: tm.LowRankDeltaExperts(bank(), 0), ValueError, "rank"),
    (lambda: tm.LowRankDeltaExperts(LINEAR, 1), TypeError, "ExpertBank, got Linear"),
    (lambda: deltas_of(torch.randn(12, 8), rank=1), ShapeError, "num_experts, out, in"),
    (lambda: deltas_of(torch.full((2, 12, 8), math.nan), rank=1), NonFiniteError, "NaN"),
]
NO_MATRIX = [
    (torch.ones(4, 4).long(), "int64"),
    (torch.ones(4), r"\(4,\)"),
    (torch.ones(0, 4), r"\(0, 4\)"),
    ([[1.0]], "list"),
]
EXPERTS += [(lambda x=x: from_dense(x), ShapeError, word) for x, word in NO_MATRIX]  # type: ignore[misc]
EXPERTS += [(lambda x=x: from_experts(x), ShapeError, "num_experts, out, in") for x, _ in NO_MATRIX]  # type: ignore[misc]
for number in (0, 2.0, "2", True):
    least = f"num_experts.*at least 1, got {number!r}"
    EXPERTS.append((lambda x=number: from_dense(experts=x), ValueError, least))  # type: ignore[misc]
    EXPERTS.append((lambda x=number: bank(experts=x), ValueError, least))  # type: ignore[misc]

LAYERS: list[tuple[Call, type[Exception], str]] = [
    (lambda: network(down=bank(FEATURES, HIDDEN, E + 1)), ShapeError, "do not fit"),
    (lambda: network(down=bank()), ShapeError, "do not fit"),
    (lambda: network(up=LINEAR), TypeError, "'up'.*ExpertBank"),
    (
        lambda: tm.ExpertFFN({"up": bank(), "down": bank(FEATURES, HIDDEN)}, activation="sine"),
        ValueError,
        "'sine'",
    ),
    (lambda: tm.ExpertFFN({"up": bank()}), ValueError, r"got \['up'\]"),
    (lambda: moe(tm.SwitchRouter(FEATURES, 3)), ShapeError, "3 experts"),
    (lambda: moe(LINEAR), TypeError, "a Router, got Linear"),
    (lambda: moe(shared_expert=network()), ShapeError, r"shared expert.*\(1, 8, 8\)"),
    (lambda: moe(capacity_factor=0), ValueError, "capacity_factor"),
    (lambda: tm.TopKRouter(FEATURES, E, bias_rate=-1.0), ValueError, "bias_rate"),
    (lambda: tm.ExpertChoiceRouter(FEATURES, E, bias_rate=0.1), ValueError, "even without"),
    (lambda: tm.update_biases(nn.ModuleList([moe()])), RuntimeError, "has biases"),  # type: ignore[list-item]
    (lambda: moe(tm.SwitchRouter(9, E), tm.ExpertPool(network())), ShapeError, "tokens of size 9"),
    (lambda: moe(tm.SwitchRouter(FEATURES, 4), tm.ExpertPool(network())), ShapeError, "for 4 experts"),
    (
        lambda: PooledExperts("pool", range(5), in_features=8, out_features=9).connect(
            tm.ExpertPool(network())
        ),
        ShapeError,
        r"\(8, 8\).*\(8, 9\)",
    ),
    (lambda: tm.ExpertPool(bank()), TypeError, "ExpertFFN, got SharedCoreExperts"),
    *(
        (lambda x=x: pooled(x), IndexError, "range")
        for x in (range(0), range(4, 0, -1), range(-1, 3), range(3, 6), range(5, 9))
    ),  # type: ignore[misc]
]
for rate in (-1e-3, math.nan, math.inf, "0.1", None):
    LAYERS.append((lambda x=rate: tm.parameter_groups(LINEAR, lr=x), ValueError, "lr"))  # type: ignore[misc]

MASKS: list[tuple[Call, type[Exception], str]] = [
    *((lambda p=p: mask(p=p), ValueError, r"\[0, 1\]") for p in (-0.1, 1.1, math.nan)),  # type: ignore[misc]
    (lambda: mask(granularity="row"), ValueError, "core, element"),
    (lambda: mask(granularity="element", compensate=True), ValueError, 'needs granularity="core"'),
    (lambda: mask(compensate=True).apply(), RuntimeError, "see the update"),
    (lambda: mask(LINEAR), TargetError, "Linear has no core"),
    (lambda: mask(bank(share="none")), TargetError, "no core"),
    (lambda: mask([]), TargetError, "once"),
    (lambda: mask([PARAMETER, PARAMETER]), TargetError, "once"),
    (lambda: mask().attach(torch.optim.SGD(LINEAR.parameters(), lr=0.1)), TargetError, "1 of the 1"),
]


@pytest.mark.parametrize(("call", "error", "word"), [*EXPERTS, *LAYERS, *MASKS])
def test_each_call_is_refused(call: Call, error: type[Exception], word: str) -> None:
    with pytest.raises(error, match=word):
        call()
