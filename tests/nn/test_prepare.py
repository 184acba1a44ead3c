"""Layers prepared for inference: the same numbers from torch's int4 kernel and from dense matrices."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

import tensornet as tn
from tensornet.errors import TargetError
from tensornet.nn import int4_cpu
from tensornet.nn.embedding import embedding_from_network
from tensornet.nn.int4_cpu import KERNEL_TOKENS, MAX_GROWTH, has_layout, layout_bytes, to_kernel
from tensornet.nn.linear import TensorNetworkLinear, linear_from_network
from tensornet.nn.prepare import Int4Core, PreparedLinear
from tensornet.nn.storage import PackedCore, Storage
from tensornet.quantization import NumberFormat
from tensornet.topologies import Budget, low_rank, mpo, topology_family

SHAPE = (192, 128)
ONCE = ["int4", "int4:g32", "int4:row", "int4:g128:float8", "int3"]
TWICE = ["int5", "int6:g128", "int7:row", "int8"]
LARGER = ["int2", "int5:g32"]
LAYOUTS = [*ONCE, *TWICE]

needs_kernel = pytest.mark.skipif(
    not has_layout(NumberFormat.parse("int4"), SHAPE), reason="this build of torch has no such kernel"
)
CHAIN = mpo(out_dims=(8, 4, 8), in_dims=(4, 8, 4), max_bond=24)


def layer(name: str, shape: tuple[int, int] = SHAPE) -> TensorNetworkLinear:
    torch.manual_seed(0)
    network = topology_family("dense").decompose(torch.randn(shape), Budget()).network
    storage = Storage(number_format=NumberFormat.parse(name))
    made = linear_from_network(network, bias=torch.randn(shape[0]), source="linear", storage=storage)
    return made.requires_grad_(False).bfloat16()


def prepared(name: str, shape: tuple[int, int] = SHAPE) -> TensorNetworkLinear:
    made = tn.nn.prepare_for_inference(layer(name, shape), max_growth=4)
    assert isinstance(made, TensorNetworkLinear)
    return made


def tokens(count: int, columns: int = SHAPE[1]) -> torch.Tensor:
    return torch.randn(count, columns, generator=torch.Generator().manual_seed(count)).bfloat16()


def expected(name: str, x: torch.Tensor, shape: tuple[int, int] = SHAPE) -> torch.Tensor:
    truth = layer(name, shape)
    return nn.functional.linear(x.float(), truth.float().to_matrix(), truth.bias)


def close(found: torch.Tensor, truth: torch.Tensor) -> None:
    assert float((found.float() - truth).abs().max()) <= 0.01 * float(truth.abs().max())


@needs_kernel
@pytest.mark.parametrize("shape", [SHAPE, (64, 1152)])
@pytest.mark.parametrize("name", [*LAYOUTS, *LARGER])
def test_values_are_those_of_the_stored_integers(
    name: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int4_cpu, "_BLOCK", 2 * 64 * shape[1])
    number_format, (rows, columns) = NumberFormat.parse(name), shape
    assert number_format.bits is not None
    torch.manual_seed(0)
    groups = (rows, number_format.groups(columns))
    codes = torch.randint(0, number_format.points.top + 1, shape, dtype=torch.uint8)
    codes[0, :2] = torch.tensor([0, number_format.points.top])
    scales = torch.rand(groups).to(number_format.scales.dtype)
    matrix = to_kernel(number_format, number_format.pack(codes), scales, columns)
    assert matrix.shape == shape
    assert matrix.nbytes == layout_bytes(number_format, shape)
    assert matrix.products == (1 if name in (*ONCE, "int2") else 2)
    if number_format.bits == 4 and matrix.products == 1:
        torchs = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 1)
        assert torch.equal(matrix.codes, torchs)
    for dtype in (torch.float32, torch.bfloat16):
        values = number_format.decode(codes, scales, None, dtype)
        assert torch.equal(matrix.dense(dtype), values)
        assert torch.equal(torch.cat([rows for _, rows in matrix.blocks(dtype)]), values)
        if dtype == torch.float32:
            close(matrix.by_kernel(tokens(3, columns)), tokens(3, columns).float() @ values.T)


@needs_kernel
@pytest.mark.parametrize("count", [1, KERNEL_TOKENS // 2 + 1, KERNEL_TOKENS + 1])
@pytest.mark.parametrize("name", [*LAYOUTS, *LARGER])
def test_products(name: str, count: int) -> None:
    made, x = prepared(name), tokens(count)
    assert isinstance(made.integer_core, Int4Core)
    assert not any(isinstance(x, PackedCore) for x in made.modules())
    for _ in range(2):  # chosen, then remembered
        close(made(x), expected(name, x))
        close(made(x.view(1, count, -1))[0], expected(name, x))
    close(made.to_matrix(), layer(name).float().to_matrix())
    pulled, exact = x.clone().requires_grad_(), x.float().requires_grad_()
    made(pulled).square().sum().backward()
    expected(name, exact).square().sum().backward()
    assert exact.grad is not None
    assert pulled.grad is not None
    close(pulled.grad, exact.grad)
    for moved in (copy.deepcopy(made), made.float().bfloat16()):
        close(moved(x), expected(name, x))


@needs_kernel
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("nl4:g32", SHAPE),
        ("int8:row", SHAPE),
        ("int4:float16", SHAPE),
        ("int3", (100, 128)),
        ("int4", (64, 100)),
        ("int5", (63, 65)),
    ],
)
def test_other_formats_and_shapes_stay_as_they_are(name: str, shape: tuple[int, int]) -> None:
    made = prepared(name, shape)
    assert isinstance(made.integer_core, PackedCore)
    close(made(tokens(2, shape[1])), expected(name, tokens(2, shape[1]), shape))


@needs_kernel
def test_only_layers_that_gain_are_converted() -> None:
    network = topology_family("dense").decompose(torch.randn(192, 128), Budget()).network
    storage = Storage(number_format=NumberFormat.parse("int4"))
    table = embedding_from_network(network, storage=storage)
    head = linear_from_network(network, bias=None, source="linear", storage=storage)
    head.share_cores(table)
    alone = embedding_from_network(network, storage=storage)
    first, second, fixed = layer("int4"), layer("int4"), layer("int4")
    chain = tn.nn.MPOLinear(64, 64, strategy="factorized")
    second.share_cores(first)
    fixed.strategy = "reconstruct"
    parts = [table, head, first, second, fixed, chain, alone, layer("int2"), layer("int4").float()]
    model = nn.ModuleList([x.bfloat16() if k < 7 else x for k, x in enumerate(parts)])
    assert tn.nn.prepare_for_inference(model) is model
    assert not model.training
    cores = [x.integer_core if isinstance(x, TensorNetworkLinear) else None for x in model]
    assert [isinstance(x, Int4Core) for x in cores] == [k in (1, 2, 3) for k in range(9)]
    assert cores[2] is cores[3], "tied layers stay tied"
    assert table.stored_cores == (cores[1],)
    assert isinstance(alone.stored_cores[0], PackedCore)
    made = tn.nn.prepare_for_inference(layer("int2"), max_growth=2)
    assert isinstance(made.integer_core, Int4Core)
    number_format = NumberFormat.parse("int2")
    assert layout_bytes(number_format, SHAPE) > MAX_GROWTH * number_format.nbytes(SHAPE)


@needs_kernel
@pytest.mark.parametrize("name", [*LAYOUTS, *LARGER])
def test_a_tied_embedding_reads_the_rows_of_the_prepared_head(name: str) -> None:
    network = topology_family("dense").decompose(torch.randn(SHAPE), Budget()).network
    storage = Storage(number_format=NumberFormat.parse(name))
    table = embedding_from_network(network, storage=storage)
    head = linear_from_network(network, bias=None, source="linear", storage=storage)
    head.share_cores(table)
    model = nn.ModuleList([table, head]).bfloat16()
    rows = torch.tensor([[0, 31, 32, 191], [63, 64, 127, 0]])
    expected, matrix = table(rows), head.to_matrix()
    tn.nn.prepare_for_inference(model, max_growth=4)
    assert isinstance(head.integer_core, Int4Core)
    assert torch.equal(table(rows), expected)
    assert torch.equal(table.to_matrix(), matrix)


@needs_kernel
def test_training_and_saving_are_refused() -> None:
    model = nn.Sequential(prepared("int4"))
    assert model.eval() is model
    with pytest.raises(TargetError, match="cannot be trained"):
        model.train()
    with pytest.raises(TargetError, match="cannot be saved"):
        model.state_dict()


@needs_kernel
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("int4", 2),
        *(
            pytest.param(*x, marks=pytest.mark.slow)
            for x in (("int4:row", 40), ("int6", 60), ("int8:row", 2))
        ),
    ],
)
def test_compiled_exported_and_under_autocast(name: str, count: int) -> None:
    made, x = prepared(name), tokens(count)
    torch._dynamo.reset()
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    with torch.no_grad():
        close(torch.compile(made, fullgraph=True, backend=backend)(x), expected(name, x))
    assert any("pack_mm" in target for target in seen) == (count < 48)
    compiled = torch.compile(made, fullgraph=True, backend="eager")
    pulled, exact = x.clone().requires_grad_(), x.float().requires_grad_()
    compiled(pulled).square().sum().backward()
    expected(name, exact).square().sum().backward()
    assert exact.grad is not None
    assert pulled.grad is not None
    close(pulled.grad, exact.grad)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        close(made(x), expected(name, x))
    if name == "int8:row":
        close(torch.export.export(made, (x,)).module()(x), expected(name, x))


@needs_kernel
@pytest.mark.parametrize(
    ("name", "count", "kernel"),
    [
        ("int4", 1, "int4 kernel"),
        ("int4", KERNEL_TOKENS + 1, "unpacked"),
        ("int8:row", 3, "int8 kernel"),
        ("int8", 1, "int4 kernel twice"),
        ("int5", KERNEL_TOKENS // 2 + 1, "unpacked"),
        ("nl4", 1, "unpacked"),
    ],
)
def test_explain_names_the_kernel(name: str, count: int, kernel: str) -> None:
    told = prepared(name).explain(count)
    assert (told.choice, told["factorized"].integers) == ("factorized", kernel)
    assert kernel in str(told)
    plain = layer(name).explain(count)["factorized"].integers
    assert plain == ("int8 kernel" if kernel == "int8 kernel" else "unpacked")


# --- networks ------------------------------------------------------------------------------------


def chain(**options: object) -> TensorNetworkLinear:
    """A layer whose cores take longer for one token than its matrix."""
    made = tn.nn.TensorNetworkLinear(CHAIN, dtype=torch.float64, **options)  # type: ignore[arg-type]
    nn.init.normal_(made.bias)
    return made


def test_a_slow_network_becomes_a_dense_layer() -> None:
    shared = chain()
    model = nn.ModuleDict({"first": nn.Sequential(shared), "again": shared})
    x = torch.randn(2, 3, shared.in_features, dtype=torch.float64)
    seen: list[torch.Size] = []
    shared.register_forward_hook(lambda layer, args, y: seen.append(y.shape))
    expected, bias = shared(x), shared.bias
    assert tn.nn.prepare_for_inference(model) is model
    made = model["again"]
    assert isinstance(made, PreparedLinear)
    assert next(iter(model["first"].children())) is made, "a layer with two names is converted once"
    assert bias is not None
    assert made.bias is not None
    assert made.bias.data_ptr() == bias.data_ptr()
    torch.testing.assert_close(made(x), expected)
    assert seen == 2 * [expected.shape], "hooks stay"
    pulled = x.clone().requires_grad_()
    made(pulled).sum().backward()
    assert pulled.grad is not None
    assert [p.requires_grad for p in model.parameters()] == [False, False]
    torch.testing.assert_close(copy.deepcopy(model)["again"](x), expected)
    with pytest.raises(TargetError, match="cannot be trained"):
        model.train()
    with pytest.raises(TargetError, match="cannot be saved"):
        model.state_dict()
    alone = tn.nn.prepare_for_inference(chain())
    assert isinstance(alone, PreparedLinear), "a single layer is returned"


@pytest.mark.parametrize(
    ("made", "max_growth"),
    [
        (lambda: chain(strategy="factorized"), None),
        (lambda: chain(strategy="reconstruct"), None),
        (lambda: chain(storage=Storage(number_format=NumberFormat.parse("int8"))), None),
        (chain, 1.0),
        (lambda: tn.nn.TensorNetworkLinear(low_rank(out_features=2048, in_features=2048, rank=64)), None),
        (lambda: tn.nn.TensorNetworkLinear(tn.topologies.dense(out_features=8, in_features=8)), None),
        (lambda: tn.nn.MPOEmbedding(CHAIN), None),
    ],
    ids=["factorized", "reconstruct", "integers", "too large", "low rank is faster", "one core", "embedding"],
)
def test_other_networks_stay(made: Callable[[], nn.Module], max_growth: float | None) -> None:
    model = nn.Sequential(made())
    before = model[0]
    tn.nn.prepare_for_inference(model, max_growth=max_growth)
    assert model[0] is before
    model.train()


def test_the_limit_is_relative_to_the_stored_bytes() -> None:
    rows, columns = CHAIN.shape
    growth = rows * columns / sum(core.numel() for core in chain().cores)
    for limit, kind in ((0.99 * growth, tn.nn.TensorNetworkLinear), (1.01 * growth, PreparedLinear)):
        assert type(tn.nn.prepare_for_inference(chain(), max_growth=limit)) is kind


def test_the_layers_of_compounds_are_prepared() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LSTM(32, 64, batch_first=True))
    config = tn.CompressionConfig(
        topology="mpo", topology_options={"sites": 3, "max_bond": 12}, target_modules="all"
    )
    tn.compress(model, config, progress=False)
    x = torch.randn(2, 5, 32)
    expected = model(x)[0]
    tn.nn.prepare_for_inference(model)
    assert any(isinstance(part, PreparedLinear) for part in model.modules())
    torch.testing.assert_close(model(x)[0], expected)
