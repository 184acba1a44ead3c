"""Layers of stock types that are changed from outside: by hooks, or by a `forward` set on them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_submodules
from torch import nn
from torch.nn.utils import prune, remove_weight_norm, spectral_norm

import tensornet as tn
from tensornet.errors import TargetError
from tensornet.nn.layer_kinds import kind_of

INT8 = tn.CompressionConfig(bits_per_weight=16, formats=("int8",), method="nearest", target_modules="all")
X = torch.randn(3, 24, generator=torch.Generator().manual_seed(0))


def weight_norm(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # models still use what torch advises against
        return nn.utils.weight_norm(layer)


def pruned_bias(layer: nn.Module) -> nn.Module:
    return prune.random_unstructured(layer, "bias", 0.5)


RECOMPUTED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight_norm": weight_norm,
    "spectral_norm": spectral_norm,
    "prune": lambda layer: prune.random_unstructured(layer, "weight", 0.5),
    "prune_bias": pruned_bias,
}


@pytest.mark.parametrize("name", RECOMPUTED)
def test_a_weight_that_a_hook_recomputes_stays_dense(name: str) -> None:
    """Loading changes the parameters that the hook reads, and not the attribute `weight`."""
    model, other = (
        nn.Sequential(RECOMPUTED[name](nn.Linear(24, 24)), nn.Linear(24, 24, bias=False)).eval()
        for _ in range(2)
    )
    state = {key: 3 * value for key, value in model.state_dict().items()}
    for x in (model, other):
        x.load_state_dict(state)
    with torch.no_grad():
        expected = other(X)
    with pytest.warns(UserWarning, match=r"0 \(weight recomputed.*remove_weight"):
        coverage = tn.compress(model, INT8, progress=False).coverage
    assert type(model[0]) is nn.Linear
    assert isinstance(model[1], tn.nn.module.NetworkModule)
    assert "Linear (weight recomputed by a hook)" in coverage.unknown
    with torch.no_grad():
        torch.testing.assert_close(model(X), expected, rtol=0.05, atol=0.05 * float(expected.abs().max()))


def with_buffer(layer: nn.Module) -> nn.Module:
    layer.register_buffer("calls", torch.zeros(1))
    return layer


def with_submodule(layer: nn.Module) -> nn.Module:
    layer.observer = nn.BatchNorm1d(24)
    return layer


@pytest.mark.parametrize("add", [with_buffer, with_submodule])
@pytest.mark.parametrize(
    "layer", [lambda: nn.Linear(24, 24), lambda: nn.Conv1d(24, 24, 1)], ids=["linear", "conv"]
)
def test_a_layer_with_more_tensors_keeps_them(layer: Callable[[], nn.Module], add: Any) -> None:
    model = nn.ModuleList([add(layer()), nn.Linear(24, 24)])
    before = {name: value.clone() for name, value in model[0].state_dict().items()}
    with pytest.warns(UserWarning, match="0 .more tensors.*register"):
        coverage = tn.compress(model, INT8, progress=False).coverage
    assert any("more tensors" in name for name in coverage.unknown)
    after = model[0].state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert isinstance(model[1], tn.nn.module.NetworkModule)


def test_errors_name_such_layers_and_say_how_to_mend_them() -> None:
    model = nn.Sequential(weight_norm(nn.Linear(24, 24)))
    with pytest.raises(TargetError, match=r"Nothing to compress.*recomputed"):
        tn.compress(model, INT8, progress=False)
    model.append(nn.Linear(24, 24))
    with pytest.raises(TargetError, match=r"Pattern '0'.*recomputed"):
        tn.plan(model, tn.CompressionConfig(target_modules="0", param_ratio=0.5, method="svd"))
    with pytest.raises(TargetError, match="recomputed"):
        tn.nn.TensorNetworkLinear.from_linear(model[0], max_bond=2)
    remove_weight_norm(model[0])
    assert kind_of(model[0]) is not None


def times_two(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    return 2 * output


def plus_one(module: nn.Module, args: Any, kwargs: Any) -> Any:
    return tuple(x + 1 for x in args), {key: x + 1 for key, x in kwargs.items()}


class Convolved(nn.Module):
    """A convolution, two linear layers tied to one another, and a table."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.body = nn.Embedding(50, 8), nn.Conv1d(8, 24, 1)
        self.first, self.second = nn.Linear(24, 24), nn.Linear(24, 24)
        self.second.weight = self.first.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        y = self.body(self.table(tokens).transpose(1, 2)).transpose(1, 2)
        return self.second(self.first(input=y))


