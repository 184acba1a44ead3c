"""The matrix that a layer keeps in eval is never out of date, and used only where it may be."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

import tensornet as tn
from tensornet.nn.encoding import Storage
from tensornet.quantization import NumberFormat
from tensornet.topologies import mpo

TOPOLOGY = mpo(out_dims=(2, 3, 4), in_dims=(4, 2, 2), max_bond=5)


def small(**options: object) -> tn.nn.MPOLinear:
    return tn.nn.MPOLinear(16, 24, topology=TOPOLOGY, **options)  # type: ignore[arg-type]


def kept(layer: tn.nn.MPOLinear) -> Tensor:
    """Run the layer so that it keeps a matrix, and return that matrix."""
    layer.eval()
    with torch.no_grad():
        layer(torch.randn(3, 16))
    assert layer._cached is not None
    return layer._cached.matrix


def at_hand(layer: tn.nn.TensorNetworkLinear, tokens: int) -> Tensor | None:
    """What the fast path of a layer answers to so many ones."""
    assert layer._fast_path is not None
    return layer._fast_path(torch.ones(tokens, layer.in_features))


def _optimizer_step(layer: tn.nn.MPOLinear) -> None:
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(layer.parameters(), lr=0.1).step()


def _in_place(layer: tn.nn.MPOLinear) -> None:
    with torch.no_grad():
        layer.cores[1].mul_(2)


def _in_place_in_inference_mode(layer: tn.nn.MPOLinear) -> None:
    with torch.inference_mode():
        layer.cores[1].mul_(2)


def _through_a_detached_view(layer: tn.nn.MPOLinear) -> None:
    layer.cores[1].detach().mul_(2)


def _load(layer: tn.nn.MPOLinear) -> None:
    layer.load_state_dict(small().state_dict())


def _load_by_assignment(layer: tn.nn.MPOLinear) -> None:
    layer.load_state_dict(small().state_dict(), assign=True)


def _data(layer: tn.nn.MPOLinear) -> None:
    layer.cores[1].data = torch.randn_like(layer.cores[1])


def _data_twice(layer: tn.nn.MPOLinear) -> None:
    for _ in range(4):  # the allocator likes to give a freed address again
        layer.cores[1].data = torch.randn_like(layer.cores[1])


def _set_cores(layer: tn.nn.MPOLinear) -> None:
    layer.set_cores(small().cores)


def _new_parameter(layer: tn.nn.MPOLinear) -> None:
    layer.core_1 = nn.Parameter(torch.randn_like(layer.core_1))


def _double(layer: tn.nn.MPOLinear) -> None:
    layer.double()


CHANGES = (
    _optimizer_step,
    _in_place,
    _in_place_in_inference_mode,
    _through_a_detached_view,
    _load,
    _load_by_assignment,
    _data,
    _data_twice,
    _set_cores,
    _new_parameter,
    _double,
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
def test_a_change_of_a_core_is_seen(change: Callable[[tn.nn.MPOLinear], None]) -> None:
    layer = small(strategy="cached")
    before = kept(layer).clone()
    change(layer)
    x = torch.randn(3, 16, dtype=layer.weight.dtype)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.to_matrix(), layer.bias))
        if change is not _double:
            assert not torch.allclose(layer.to_matrix(), before), "the change changed nothing"


def test_the_matrix_is_kept_between_passes() -> None:
    layer = small(strategy="cached")
    first = kept(layer)
    with torch.no_grad():
        layer(torch.randn(3, 16))
        assert layer._cached is not None
        assert layer._cached.matrix is first
    with torch.inference_mode():
        layer(torch.randn(3, 16))
        assert layer._cached.matrix is first


def test_the_short_way_to_it_is_taken_only_where_the_long_one_leads_there() -> None:
    layer = small(strategy="cached")
    first, x = kept(layer), torch.randn(3, 16)
    other = {f"core_{k}": torch.randn_like(core) for k, core in enumerate(layer.cores)}
    with torch.no_grad():
        assert answers(at_hand(layer, 3), first)
        layer.training = True  # neither this nor the next two go through a method
        assert at_hand(layer, 3) is None
        layer.training, layer.strategy = False, "reconstruct"
        assert at_hand(layer, 3) is None
        layer.strategy, layer.cache_limit = "cached", 0
        assert at_hand(layer, 3) is None
        layer.cache_limit = None
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert at_hand(layer, 3) is None
        with torch.enable_grad():
            assert at_hand(layer, 3) is None
        seen: list[Tensor | None] = []
        torch.func.vmap(lambda row: seen.append(at_hand(layer, 1)) or row)(x)
        assert seen == [None]
        expected = x @ tn.TensorNetwork(layer.topology, list(other.values())).to_matrix().T + layer.bias
        torch.testing.assert_close(torch.func.functional_call(layer, other, (x,)), expected)
        bias = torch.ones(24)
        expected = x @ first.T + bias
        torch.testing.assert_close(torch.func.functional_call(layer, {"bias": bias}, (x,)), expected)
        nn.utils.parametrize.register_parametrization(layer, "bias", _Ones())
        assert at_hand(layer, 3) is None
        torch.testing.assert_close(layer(x), expected)


def answers(y: Tensor | None, matrix: Tensor) -> bool:
    return y is not None and torch.allclose(y, matrix.sum(1), atol=1e-5)


class _Ones(nn.Module):
    def forward(self, bias: Tensor) -> Tensor:
        return torch.ones_like(bias)


@pytest.mark.parametrize("mode", [True, False])
def test_train_and_eval_drop_it(mode: bool) -> None:
    layer = small(strategy="cached")
    kept(layer)
    nn.Sequential(layer).train(mode)
    assert layer.cached_bytes == 0


def test_it_is_not_used_where_it_must_not_be() -> None:
    layer = small(strategy="cached")
    layer(torch.randn(3, 16))
    assert layer.cached_bytes == 0, "training"
    layer.eval()(torch.randn(3, 16))
    assert layer.cached_bytes == 0, "gradients of the cores are recorded"
    with torch.inference_mode():
        layer.configure(cache_limit=0)(torch.randn(3, 16))
    assert layer.cached_bytes == 0, "over the limit"


def test_it_serves_frozen_layers_whose_input_wants_a_gradient() -> None:
    layer = small(strategy="cached", dtype=torch.float64).eval().requires_grad_(False)
    with torch.inference_mode():
        layer(torch.randn(3, 16, dtype=torch.float64))  # built here, used outside
    x = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).sum(), x)
    torch.testing.assert_close(grad, layer.to_matrix().sum(0).expand(3, -1))
    assert layer.cached_bytes > 0


def test_it_is_no_state() -> None:
    layer = small(strategy="cached")
    kept(layer)
    assert set(layer.state_dict()) == {"core_0", "core_1", "core_2", "bias"}
    assert copy.deepcopy(layer).cached_bytes == 0
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    assert len(pickle.dumps(layer)) < len(pickle.dumps(layer.state_dict())) + 40_000
    buffer.seek(0)
    twin = torch.load(buffer, weights_only=False)
    assert twin.cached_bytes == 0
    x = torch.randn(3, 16)
    with torch.no_grad():
        torch.testing.assert_close(twin(x), layer(x))


def test_loading_keeps_nothing() -> None:
    layer = small(strategy="cached").eval()
    layer.load_state_dict(small().state_dict())
    assert layer.cached_bytes == 0


def test_autocast_keeps_the_low_precision_matrix() -> None:
    layer = small(strategy="cached").eval()
    x = torch.randn(3, 16)
    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(x)
            assert layer.cached_bytes == 16 * 24 * 2
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), layer(x), rtol=3e-2, atol=3e-2)
        assert layer.cached_bytes == 16 * 24 * 4


@pytest.mark.parametrize("strategy", ["auto", "factorized", "reconstruct"])
def test_only_cached_keeps_a_matrix(strategy: str) -> None:
    layer = small(strategy=strategy)
    assert not layer.may_keep_matrix
    with torch.no_grad():
        layer.eval()(torch.randn(300, 16))
    assert layer.cached_bytes == 0
    assert layer.configure(strategy="cached").may_keep_matrix
    assert not layer.configure(cache_limit=layer.matrix_bytes - 1).may_keep_matrix


def replica(module: nn.Module) -> nn.Module:
    """Replicate as `torch.nn.parallel.replicate` does, with floating tensors of twice the value."""
    made = module._replicate_for_data_parallel()
    for name, child in module.named_children():
        setattr(made, name, replica(child))
    for held, copies in ((module._parameters, made._parameters), (module._buffers, made._buffers)):
        for name, x in held.items():
            if x is None:
                copies[name] = None
            else:
                setattr(made, name, 2 * x if x.is_floating_point() else x.clone())
    return made


def stored_as(name: str) -> tn.nn.TensorNetworkLinear:
    storage = Storage(number_format=NumberFormat.parse(name))
    dense = tn.topologies.dense(out_features=64, in_features=64)
    return tn.nn.TensorNetworkLinear(dense, storage=storage)


def recurrent() -> nn.Module:
    model = nn.Sequential(nn.LSTM(64, 8))
    tn.compress(model, tn.CompressionConfig(param_ratio=0.5, objective="weight"), progress=False)
    return model


REPLICATED: dict[str, Callable[[], nn.Module]] = {
    "low rank": lambda: tn.nn.TensorNetworkLinear(
        tn.topologies.low_rank(out_features=64, in_features=64, rank=8)
    ),
    "chain": lambda: tn.nn.MPOLinear(64, 64, max_bond=4),
    "int4:zero": lambda: stored_as("int4:zero"),
    "int8 kernel": lambda: stored_as("int8:row").bfloat16(),
    "int4 kernel": lambda: stored_as("int4").bfloat16(),
    "LSTM": recurrent,
}


@pytest.mark.parametrize("strategy", ["auto", "cached"])
@pytest.mark.parametrize("name", REPLICATED)
def test_replicas_answer_with_their_own_weights(name: str, strategy: Literal["auto", "cached"]) -> None:
    model = REPLICATED[name]().eval()
    tn.nn.set_strategy(model, strategy)
    x = torch.randn(1, 64, dtype=next(model.parameters()).dtype)
    with torch.no_grad():
        before = [model(x) for _ in range(3)][-1]
        twin = copy.deepcopy(model)
        for tensor in (*twin.parameters(), *twin.buffers()):
            if tensor.is_floating_point():
                tensor.mul_(2)
        made = replica(model)
        assert tn.nn.cached_bytes(made) == 0
        for _ in range(2):
            torch.testing.assert_close(made(x), twin(x))
        torch.testing.assert_close(model(x), before)
