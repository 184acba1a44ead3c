"""A matrix rebuilt in slices gives what the whole one gives, and only where nothing is recorded or traced."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import tensornet as tn
from tensornet.contraction import slicing
from tensornet.contraction.machine import CPU, default_machine
from tensornet.contraction.slicing import plan_slices, run_in_slices
from tensornet.nn import linear
from tensornet.nn.matrix_cache import may_write_in_place
from tensornet.nn.strategy import RECONSTRUCT, SLICED, dispatch, route_seconds
from tensornet.topologies import block_tt, kronecker, low_rank, mpo, tensor_ring, tucker

TOPOLOGIES = {
    "two sites": mpo(out_dims=(6, 8), in_dims=(5, 3), max_bond=7),
    "three sites": mpo(out_dims=(4, 3, 8), in_dims=(2, 4, 5), max_bond=6),
    "four sites": mpo(out_dims=(3, 2, 2, 8), in_dims=(4, 2, 3, 2), max_bond=5),
    "leg of one": mpo(out_dims=(6, 1, 8), in_dims=(1, 4, 3), max_bond=4),
    "low rank": low_rank(out_features=16, in_features=12, rank=3),
    "ring": tensor_ring(out_dims=(4, 2, 8), in_dims=(3, 4, 2), max_bond=3),
    "kronecker": kronecker(out_dims=(4, 8), in_dims=(3, 5), terms=2),
    "tucker": tucker(out_dims=(4, 8), in_dims=(3, 5), max_bond=3),
    "block tt": block_tt(out_dims=(4, 8), in_dims=(3, 5), max_bond=2),
    "padded": mpo(out_dims=(4, 8), in_dims=(3, 4), max_bond=4, out_features=31, in_features=11),
    "one site": mpo(out_dims=(6,), in_dims=(8,)),
}
SLICED_FAMILIES = ("two sites", "three sites", "four sites", "leg of one", "ring", "kronecker", "tucker")
#: Large enough that slices are predicted to be fastest for some token counts.
WIDE = mpo(out_dims=(48, 64), in_dims=(32, 24), max_bond=64)


def wide(**options: object) -> tn.nn.TensorNetworkLinear:
    layer = tn.nn.TensorNetworkLinear(WIDE, strategy="reconstruct", **options)  # type: ignore[arg-type]
    nn.init.normal_(layer.bias)
    return layer


def used(layer: nn.Module, x: Tensor) -> tuple[Tensor, bool]:
    """The output of a layer, and whether it was made in slices."""
    with mock.patch.object(linear, "run_in_slices", wraps=run_in_slices) as spy:
        y = layer(x)
    return y, spy.called


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128, torch.float32])
@pytest.mark.parametrize("name", TOPOLOGIES)
def test_slices_give_the_product_with_the_matrix(name: str, dtype: torch.dtype) -> None:
    topology = TOPOLOGIES[name]
    network = tn.TensorNetwork(topology, [torch.randn(s, dtype=dtype) for s in topology.core_shapes.values()])
    plans = plan_slices(topology)
    assert bool(plans) == (name in SLICED_FAMILIES)
    matrix = network.to_matrix()
    bias = torch.randn(topology.out_features, dtype=dtype)
    for plan in plans:
        widths = [w for w in range(1, plan.outer + 1) if plan.outer % w == 0]
        for width in widths:
            for shape in ((), (1,), (7,), (2, 3), (0,)):
                x = torch.randn(*shape, topology.in_features, dtype=dtype)
                for added in (None, bias):
                    y = run_in_slices(replace(plan, width=width), network.cores, x, added)
                    expected = nn.functional.linear(x, matrix, added)
                    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_that_share_slices(threads: int) -> None:
    topology = TOPOLOGIES["two sites"]
    network = tn.TensorNetwork(topology, [torch.randn(shape) for shape in topology.core_shapes.values()])
    x, before = torch.randn(7, topology.in_features), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for plan in plan_slices(topology):
            for width in (1, 2, 3, 6):
                y = run_in_slices(replace(plan, width=width), network.cores, x)
                torch.testing.assert_close(y, x @ network.to_matrix().T, rtol=1e-4, atol=1e-4)
    finally:
        torch.set_num_threads(before)


def test_strided_tensors() -> None:
    topology = TOPOLOGIES["two sites"]
    cores = [torch.randn(shape[::-1]).permute(3, 2, 1, 0) for shape in topology.core_shapes.values()]
    x, bias = torch.randn(15, 9).T, torch.randn(96)[::2]
    plans = plan_slices(topology)
    assert [plan.gather for plan in plans] == [False, True]
    expected = nn.functional.linear(x, tn.TensorNetwork(topology, cores).to_matrix(), bias)
    for plan in plans:
        torch.testing.assert_close(run_in_slices(plan, cores, x, bias), expected, rtol=1e-4, atol=1e-4)


def test_slices_are_gathered_for_many_tokens() -> None:
    few, many = (SLICED - wide().dispatch.rebuilt[k][1] for k in (0, -1))
    assert [plan_slices(WIDE)[k].gather for k in (few, many)] == [False, True]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_layers_use_them_where_no_gradient_is_recorded(dtype: torch.dtype, bias: bool) -> None:
    layer = tn.nn.TensorNetworkLinear(WIDE, strategy="reconstruct", bias=bias, dtype=dtype)
    x = torch.randn(2, 8, 768, dtype=dtype)
    expected, sliced = used(layer, x)
    assert not sliced
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            y, sliced = used(layer, x)
        assert sliced
        assert y.dtype == dtype
        loose = {"rtol": 1e-1, "atol": 1e-1} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
        torch.testing.assert_close(y, expected, **loose)


def test_auto_uses_them_uncached() -> None:
    layer = wide().configure(strategy="auto", cache_limit=0).eval()
    x = torch.randn(128, 768)
    expected, sliced = used(layer, x)
    assert not sliced
    with torch.no_grad():
        y, sliced = used(layer, x)
        assert sliced
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
        layer.load_state_dict(wide().state_dict())
        y, _ = used(layer, x)
        torch.testing.assert_close(y, nn.functional.linear(x, layer.to_matrix(), layer.bias))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_nothing_else_sees_them() -> None:
    layer = wide()
    x = torch.randn(16, 768)
    with torch.no_grad():
        expected = layer(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, sliced = used(layer, x)
            assert y.dtype == torch.bfloat16
            assert not sliced
        mapped, sliced = used(torch.func.vmap(layer), x[:, None])  # type: ignore[arg-type]
        assert not sliced
        torch.testing.assert_close(mapped[:, 0], expected, rtol=1e-4, atol=1e-4)
        with forward_ad.dual_level():
            y, sliced = used(layer, forward_ad.make_dual(x, torch.ones_like(x)))
            assert not sliced
            tangent = forward_ad.unpack_dual(y).tangent
            expected_tangent = torch.ones_like(x) @ layer.to_matrix().T
            torch.testing.assert_close(tangent, expected_tangent, rtol=1e-4, atol=1e-3)
        y, sliced = used(layer, nn.Parameter(x))
        assert not sliced
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
        assert may_write_in_place()
        told = torch.compile(lambda x: x + may_write_in_place(), backend="eager", fullgraph=True)(
            torch.zeros(1)
        )
        assert told == 0
    assert not may_write_in_place()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_and_exported_programs_hold_no_slices() -> None:
    layer = wide().eval()
    x = torch.randn(16, 768)
    with torch.no_grad():
        expected = layer(x)
        tokens = torch.export.Dim("tokens", min=2, max=4096)
        exported = torch.export.export(layer, (x,), dynamic_shapes=({0: tokens},))
        torch.testing.assert_close(exported.module()(x), expected, rtol=1e-4, atol=1e-4)
        names = {str(node.target) for node in exported.graph.nodes}
        assert not any("out" in name.split(".")[-1] for name in names if name.startswith("aten"))
        compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="eager")
        torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-4)


def test_wrong_inputs_are_named() -> None:
    layer = wide().eval()
    with torch.no_grad():
        with pytest.raises(tn.ShapeError, match=r"shape \(32, 384\).*in_features=768"):
            layer(torch.randn(32, 384))
        with pytest.raises(RuntimeError, match=r"dtype|scalar type"):
            layer(torch.randn(16, 768, dtype=torch.float64))


def test_predictions_count_what_is_done() -> None:
    layer = wide()
    tokens = 64
    with torch.no_grad():
        route = layer.route(tokens)
        told = layer.explain(tokens)
    assert route <= SLICED
    plan = plan_slices(WIDE)[SLICED - route]
    assert told.choice == "reconstruct"
    cost = told["reconstruct"]
    machine = default_machine("cpu")
    assert cost.milliseconds == pytest.approx(1e3 * route_seconds(layer.plan, route, tokens, machine, 4))
    # Two sites: nothing to contract on either side, so the matrix and its use is all the arithmetic.
    assert cost.multiply_adds == 3072 * 768 * (64 + tokens)
    assert cost.memory_bytes == 4 * max(plan.buffer, 64 * 64 * 24) < layer.matrix_bytes
    whole = layer.explain(tokens)
    assert layer.route(tokens) == RECONSTRUCT
    assert whole["reconstruct"].memory_bytes >= layer.matrix_bytes
    assert whole["reconstruct"].milliseconds > cost.milliseconds
    table = dispatch(layer.plan, CPU, 4, slices=False)
    assert all(route > SLICED for _, route in (*table.rebuilt, *table.inference))


def test_buffers_stay_small() -> None:
    for topology in TOPOLOGIES.values():
        for plan in plan_slices(topology):
            assert plan.outer % plan.width == 0
            assert plan.width == 1 or plan.buffer <= slicing._BUFFER