TOKENS = torch.arange(14).reshape(2, 7)


def test_hooks_are_carried_over_and_back() -> None:
    torch.manual_seed(0)
    model = Convolved()
    seen: list[str] = []
    handles = [
        model.table.register_forward_hook(times_two),
        model.body.register_forward_hook(times_two),
        model.first.register_forward_pre_hook(plus_one, with_kwargs=True),
        model.second.register_full_backward_hook(lambda *_: seen.append("back")),
        model.second.register_full_backward_pre_hook(lambda *_: seen.append("before back")),
    ]
    expected = model(TOKENS)

    def check(kind: type[nn.Module]) -> None:
        assert isinstance(model.first, kind)
        seen.clear()
        output = model(TOKENS)
        torch.testing.assert_close(
            output, expected, rtol=0.05, atol=0.05 * float(expected.detach().abs().max())
        )
        output.sum().backward()
        assert seen == ["before back", "back"]

    tn.compress(model, INT8, progress=False)
    check(tn.nn.module.NetworkModule)
    tn.decompress(model)
    check(nn.Linear)
    assert type(model.body) is nn.Conv1d
    for handle in handles:  # what registering returned still removes them
        handle.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())


def test_hooks_stay_where_a_file_is_loaded(tmp_path: Path) -> None:
    made = Convolved()
    tn.compress(made, INT8, progress=False)
    tn.save_model(made, tmp_path / "made")
    model = Convolved()
    model.second.register_forward_hook(times_two)
    tn.load_model(model, tmp_path / "made")
    torch.testing.assert_close(model(TOKENS), 2 * made(TOKENS))
    model = Convolved()
    set_forward(model.second)
    with pytest.raises(TargetError, match=r"'second'.*forward"):
        tn.load_model(model, tmp_path / "made")


def set_forward(layer: nn.Module) -> None:
    before = layer.forward
    layer.forward = lambda *args, **kwargs: 2 * before(*args, **kwargs)


@pytest.mark.parametrize("name", ["first", "body", "table"])
def test_a_layer_whose_forward_was_set_stays_dense(name: str) -> None:
    model = Convolved()
    model.second.weight = nn.Parameter(model.second.weight.detach().clone())
    layer = model.get_submodule(name)
    plan = tn.plan(model, INT8)
    set_forward(layer)
    expected = model(TOKENS)
    with pytest.warns(UserWarning, match=rf"{name} \(forward"):
        coverage = tn.compress(model, INT8, progress=False).coverage
    assert model.get_submodule(name) is layer
    assert f"{type(layer).__name__} (forward set on the layer itself)" in coverage.unknown
    torch.testing.assert_close(
        model(TOKENS), expected, rtol=0.05, atol=0.05 * float(expected.detach().abs().max())
    )
    if name != "body":  # a layer of its own
        with pytest.raises(TargetError, match=rf"'{name}'.*forward"):
            tn.apply_plan(tn.decompress(model), plan)


def test_a_forward_that_was_set_on_a_compressed_layer_is_not_lost() -> None:
    model = Convolved()
    tn.compress(model, INT8, progress=False)
    set_forward(model.first)
    with pytest.raises(TargetError, match=r"first.*forward"):
        tn.decompress(model)
    del model.first.forward
    assert type(tn.decompress(model).first) is nn.Linear


def test_hooks_of_accelerate_move_with_the_layer() -> None:
    """Dispatching a model over devices wraps the `forward` of every layer."""
    model = Convolved().eval()
    expected = model(TOKENS)
    for layer in model.children():
        add_hook_to_module(layer, AlignDevicesHook("cpu", io_same_device=True))
    hooks = {name: layer._hf_hook for name, layer in model.named_children()}
    assert tn.compress(model, INT8, progress=False).coverage.unknown.keys() <= {"biases"}
    for kind in (tn.nn.module.NetworkModule, nn.Linear):
        assert isinstance(model.first, kind)
        assert {name: layer._hf_hook for name, layer in model.named_children()} == hooks
        assert all(layer.forward.args == (layer,) for layer in model.children())
        torch.testing.assert_close(model(TOKENS), expected, rtol=0.05, atol=0.05)
        torch.testing.assert_close(copy.deepcopy(model)(TOKENS), model(TOKENS))
        tn.decompress(model)
    remove_hook_from_submodules(model)
    assert not any(hasattr(layer, "_hf_hook") for layer in model.children())
    tn.compress(model, INT8, progress=False)
    assert isinstance(model.second, tn.nn.module.NetworkModule)
