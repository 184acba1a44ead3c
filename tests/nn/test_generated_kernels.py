"""Kernels that compilers generate: used where their cache cannot confuse the integers of two models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor import config

import tensornet as tn
from tensornet.nn.encoding import Storage
from tensornet.nn.generated_kernels import kernels_are_confused, kernels_are_generated
from tensornet.nn.kernel_layout import has_layout
from tensornet.nn.linear import TensorNetworkLinear, linear_from_network
from tensornet.quantization import NumberFormat
from tensornet.topologies import topology_family

SHAPE = (128, 64)
TUNED = {"freezing": True, "max_autotune": True}
SAFE = {**TUNED, "fx_graph_cache": False, "fx_graph_remote_cache": False}
FORMATS = ["int4", "int6", "int8:row"]

pytestmark = pytest.mark.skipif(
    not has_layout(NumberFormat.parse("int4"), SHAPE), reason="this build of torch has no such kernel"
)


def layer(name: str, seed: int) -> TensorNetworkLinear:
    torch.manual_seed(seed)
    network = topology_family("dense").decompose(torch.randn(SHAPE), tn.Budget()).network
    storage = Storage(number_format=NumberFormat.parse(name))
    made = linear_from_network(network, bias=None, source="linear", storage=storage)
    return made.requires_grad_(False).bfloat16().eval()


def tokens(count: int) -> Tensor:
    return torch.randn(count, SHAPE[1], generator=torch.Generator().manual_seed(count)).bfloat16()


def operations(module: nn.Module, x: Tensor) -> list[str]:
    """The operations that a compiler is given."""
    torch._dynamo.reset()
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch.compile(module, fullgraph=True, backend=backend)(x)
    return seen


@pytest.mark.parametrize(
    ("settings", "units", "generated", "confused"),
    [
        ({}, True, False, False),
        ({"freezing": True}, True, False, False),
        ({"max_autotune": True, "fx_graph_cache": False}, True, False, False),
        (TUNED, True, False, True),
        (TUNED, False, False, True),
        ({**SAFE, "max_autotune": False, "max_autotune_gemm": True}, True, True, False),
        ({**TUNED, "force_disable_caches": True}, True, True, False),
        (SAFE, True, True, False),
        (SAFE, False, False, False),
    ],
)
def test_settings_decide(
    settings: dict[str, Any], units: bool, generated: bool, confused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: units)
    base = {"freezing": False, "max_autotune": False, "max_autotune_gemm": False, "fx_graph_cache": True}
    with config.patch(**{**base, "force_disable_caches": False, **settings}):
        with torch.no_grad():
            assert (kernels_are_generated(), kernels_are_confused()) == (generated, confused)
        # Of what records gradients nothing is frozen.
        assert (kernels_are_generated(), kernels_are_confused()) == (False, False)


@pytest.mark.parametrize("name", FORMATS)
def test_kernels_multiply_any_number_of_tokens_or_none(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: True)
    made = layer(name, 0)
    for settings, counts in ((SAFE, {2, 300}), (TUNED, set()), ({}, {2})):
        with torch.no_grad(), config.patch(settings):
            found = {n for n in (2, 300) if any("pack_mm" in x for x in operations(made, tokens(n)))}
        assert found == counts, settings


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")  # by Inductor itself, while it tunes
@pytest.mark.parametrize(("name", "settings"), [("int4", TUNED), ("int8:row", TUNED), ("int6", SAFE)])
def test_two_models_of_one_shape_compute_with_their_own_weights(
    name: str, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    x = tokens(16)
    for seed in (0, 1):
        made = layer(name, seed)
        torch._dynamo.reset()
        with torch.no_grad(), config.patch(settings):
            expected = made(x).float()
            found = torch.compile(made)(x).float()
        assert float((found - expected).abs().max()) <= 0.02 * float(expected.abs().max())
