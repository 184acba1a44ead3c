"""The `weight` of a tensor-network layer: right about dtype, device and shape, and no source of numbers."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tensornet as tn
from tensornet.errors import TargetError
from tensornet.nn.weight_facts import WeightFacts

X = torch.randn(3, 24, generator=torch.Generator().manual_seed(0))
CONFIGS = {
    "int8": tn.CompressionConfig(bits_per_weight=16, formats=("int8",), method="nearest"),
    "low_rank": tn.CompressionConfig(topology="low_rank", topology_options={"max_bond": 4}, method="svd"),
    "mpo": tn.CompressionConfig(topology="mpo", topology_options={"max_bond": 4}, method="svd"),
}


class Using(nn.Module):
    """Applies a layer, and a function to its weight."""

    def __init__(self, use: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.use = nn.Linear(24, 12), use

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.use(self.layer.weight)


def made(name: str, use: Callable[[Tensor], Any] = lambda weight: 0) -> Using:
    model = Using(use)
    tn.compress(model, CONFIGS[name], progress=False)
    return model


NUMBERS: dict[str, Callable[[Tensor], Any]] = {
    "norm": lambda weight: 0.1 * weight.norm(),
    "sum": torch.sum,
    "matmul": lambda weight: X @ weight.T,
    "linear": lambda weight: nn.functional.linear(X, weight),
    "times": lambda weight: 2 * weight[:, 0],
    "data": lambda weight: weight.data[0, 0],
    "numpy": lambda weight: weight.detach().numpy()[0, 0],
    "item": lambda weight: weight[0, 0].item(),
    "pointer": lambda weight: weight.data_ptr(),
    "cast": lambda weight: weight.to(torch.float64)[0, 0],
    "copy": lambda weight: copy.deepcopy(weight)[0, 0],
    "clamp": lambda weight: weight.clamp_(0, 1)[0, 0],
    "stack": lambda weight: torch.cat([weight, weight])[0, 0],
    "written": lambda weight: torch.zeros(12, 24).copy_(weight)[0, 0],
}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("use", NUMBERS)
def test_numbers_of_the_weight_are_refused(config: str, use: str) -> None:
    model = made(config, NUMBERS[use])
    assert isinstance(model.layer, tn.nn.module.NetworkModule)
    with pytest.raises(TargetError, match="to_matrix"):
        model(X)


@pytest.mark.parametrize("config", CONFIGS)
def test_facts_of_the_weight_are_those_of_the_dense_one(config: str) -> None:
    layer, dense = made(config).layer.bfloat16(), nn.Linear(24, 12).bfloat16()
    dense.weight.requires_grad_(config != "int8")  # codes and scales are buffers
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for facts in (layer.weight, copy.deepcopy(layer).weight, pickle.loads(pickle.dumps(layer)).weight):
            assert isinstance(facts, Tensor)
            for name in ("dtype", "device", "shape", "ndim", "requires_grad", "grad", "is_leaf", "is_meta"):
                assert getattr(facts, name) == getattr(dense.weight, name), name
            for name in ("size", "dim", "numel", "element_size", "is_floating_point", "__len__"):
                assert getattr(facts, name)() == getattr(dense.weight, name)(), name
            assert X.to(facts).dtype == X.type_as(facts).dtype == facts.new_zeros(2).dtype == torch.bfloat16
            assert (
                f"{facts}" == repr(facts) == "WeightFacts(shape=(12, 24), dtype=torch.bfloat16, device='cpu')"
            )
    assert not any("weight" in name for name in layer.state_dict())
    assert layer.to("meta").weight.is_meta


def test_a_weight_is_frozen_with_its_cores() -> None:
    layer = made("low_rank").layer
    layer.weight.requires_grad_(False)
    assert not any(layer.stored[name].requires_grad for name in layer.stored)
    assert not layer.weight.requires_grad
    layer.weight.requires_grad = True
    assert all(layer.stored[name].requires_grad for name in layer.stored)


def test_convolutions_answer_with_the_shape_of_the_kernel() -> None:
    model = nn.Sequential(nn.Conv2d(8, 24, 3, groups=2), nn.Conv2d(24, 8, 3))
    shapes = [layer.weight.shape for layer in model]
    tn.compress(model, CONFIGS["low_rank"], progress=False)
    assert [layer.weight.shape for layer in model] == shapes
    for layer in model:
        assert type(layer.weight) is WeightFacts
        with pytest.raises(TargetError, match="sum was called"):
            layer.weight.sum()


def casts(weight: Tensor) -> Tensor:
    assert isinstance(weight, Tensor)
    return torch.ones(1, dtype=weight.dtype, device=weight.device).to(weight) * weight.shape[0]


@pytest.mark.parametrize(
    "config", [pytest.param(x, marks=() if x == "low_rank" else pytest.mark.slow) for x in CONFIGS]
)
def test_facts_are_known_to_compiled_and_exported_programs(config: str) -> None:
    model = made(config, casts).eval()
    with torch.no_grad():
        expected = model(X)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(X), expected)
        for strict in (True, False):
            program = torch.export.export(model, (X,), strict=strict)
            torch.testing.assert_close(program.module()(X), expected)


def test_compiled_programs_refuse_numbers() -> None:
    torch._dynamo.reset()
    model = made("int8", NUMBERS["norm"])
    with torch.no_grad(), pytest.raises(TargetError, match="norm was called"):
        torch.compile(model, backend="eager")(X)
    with torch.no_grad():  # a trace under fake tensors records no subclasses
        assert torch.export.export(model, (X,), strict=False).module()(X).isnan().all()
