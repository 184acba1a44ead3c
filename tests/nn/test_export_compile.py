"""Layers under compilers, export, autocast, functional transforms, checkpointing and inference mode."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jvp, vmap
from torch.utils.checkpoint import checkpoint

import tensornet as tn
from tensornet.nn.strategy import STRATEGIES
from tensornet.topologies import low_rank, mpo

TOPOLOGIES = {
    "mpo": mpo(out_dims=(2, 3, 4), in_dims=(4, 2, 2), max_bond=5),
    "padded": mpo(out_dims=(3, 4), in_dims=(4, 3), max_bond=4, out_features=11, in_features=10),
    "low rank": low_rank(out_features=12, in_features=8, rank=3),
}
EACH_STRATEGY = pytest.mark.parametrize("strategy", STRATEGIES)


def layer_for(name: str, strategy: str) -> tn.nn.TensorNetworkLinear:
    layer = tn.nn.TensorNetworkLinear(TOPOLOGIES[name], strategy=strategy)  # type: ignore[arg-type]
    nn.init.normal_(layer.bias)
    return layer


def dense(layer: tn.nn.TensorNetworkLinear, x: torch.Tensor) -> torch.Tensor:
    return nn.functional.linear(x, layer.to_matrix(), layer.bias)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch.compiler.reset()


@pytest.mark.slow
def test_the_package_imports_no_compiler() -> None:
    """It takes seconds, and only those who compile need it."""
    code = "import sys, tensornet; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@EACH_STRATEGY
@pytest.mark.parametrize("training", [pytest.param(True, marks=pytest.mark.slow), False])
def test_compiles_in_one_graph_for_any_token_count(strategy: str, training: bool) -> None:
    layer = layer_for("mpo", strategy).train(training)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="eager")
    for tokens in (2, 5, 1000):
        x = torch.randn(tokens, 16)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), dense(layer, x), rtol=1e-4, atol=1e-5)
        y = compiled(x)
        expected = torch.autograd.grad(dense(layer, x).square().sum(), layer.core_1)
        torch.testing.assert_close(
            torch.autograd.grad(y.square().sum(), layer.core_1), expected, rtol=1e-3, atol=1e-3
        )


@EACH_STRATEGY
@pytest.mark.parametrize("name", TOPOLOGIES)
def test_exports_with_dynamic_tokens(name: str, strategy: str) -> None:
    layer = layer_for(name, strategy).eval()
    x = torch.randn(6, layer.in_features)
    batch = torch.export.Dim("batch", min=2, max=10**6)
    program = torch.export.export(layer, (x,), dynamic_shapes={"input": {0: batch}})
    for tokens in (2, 300, 5000):
        x = torch.randn(tokens, layer.in_features)
        torch.testing.assert_close(program.module()(x), dense(layer, x), rtol=1e-4, atol=1e-5)
    stored = sum(t.numel() for t in program.state_dict.values()) + sum(
        t.numel() for t in program.constants.values() if isinstance(t, torch.Tensor)
    )
    assert stored == layer.num_params, "no dense weight in the program"


@EACH_STRATEGY
def test_vmap_over_inputs_and_over_parameters(strategy: str) -> None:
    layer = layer_for("mpo", strategy).eval()
    x = torch.randn(3, 5, 16)
    with torch.no_grad():
        torch.testing.assert_close(vmap(layer)(x), dense(layer, x))
        stacked = {k: torch.stack([v, 2 * v, -v]) for k, v in layer.state_dict().items()}
        y = vmap(lambda p, t: functional_call(layer, p, (t,)))(stacked, x)
        for k in range(3):
            one = {name: value[k] for name, value in stacked.items()}
            torch.testing.assert_close(y[k], functional_call(layer, one, (x[k],)))
        torch.testing.assert_close(layer(x[0]), dense(layer, x[0]))


@EACH_STRATEGY
def test_functional_gradients(strategy: str) -> None:
    layer = layer_for("mpo", strategy).eval().requires_grad_(False)
    x = torch.randn(5, 16)
    parameters = dict(layer.named_parameters())

    def loss(values: dict[str, torch.Tensor], t: torch.Tensor) -> torch.Tensor:
        return functional_call(layer, values, (t,)).square().sum()

    values, by_input = grad(loss, argnums=(0, 1))(parameters, x)
    ready = {name: value.clone().requires_grad_() for name, value in parameters.items()}
    t = x.clone().requires_grad_()
    loss(ready, t).backward()
    torch.testing.assert_close(by_input, t.grad)
    torch.testing.assert_close(values, {name: value.grad for name, value in ready.items()})
    # Only the input is differentiated: what the transform made must not be kept after it.
    torch.testing.assert_close(grad(lambda z: layer(z).sum())(x), layer.to_matrix().sum(0).expand(5, -1))
    _, tangent = jvp(layer, (x,), (x,))
    torch.testing.assert_close(tangent, x @ layer.to_matrix().T)
    torch.testing.assert_close(layer(x), dense(layer, x))
    each = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    torch.testing.assert_close(each["bias"].sum(0), values["bias"])


@EACH_STRATEGY
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_gradient_checkpointing(strategy: str, reentrant: bool, training: bool) -> None:
    layer = layer_for("mpo", strategy).train(training)
    x = torch.randn(5, 16, requires_grad=True)
    y = checkpoint(layer, x, use_reentrant=reentrant)
    torch.testing.assert_close(y, dense(layer, x))
    got = torch.autograd.grad(y.sum(), [x]) if not reentrant else None
    if reentrant:
        y.sum().backward()
        got = (x.grad,)
        assert layer.core_1.grad is not None
    torch.testing.assert_close(got[0], layer.to_matrix().sum(0).expand(5, -1))


@EACH_STRATEGY
def test_inference_mode_and_back(strategy: str) -> None:
    layer = layer_for("mpo", strategy).eval()
    x = torch.randn(5, 16)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), dense(layer, x))
        born_inside = layer_for("mpo", strategy).eval()
        torch.testing.assert_close(born_inside(x), dense(born_inside, x))
        born_inside.core_1.mul_(2)  # an inference tensor counts no versions
        torch.testing.assert_close(born_inside(x), dense(born_inside, x))
    torch.testing.assert_close(layer(x), dense(layer, x))


def test_embedding_compiles_and_exports() -> None:
    layer = tn.nn.MPOEmbedding(mpo(out_dims=(3, 4), in_dims=(2, 4), max_bond=4, out_features=11)).eval()
    indices = torch.tensor([[0, 10, 5]])
    expected = layer.to_matrix()[indices]
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="eager")
    torch.testing.assert_close(compiled(indices), expected)
    program = torch.export.export(
        layer, (indices,), dynamic_shapes={"input": {1: torch.export.Dim("n", min=2)}}
    )
    torch.testing.assert_close(program.module()(indices[:, :2]), expected[:, :2])
