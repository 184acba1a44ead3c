"""Small by default: a pass leaves nothing behind, and on its way holds at most one dense matrix."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from allocations import peak
from torch import nn

import tensornet as tn
import tensornet_moe as tm
from tensornet.contraction.plan import plan_operator
from tensornet.nn.storage import Storage
from tensornet.topologies import low_rank, mpo
from tensornet_moe.grouped_linear import group_rows

# Torch before 2.13 says at every profile that a cycle forgets the one before.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Warning. Profiler clears events:UserWarning"),
]

FEATURES = 768
CHAIN = mpo(out_dims=(8, 8, 12), in_dims=(12, 8, 8), max_bond=24)
MODELS: dict[str, Callable[[], nn.Module]] = {
    "chain": lambda: tn.nn.TensorNetworkLinear(CHAIN),
    "low rank": lambda: tn.nn.TensorNetworkLinear(low_rank(out_features=512, in_features=FEATURES, rank=90)),
    "padded": lambda: tn.nn.TensorNetworkLinear(
        mpo(out_dims=(23, 33), in_dims=(24, 33), max_bond=20, out_features=750, in_features=FEATURES)
    ),
    "ring": lambda: tn.nn.TensorNetworkLinear(
        tn.topologies.tensor_ring(out_dims=(8, 8, 12), in_dims=(12, 8, 8), max_bond=6)
    ),
    "tucker": lambda: tn.nn.TensorNetworkLinear(
        tn.topologies.tucker(out_dims=(24, 32), in_dims=(32, 24), max_bond=9)
    ),
    "int8": lambda: tn.nn.TensorNetworkLinear(CHAIN, storage=Storage(pivoted=True, number_format="int8")),
    "embedding": lambda: tn.nn.MPOEmbedding(CHAIN),
    "experts": lambda: _mixture().experts,
}
STRATEGIES = ("auto", "factorized", "reconstruct")
TOKENS = (1, 16, 300, 2048)


def _mixture() -> tm.SharedCoreMoE:
    banks = {name: tm.SharedCoreExperts(CHAIN, 2) for name in ("up", "down")}
    return tm.SharedCoreMoE(tm.SwitchRouter(FEATURES, 2), tm.ExpertFFN(banks))


def inputs(model: nn.Module, tokens: int) -> tuple[object, ...]:
    x = torch.randn(tokens, FEATURES)
    if isinstance(model, tn.nn.MPOEmbedding):
        return (torch.randint(768, (tokens,)),)
    if isinstance(model, tm.ExpertFFN):
        return x, group_rows(torch.arange(tokens) * 2 // tokens, 2)
    return (x,)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_a_pass_leaves_nothing_behind(name: str, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    held_bytes = importlib.import_module("harness").held_bytes
    model = MODELS[name]().train(training)
    stored = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    assert held_bytes(model) == stored
    for strategy in STRATEGIES:
        tn.nn.set_strategy(model, strategy)
        for tokens in TOKENS:
            for recording in {training, False}:
                with torch.set_grad_enabled(recording):
                    for _ in range(2):
                        model(*inputs(model, tokens))
                assert held_bytes(model) == stored, (strategy, tokens, recording)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("strategy", ["auto", "reconstruct"])
@pytest.mark.parametrize("name", ["chain", "padded", "ring", "int8"])
def test_a_pass_needs_one_dense_matrix_and_a_few_blocks_of_it(name: str, strategy: str, tokens: int) -> None:
    layer = MODELS[name]().eval()
    tn.nn.set_strategy(layer, strategy)  # type: ignore[arg-type]
    x = torch.randn(tokens, FEATURES)
    dense = 4 * math.prod(layer.topology.shape)
    cores = sum(4 * math.prod(s) for s in layer.topology.core_shapes.values())
    blocks = 3 * max(dense // 8, 2**20 if dense > 8 * 2**20 else 0)
    with torch.no_grad():
        y = layer(x)
        assert peak(lambda: layer(x)) <= dense + blocks + y.nbytes + (2 * cores if name == "int8" else 2**14)
    layer.train()
    assert peak(lambda: layer(x)) <= 2 * dense + blocks + y.nbytes + cores, "with gradients two of them"


def test_a_layer_is_planned_at_its_first_pass() -> None:
    topology = mpo(out_dims=(3, 5, 7), in_dims=(7, 5, 3), max_bond=4)
    before = plan_operator.cache_info().misses
    layers = [tn.nn.TensorNetworkLinear(topology) for _ in range(3)]
    assert plan_operator.cache_info().misses == before
    for layer in layers:
        layer(torch.randn(2, 105))
    assert plan_operator.cache_info().misses == before + 1
