"""Extensions: what a plugin can teach about its models, and the names that did so before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

import tensornet as tn
from tensornet.errors import CalibrationWarning
from tensornet.nn import extension as extensions
from tensornet.nn.extension import ModelExtension, ProvidedData, register_extension
from tensornet.registry import Registry

CONFIG = tn.CompressionConfig(param_ratio=0.5, target_modules="all")


class Stack(nn.Module):
    """Two matrices in one parameter."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weights: nn.Parameter | None = nn.Parameter(torch.randn(2, 12, 12, generator=generator))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.weights is None:
            return self.second(self.first(x))
        return x @ self.weights[0].T @ self.weights[1].T


class Stacks(ModelExtension):
    """Shows the matrices of a `Stack` as layers, and knows data for it."""

    def __init__(self) -> None:
        self.told: list[nn.Module] = []

    @contextmanager
    def unfused(self, model: nn.Module) -> Iterator[None]:
        stack = model if isinstance(model, Stack) and model.weights is not None else None
        if stack is not None:
            for name, matrix in zip(("first", "second"), stack.weights.detach(), strict=True):
                layer = nn.Linear(12, 12, bias=False)
                layer.weight = nn.Parameter(matrix)
                stack.add_module(name, layer)
            stack.weights = None
        yield
        if stack is not None and isinstance(stack.first, nn.Linear):
            stack.weights = nn.Parameter(torch.stack([stack.first.weight, stack.second.weight]).detach())
            del stack.first, stack.second

    def layers_replaced(self, model: nn.Module) -> bool:
        self.told.append(model)
        return True

    def calibration_data(self, model: nn.Module) -> ProvidedData | None:
        return ProvidedData([torch.eye(12)], "unit vectors") if isinstance(model, Stack) else None


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> list[ModelExtension]:
    monkeypatch.setattr(extensions, "_EXTENSIONS", Registry("model extension", error=TypeError))
    return extensions._EXTENSIONS


def test_an_extension_shows_layers_offers_data_and_is_told() -> None:
    mine = register_extension(Stacks())
    model, x = Stack(), torch.eye(12)
    wanted = model(x)
    with pytest.warns(CalibrationWarning, match="unit vectors"):
        report = tn.compress(model, CONFIG, progress=False)
    assert [layer.name for layer in report.layers] == ["first", "second"]
    assert mine.told == [model]
    assert model.weights is None
    assert torch.linalg.norm(model(x) - wanted) < 0.9 * torch.linalg.norm(wanted)


def test_a_plan_alone_leaves_the_model_in_its_own_form() -> None:
    register_extension(Stacks())
    model = Stack()
    assert len(tn.plan(model, tn.CompressionConfig(topology_options={"max_bond": 2}, method="svd"))) == 2
    assert [name for name, _ in model.named_parameters()] == ["weights"]


@pytest.mark.parametrize("extension", [Stacks, lambda model: True, None])
def test_only_instances_can_be_registered(extension: object) -> None:
    with pytest.raises(TypeError, match="ModelExtension"):
        register_extension(extension)
