"""Integer matrices in the layout of torch's int4 kernel: the same numbers, whoever asks for them."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import nn

import tensornet as tn
from tensornet.nn import kernel_layout
from tensornet.nn.encoding import Storage, packed_codes
from tensornet.nn.explain import size_in_words
from tensornet.nn.integer_product import IntegerMatrix
from tensornet.nn.kernel_layout import (
    HELD_RATIO,
    KERNEL_TOKENS,
    from_kernel,
    has_layout,
    layout_bytes,
    to_kernel,
)
from tensornet.nn.linear import TensorNetworkLinear, linear_from_network
from tensornet.quantization import NumberFormat, pack
from tensornet.topologies import topology_family

SHAPE = (192, 128)
ONCE = ["int4", "int4:g32", "int4:row", "int4:g128:float8", "int3", "int3:row:zero"]
TWICE = ["int5", "int5:row:zero", "int6:g128", "int6:g32:zero", "int7:row", "int7:zero", "int8"]
LAYOUTS = [*ONCE, *TWICE]
LARGER = ["int2", "int2:row:zero", "int4:zero", "int5:g32"]
KERNELS = ["int4", "int3:zero", "int6", "int8:row"]
FORMATS = [*LAYOUTS, *LARGER, "int8:row", "int8:zero", "int4:float16"]

pytestmark = pytest.mark.skipif(
    not has_layout(NumberFormat.parse("int4"), SHAPE), reason="this build of torch has no such kernel"
)


def layer(name: str, shape: tuple[int, int] = SHAPE) -> TensorNetworkLinear:
    torch.manual_seed(0)
    network = topology_family("dense").decompose(torch.randn(shape), tn.Budget()).network
    storage = Storage(number_format=NumberFormat.parse(name))
    made = linear_from_network(network, bias=torch.randn(shape[0]), source="linear", storage=storage)
    return made.requires_grad_(False).bfloat16()


def tokens(count: int, columns: int = SHAPE[1]) -> torch.Tensor:
    return torch.randn(count, columns, generator=torch.Generator().manual_seed(count)).bfloat16()


def expected(made: TensorNetworkLinear, x: torch.Tensor) -> torch.Tensor:
    assert made.bias is not None
    twin = copy.deepcopy(made).float().configure(strategy="reconstruct")
    return twin(x.float())


def close(found: torch.Tensor, truth: torch.Tensor) -> None:
    assert float((found.float() - truth).abs().max()) <= 0.01 * float(truth.abs().max())


@pytest.mark.parametrize("shape", [SHAPE, (64, 1152), (1088, 128)])
@pytest.mark.parametrize("name", [*LAYOUTS, *LARGER])
def test_values_are_those_of_the_stored_form_and_convert_back(
    name: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_layout, "_BLOCK", 2 * 64 * shape[1])
    number_format, (rows, columns) = NumberFormat.parse(name), shape
    assert number_format.bits is not None
    torch.manual_seed(0)
    groups = (rows, number_format.groups(columns))
    codes = torch.randint(0, number_format.top + 1, shape, dtype=torch.uint8)
    codes[0, :2] = torch.tensor([0, number_format.top])
    scales = torch.rand(groups).to(number_format.scale_dtype)
    zeros = torch.randint(0, number_format.top + 1, groups, dtype=torch.uint8)
    zeros[:2, 0] = torch.tensor([0, number_format.top])
    packed, points = packed_codes(codes, number_format.bits), pack(zeros, number_format.bits)
    stored_zeros = points if number_format.zero_point else None
    matrix = to_kernel(number_format, packed, scales, stored_zeros, columns)
    assert matrix.shape == shape
    assert matrix.products == (1 if name in (*ONCE, "int2", "int2:row:zero") else 2)
    if number_format.bits == 4 and matrix.products == 1:
        torchs = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 1)
        assert torch.equal(matrix.codes, torchs)
    back = from_kernel(matrix, stored_zeros)
    assert torch.equal(back[0], packed)
    assert torch.equal(back[1].float(), scales.float())
    assert back[1].dtype == scales.dtype
    for dtype in (torch.float32, torch.bfloat16):
        values = number_format.decode(codes, scales, zeros if number_format.zero_point else None, dtype)
        assert torch.equal(matrix.dense(dtype), values)
        assert torch.equal(torch.cat([rows for _, rows in matrix.blocks(dtype)]), values)
        if dtype == torch.float32:
            close(matrix.by_kernel(tokens(3, columns)), tokens(3, columns).float() @ values.T)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("int8:zero", SHAPE),
        ("int8:row", SHAPE),
        ("int4:float16", SHAPE),
        ("int6:float16", SHAPE),
        ("int3", (100, 128)),
        ("int4", (64, 100)),
        ("int6:row", (64, 100)),
        ("int5:zero", (63, 65)),
    ],
)
def test_other_formats_and_shapes_have_no_layout(name: str, shape: tuple[int, int]) -> None:
    assert not has_layout(NumberFormat.parse(name), shape, larger=True)
    made = layer(name, shape).eval().configure(strategy="factorized")
    assert made.kernel_matrix is None
    close(made(tokens(2, shape[1])), expected(made, tokens(2, shape[1])))


@pytest.mark.parametrize("count", [1, KERNEL_TOKENS // 2 + 1, KERNEL_TOKENS + 1])
@pytest.mark.parametrize("name", FORMATS)
def test_products(name: str, count: int) -> None:
    made = layer(name).configure(strategy="factorized").eval()
    assert (made.kernel_matrix is not None) == (name in (*LAYOUTS, *LARGER))
    x = tokens(count)
    for _ in range(2):  # found, then remembered
        close(made(x), expected(made, x))
        close(made(x.view(1, count, -1))[0], expected(made, x))
    pulled = x.clone().requires_grad_()
    made(pulled).square().sum().backward()
    exact = x.float().requires_grad_()
    expected(made, exact).square().sum().backward()
    assert exact.grad is not None
    assert pulled.grad is not None
    close(pulled.grad, exact.grad)


@pytest.mark.parametrize("name", LAYOUTS)
def test_it_is_held_instead_of_the_stored_codes_in_the_bytes_that_explain_tells(name: str) -> None:
    made = layer(name)
    stored, zeros = made.explain(200)["factorized"].held_bytes, made._buffers.get("zero_matrix")
    assert stored == NumberFormat.parse(name).nbytes(SHAPE)
    made.eval()
    held = {key: x.nbytes for key, x in made.named_buffers()}
    kept = {"zero_matrix"} if zeros is not None else set()
    assert set(held) == {"kernel_codes", "kernel_scales", "compute_like"} | kept
    products = 1 if name in ONCE else 2
    assert held["kernel_codes"] == products * SHAPE[0] * SHAPE[1] // 2
    for count in (1, 200):
        told = made.explain(count)
        assert told["factorized"].held_bytes == sum(held.values()) <= HELD_RATIO * stored
        assert f"{size_in_words(sum(held.values()))} held" in str(told)


@pytest.mark.parametrize("name", LARGER)
def test_much_larger_layouts_are_made_only_where_the_strategy_is_factorized(name: str) -> None:
    made, stored = layer(name).eval(), NumberFormat.parse(name).nbytes(SHAPE)
    assert made.kernel_matrix is None
    assert (made.explain(1)["factorized"].kernel, made.explain(1)["factorized"].held_bytes) == (
        "unpacked",
        stored,
    )
    close(made(tokens(2)), expected(made, tokens(2)))
    assert made.kernel_matrix is None
    made.configure(strategy="factorized")
    close(made(tokens(2)), expected(made, tokens(2)))
    assert made.kernel_matrix is not None
    cost = made.explain(1)["factorized"]
    assert "int4 kernel" in cost.kernel
    assert cost.held_bytes == sum(x.nbytes for x in made.buffers()) > HELD_RATIO * stored
    made.configure(strategy="auto")
    assert made.kernel_matrix is None


MOVES: dict[str, Callable[[TensorNetworkLinear], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda made: _pickled(made),
    "to": lambda made: made.to("cpu", torch.float64),
    "train": lambda made: made.train(),
    "load": lambda made: _loaded(made),
    "itself": lambda made: made,
}


def _pickled(made: nn.Module) -> nn.Module:
    torch.save(made, file := io.BytesIO())
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert isinstance(again, nn.Module)
    return again


def _loaded(made: nn.Module) -> nn.Module:
    state = {name: x.clone() for name, x in made.state_dict().items()}
    made.load_state_dict(state)
    return made


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("name", ["int4", "int4:row", "int4:g128:float8", "int3", "int6:g32:zero"])
def test_stored_tensors_are_what_everybody_else_sees(name: str, move: str) -> None:
    made = layer(name)
    names = [key for key, _ in made.named_buffers()]
    before = {key: x.clone() for key, x in made.state_dict().items()}
    made.eval()
    made(tokens(2))
    assert made.kernel_matrix is not None
    moved = MOVES[move](made)
    assert isinstance(moved, TensorNetworkLinear)
    after = moved.state_dict()
    assert list(after) == list(before)
    for key, x in after.items():
        assert x.shape == before[key].shape, key
        assert torch.equal(x.double(), before[key].double()), key
        assert x.dtype == before[key].dtype or key == "bias"
    assert torch.equal(moved.core_matrix, before["core_matrix"])
    assert moved.kernel_matrix is None
    assert [key for key, _ in moved.named_buffers()] == names
    x = tokens(2).to(moved.weight.dtype)
    close(moved(x).float(), expected(made, tokens(2)))


@pytest.mark.parametrize("count", [2, 200])
def test_once_stored_tensors_were_read_the_next_pass_makes_the_layout_again(count: int) -> None:
    made = layer("int4").eval()
    codes = made.stored["core_matrix"]
    close(made(tokens(count)), expected(made, tokens(count)))
    assert made.kernel_matrix is None  # as long as the reader has them
    del codes
    made(tokens(count))
    assert made.kernel_matrix is not None


def test_scales_that_are_replaced_are_used() -> None:
    made = layer("int4").eval()
    doubled = 2 * made.scale_matrix
    made.eval()
    assert made.kernel_matrix is not None
    before = made(tokens(2)) - made.bias
    made.scale_matrix = doubled
    close(made(tokens(2)) - made.bias, 2 * before.float())


def test_asking_for_the_dtype_leaves_the_layout() -> None:
    made = layer("int4").eval()
    assert made.weight.dtype == torch.bfloat16
    assert made.kernel_matrix is not None


def test_what_others_hold_stays_as_it_is() -> None:
    """Converted, it would be held twice."""
    first, second = layer("int4"), layer("int4")
    second.share_cores(first)
    for made in (first, second):
        made.eval()(tokens(2))
        assert made.kernel_matrix is None
    assert first.core_matrix is second.core_matrix
    alone = layer("int4")
    codes = alone.core_matrix
    assert alone.eval().kernel_matrix is None
    del codes
    alone(tokens(2))
    assert alone.kernel_matrix is not None


@pytest.mark.parametrize("strategy", ["reconstruct", "cached"])
def test_other_strategies_use_no_kernel(strategy: str) -> None:
    made = layer("int4").eval()
    made.configure(strategy=strategy)  # type: ignore[arg-type]
    close(made(tokens(2)), expected(made, tokens(2)))
    assert made.kernel_matrix is None


@pytest.mark.parametrize(
    ("name", "count", "held"),
    [
        ("int4", 2, True),
        ("int4:row", 40, True),
        ("int4", 2, False),
        ("int8:row", 2, False),
        ("int8:row", 40, False),
        ("int3", 2, False),
        ("int6", 2, True),
        ("int6:zero", 40, True),
    ],
)
def test_compiled_exported_and_under_autocast(name: str, count: int, held: bool) -> None:
    made, x = layer(name).eval(), tokens(count)
    torch._dynamo.reset()
    truth = expected(made, x)
    if not held:
        made.hold_as_stored()
    compiled = torch.compile(made, fullgraph=True, backend="eager")
    with torch.no_grad():
        close(compiled(x), truth)
    pulled, exact = x.clone().requires_grad_(), x.float().requires_grad_()
    compiled(pulled).square().sum().backward()
    expected(made, exact).square().sum().backward()
    assert exact.grad is not None
    assert pulled.grad is not None
    close(pulled.grad, exact.grad)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        close(torch.compile(made, fullgraph=True, backend="eager")(x), truth)
        close(made(x), truth)
    close(torch.export.export(made, (x,)).module()(x), truth)


@pytest.mark.parametrize("name", KERNELS)
def test_a_compiled_program_calls_the_kernel(name: str) -> None:
    torch._dynamo.reset()
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    with torch.no_grad():
        torch.compile(layer(name).eval(), fullgraph=True, backend=backend)(tokens(2))
    assert any("pack_mm" in name for name in seen)


def test_a_compiled_program_converts_codes_of_8_bits_itself() -> None:
    torch._dynamo.reset()
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    made, x = layer("int8:row").eval(), tokens(100)
    with torch.no_grad():
        close(torch.compile(made, fullgraph=True, backend=backend)(x), expected(made, x))
    assert not any("integer_product" in name or "pack_mm" in name for name in seen)


@pytest.mark.parametrize("name", ["int4:g32", "int6:g32"])
def test_the_copy_of_scales_is_what_compilers_are_told(name: str) -> None:
    made = layer(name).eval()
    made(tokens(1))
    matrix = made.kernel_matrix
    assert matrix is not None
    arguments = (matrix.scales, matrix.shape[0], matrix.block // 2)
    torch.library.opcheck(torch.ops.tensornet.kernel_scales.default, arguments)


def test_int8_kernel_only_where_it_can_read_the_codes() -> None:
    x, codes = tokens(1, 96), torch.zeros(64, 96, dtype=torch.uint8)
    scales = torch.ones(64, 1, dtype=torch.bfloat16)
    matrix = IntegerMatrix(NumberFormat.parse("int8:row"), codes, scales, None, 96)
    assert matrix.has_kernel(x)
    assert not matrix.has_kernel(x.float())
    cut = IntegerMatrix(NumberFormat.parse("int8:row"), codes[:40], scales[:40], None, 96)
    assert not cut.has_kernel(x)


@pytest.mark.parametrize(
    ("name", "count", "kernel"),
    [
        ("int4", 1, "int4 kernel"),
        ("int4", KERNEL_TOKENS + 1, "unpacked"),
        ("int8:row", 3, "int8 kernel"),
        ("int3", 1, "int4 kernel"),
        ("int8", 1, "int4 kernel twice"),
        ("int5", KERNEL_TOKENS // 2 + 1, "unpacked"),
        ("int2", 1, "unpacked"),
        ("int8:zero", 1, "unpacked"),
    ],
)
def test_explain_names_the_kernel(name: str, count: int, kernel: str) -> None:
    made = layer(name).eval()
    told = made.explain(count)
    cost = told[told.choice]
    assert (told.choice, cost.kernel) == ("factorized", kernel)
    assert cost.unpacked == (0 if "kernel" in kernel else SHAPE[0] * SHAPE[1])
    number_format = NumberFormat.parse(name)
    stored = number_format.nbytes(SHAPE)
    assert cost.read_bytes == (layout_bytes(number_format, SHAPE) if "int4" in kernel else stored)
    assert f"{kernel}, " in str(told)
    assert told["reconstruct"].unpacked == SHAPE[0] * SHAPE[1]
    assert told["reconstruct"].milliseconds > told["cached"].milliseconds
    assert layer(name).float().explain(count)["factorized"].kernel == "unpacked"  # float32 inputs
