"""Layers at the edges: indices outside the table, inputs without dimensions, stock layers of their own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tensornet as tn
from tensornet.topologies import topology_names

STRATEGIES = ("factorized", "reconstruct", "auto")


@pytest.mark.parametrize("family", topology_names())
def test_indices_outside_the_table_are_refused(family: str) -> None:
    """As by nn.Embedding: digit by digit they would wrap around to rows of other tokens, or of padding."""
    layer = tn.nn.MPOEmbedding.from_embedding(nn.Embedding(50, 16), topology=family, max_bond=3)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    inside = torch.tensor([[3, 49]])
    torch.testing.assert_close(compiled(inside), layer(inside))
    for index in (50, 53, 10**6, -1, -60):
        indices = torch.tensor([[3, index]])
        with pytest.raises(IndexError, match=rf"index {index}.*49"):
            layer(indices)
        # A function transform and a compiled graph look at no number: the core itself is asked for an element
        # that it does not have.
        for run in (torch.func.vmap(layer), compiled):
            with pytest.raises(IndexError, match="out of bounds"):
                run(indices)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.bool])
def test_indices_are_integers(dtype: torch.dtype) -> None:
    layer = tn.nn.MPOEmbedding.from_embedding(nn.Embedding(50, 16))
    with pytest.raises(tn.errors.ShapeError, match=rf"got {dtype}"):
        layer(torch.ones(3, dtype=dtype))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("training", [True, False])
def test_input_without_dimensions_is_refused(strategy: str, training: bool) -> None:
    layer = tn.nn.MPOLinear(12, 8, max_bond=2, strategy=strategy).train(training)  # type: ignore[arg-type]
    for recording in (True, False):
        with torch.set_grad_enabled(recording):
            layer(torch.randn(2, 12))  # has a shortcut ready
            with pytest.raises(tn.errors.ShapeError, match="in_features=12"):
                layer(torch.tensor(1.0))


@pytest.mark.parametrize("family", topology_names())
@pytest.mark.parametrize("shape", [(12, 20), (7, 11)])
def test_stock_layers_own_their_weight(family: str, shape: tuple[int, int]) -> None:
    """A network of one core would hand out the core, a padded one a part of something larger."""
    rows, columns = shape
    options = {} if family in ("dense", "low_rank", "kronecker", "tensor_ring", "residual") else {"sites": 1}
    layer = tn.nn.TensorNetworkLinear.from_linear(nn.Linear(columns, rows), topology=family, **options)
    table = tn.nn.MPOEmbedding.from_embedding(nn.Embedding(rows, columns), topology=family, **options)
    for made, dense in ((layer, layer.to_linear()), (table, table.to_embedding())):
        weight = dense.weight
        assert isinstance(weight, torch.Tensor)
        assert weight.is_contiguous()
        assert weight.untyped_storage().nbytes() == weight.nbytes
        before = made.to_matrix().detach().clone()
        with torch.no_grad():
            weight.zero_()
        assert torch.equal(made.to_matrix(), before)


@pytest.mark.filterwarnings("ignore:.torch.jit.trace", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("warm", [False, True])
def test_traced_layers_keep_nothing_of_the_trace(strategy: str, warm: bool) -> None:
    """The old tracer crashed the process on tensors that a layer had kept from its trace."""
    layer = tn.nn.MPOLinear(30, 24, max_bond=3, strategy=strategy).eval()  # type: ignore[arg-type]
    x = torch.randn(4, 30)
    with torch.no_grad():
        if warm:
            layer(x)
        traced = torch.jit.trace(layer, x)
        layer.core_1 *= 2  # type: ignore[operator]
        torch.testing.assert_close(traced(x), layer(x))  # the cores are its parameters, not constants
