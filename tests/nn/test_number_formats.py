"""Number formats of cores: every family in every format, stored, moved, copied, described and trained."""

from __future__ import annotations

import copy
import io
import json
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

import tensornet as tn
import tensornet_moe as tm
from tensornet.compression.report import model_size
from tensornet.errors import FormatError
from tensornet.healing import trained_scales
from tensornet.linalg.weighted_svd import Weighting
from tensornet.nn import integer_matmul, storage
from tensornet.nn.embedding import embedding_from_network
from tensornet.nn.linear import TensorNetworkLinear, linear_from_network
from tensornet.nn.storage import PackedCore, Storage, decode, encode, layout, unpack_for_training
from tensornet.quantization import NumberFormat, parts, round_weight
from tensornet.topologies import Budget, topology_family
from tensornet.topologies.dense import round_dense

FAMILIES = ["block_tt", "dense", "kronecker", "low_rank", "mpo", "residual", "tensor_ring", "tucker"]
INTEGERS = ["int8", "int5:g32", "int3:row:float16", "int2:g32:float8", "int1:row", "nl4:g32:float16"]
FORMATS = ["bf16", *INTEGERS]
SHAPE = (20, 36)
#: Every family in every format, half of them pivoted: each family and each format is so both ways.
EACH_FAMILY_AND_FORMAT = pytest.mark.parametrize(
    ("family", "name", "pivoted"),
    [(x, y, bool((j + k) % 2)) for j, x in enumerate(FAMILIES) for k, y in enumerate(FORMATS)],
)


def network(family: str, shape: tuple[int, int] = SHAPE) -> tn.TensorNetwork:
    torch.manual_seed(0)
    return topology_family(family).decompose(torch.randn(shape), Budget(max_bond=6)).network


def moments(shape: tuple[int, int] = SHAPE) -> Weighting:
    generator = torch.Generator().manual_seed(1)
    rows, columns = (
        torch.randn(2 * n, n, generator=generator) * torch.arange(1, n + 1) ** -0.5 for n in shape
    )
    return Weighting(rows.T @ rows / len(rows), columns.T @ columns / len(columns))


def layer(family: str, name: str, *, pivoted: bool = False) -> TensorNetworkLinear:
    stored = Storage(pivoted=pivoted, number_format=name)  # type: ignore[arg-type]
    bias = torch.linspace(-1, 1, SHAPE[0])
    return linear_from_network(network(family), bias=bias, source="linear", storage=stored)


def cores_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: x for name, x in module.state_dict().items() if name != "bias"}


@EACH_FAMILY_AND_FORMAT
def test_every_family_in_every_format(family: str, name: str, pivoted: bool) -> None:
    """What is stored is what is counted; copies, files and builds from a description are the same layer."""
    made = layer(family, name, pivoted=pivoted)
    tensors, topology = cores_of(made), made.topology
    kinds = {key: (tuple(x.shape), x.dtype) for key, x in tensors.items()}
    assert kinds == layout(topology, made.storage, torch.float32)
    assert set(made.stored) == set(tensors)
    numbers, size = made.storage.num_params(topology), made.storage.num_bytes(topology, torch.float32)
    assert sum(x.nbytes for x in tensors.values()) == size
    assert made.num_params == numbers + SHAPE[0] == model_size(made)[0]
    parts = [made.storage.core_size(topology, core, torch.float32) for core in topology.core_names]
    assert tuple(map(sum, zip(*parts, strict=True))) == (numbers, size)
    spec = json.loads(json.dumps(tn.nn.module_spec(made), sort_keys=True))
    built = tn.nn.build_module(spec, device="meta", dtype=torch.float32)
    assert all(x.is_meta for x in (*built.parameters(), *built.buffers()))
    built.load_state_dict(made.state_dict(), assign=True)
    x = torch.randn(3, SHAPE[1])
    expected = made(x)
    assert built.weight.device == expected.device
    torch.save(made, file := io.BytesIO())
    file.seek(0)
    saved = torch.load(file, weights_only=False)
    for again in (built, copy.deepcopy(made), saved, pickle.loads(pickle.dumps(made))):
        assert torch.equal(again(x), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", FORMATS)
def test_stored_numbers_stay_when_the_model_changes_its_dtype(name: str, dtype: torch.dtype) -> None:
    made = layer("low_rank", name)
    before = {key: x.clone() for key, x in cores_of(made).items()}
    moved = copy.deepcopy(made).to("cpu", dtype)
    assert all(torch.equal(x, before[key]) for key, x in cores_of(moved).items())
    assert moved.weight.dtype == moved.dtype == moved.bias.dtype == dtype  # type: ignore[union-attr]
    assert moved(torch.randn(2, SHAPE[1], dtype=dtype)).dtype == dtype
    again = moved.float()
    x = torch.randn(2, SHAPE[1])
    torch.testing.assert_close(again(x) - again.bias, made(x) - made.bias)
    assert made.to("meta").weight.is_meta


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_scales_and_inputs_have_gradients_and_integers_are_frozen(family: str, name: str) -> None:
    made = layer(family, name)
    before, matrix = {k: x.clone() for k, x in cores_of(made).items()}, made.to_matrix()
    assert [key for key, _ in made.named_parameters()] == ["bias"]
    with trained_scales(made):
        assert torch.equal(made.to_matrix(), matrix)
        x = torch.randn(4, SHAPE[1], requires_grad=True)
        made(x).square().sum().backward()
        assert x.grad is not None
        torch.testing.assert_close(x.grad, 2 * made(x.detach()) @ made.to_matrix(), rtol=1e-4, atol=1e-4)
        trained = dict(made.named_parameters())
        assert len(trained) == 1 + (0 if "float8" in name else len(made.topology.cores))
        assert all(bool(p.grad.abs().sum() > 0) for p in trained.values() if p.grad is not None)
        assert all(p.grad is not None for p in trained.values())
    assert [key for key, _ in made.named_parameters()] == ["bias"]
    assert all(torch.equal(x, before[key]) for key, x in cores_of(made).items())


@pytest.mark.parametrize(
    "name", ["nl4:g32:s6", "int3:g16:s6", "int6:g16:s8", "int2:g16:s4:min", "iq3_xxs", "iq2_s"]
)
def test_integer_scales_under_steps(name: str) -> None:
    """Stored, moved, copied, described, compiled, exported, read by rows, loaded in place, and trained."""
    number_format, shape = NumberFormat.parse(name), (20, 512)
    stored, matrix = Storage(number_format=number_format), network("dense", shape)
    made = linear_from_network(matrix, bias=None, source="linear", storage=stored)
    topology, tensors = made.topology, cores_of(made)
    kinds = {key: (tuple(x.shape), x.dtype) for key, x in tensors.items()}
    assert kinds == layout(topology, stored, torch.float32)
    size = number_format.nbytes(shape)
    assert sum(x.nbytes for x in tensors.values()) == size == stored.num_bytes(topology, torch.float32)
    assert made.num_params == stored.num_params(topology) == model_size(made)[0]
    expected = round_dense(matrix.to_matrix(), number_format, Weighting()).dequantize()
    assert not torch.equal(expected, matrix.to_matrix())
    assert torch.equal(made.to_matrix(), expected)

    spec = json.loads(json.dumps(tn.nn.module_spec(made)))
    built = tn.nn.build_module(spec, device="meta", dtype=torch.float32)
    built.load_state_dict(made.state_dict(), assign=True)
    x = torch.randn(3, shape[1], requires_grad=True)
    torch._dynamo.reset()  # it counts the compilations of a function over all layers of a process
    compiled = torch.compile(made, fullgraph=True, backend="eager")
    exported = torch.export.export(made, (x.detach(),)).module()
    moved = copy.deepcopy(made).bfloat16().float()
    for run in (made, built, compiled, exported, moved, pickle.loads(pickle.dumps(made))):
        torch.testing.assert_close(run(x), x @ expected.mT, rtol=1e-4, atol=1e-4)
    made(x).sum().backward()
    torch.testing.assert_close(x.grad, expected.sum(0).expand(3, -1), rtol=1e-4, atol=1e-4)
    table = embedding_from_network(matrix, storage=stored)
    assert torch.equal(table(torch.tensor([3, 3, 7])), expected[[3, 3, 7]])
    other = round_weight(2 * torch.rand(shape), number_format)  # loaded in place, after a product
    given = storage.stored_core(topology, stored, "matrix", other, torch.float32)
    made.load_state_dict({f"core_matrix.{key}": value for key, value in given.state_dict().items()})
    torch.testing.assert_close(made(x), x @ other.dequantize().mT, rtol=1e-4, atol=1e-4)

    before = {key: value.clone() for key, value in cores_of(moved).items()}
    with trained_scales(moved, codes=True):
        assert torch.equal(moved.to_matrix(), expected)
        assert moved.num_params == made.num_params
        moved(x.detach()).square().sum().backward()
        trained = (
            {"core_matrix.steps"}
            if number_format.points.run > 1
            else {"core_matrix.codes", "core_matrix.steps"}
        )
        assert {key for key, _ in moved.named_parameters()} == trained
        assert all(bool(p.grad.abs().sum() > 0) for p in moved.parameters())
    assert all(torch.equal(value, before[key]) for key, value in cores_of(moved).items())
    core = next(each for each in moved.modules() if isinstance(each, PackedCore))
    core.steps[0, 0] = torch.tensor([torch.nan], dtype=torch.float16).view(torch.int16)[0]
    with pytest.raises(FormatError, match=r"layer\.steps .*NaN"):
        core.check_finite("layer")


def test_gradients_of_scales_are_those_of_the_matrix() -> None:
    made = layer("dense", "int8:g32")
    (core,) = unpack_for_training(made)
    made.double()
    made.to_matrix().square().sum().backward()
    scale = core.scales
    assert scale.grad is not None
    with torch.no_grad():
        values = []
        for step in (1e-4, -1e-4):
            scale[3, 1] += step
            values.append(float(made.to_matrix().square().sum()))
            scale[3, 1] -= step
    assert float(scale.grad[3, 1]) == pytest.approx((values[0] - values[1]) / 2e-4, rel=1e-6)


def test_counts_stay_while_codes_are_trained_and_tied_cores_count_once() -> None:
    made = layer("low_rank", "int4:g32")
    other = layer("low_rank", "int4:g32")
    other.share_cores(made)
    before = made.num_params
    assert model_size(nn.Sequential(made, other))[0] == before + SHAPE[0]
    with trained_scales(made, codes=True):
        assert made.num_params == before
    bank = tm.SharedCoreExperts.from_dense(torch.randn(32, 64), num_experts=4)
    before, size = bank.num_params, model_size(bank)[1]
    bank.quantize("int4:g32")
    scales = sum(x.numel() for name, x in bank.stored.items() if name.endswith(".scales"))
    assert bank.num_params == before + scales == model_size(bank)[0]
    assert model_size(bank)[1] == bank.num_bytes < size


@EACH_FAMILY_AND_FORMAT
def test_tables_read_rows(family: str, name: str, pivoted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = Storage(pivoted=pivoted, number_format=name)  # type: ignore[arg-type]
    table = embedding_from_network(network(family), storage=stored)
    expected = table.to_matrix()
    if (
        family in ("dense", "low_rank") and name in INTEGERS and not pivoted
    ):  # the first core is read row by row
        most, real = [], NumberFormat._scaled
        monkeypatch.setattr(
            NumberFormat, "_scaled", lambda own, x, *rest: (most.append(len(x)), real(own, x, *rest))[1]
        )
        table(torch.tensor([3, 3, 7]))
        assert 3 in most
        assert SHAPE[0] not in most
    tokens = torch.tensor([[0, 19, 7], [3, 3, 11]])
    torch.testing.assert_close(table(tokens), expected[tokens])
    for outside in (20, -1):
        with pytest.raises(IndexError, match=f"{outside} is outside"):
            table(torch.tensor([outside]))


@pytest.mark.parametrize(
    ("family", "name", "pivoted"),
    [
        *((x, "int3:g32", y) for x in ("dense", "low_rank", "mpo", "tucker") for y in (False, True)),
        ("dense", "int4:g32", False),
        ("mpo", "int2:g32", True),
    ],
)
def test_moments_lower_the_loss_increase(family: str, pivoted: bool, name: str) -> None:
    made, weighting = network(family), moments()
    stored = Storage(pivoted=pivoted, number_format=NumberFormat.parse(name)).for_topology(made.topology)
    costs = []
    for given in (None, weighting):
        kept = encode(made.topology, stored, made.cores, given)
        again = tn.TensorNetwork(made.topology, decode(kept.values()))
        costs.append(weighting.cost(made.to_matrix() - again.to_matrix()))
    assert costs[1] < (0.9 if family == "dense" else 1.06) * costs[0]


def test_one_core_may_have_a_format_of_its_own() -> None:
    stored = Storage(number_format="int4", core_formats={"1": "float"})  # type: ignore[arg-type]
    made = linear_from_network(network("low_rank"), bias=None, source="linear", storage=stored)
    assert isinstance(made.core_0, PackedCore)
    assert isinstance(made.core_1, nn.Parameter)
    assert made.storage == Storage.from_dict(json.loads(json.dumps(stored.to_dict())))
    exact = network("low_rank").to_matrix()
    one, both = (float((x.to_matrix() - exact).detach().norm()) for x in (made, layer("low_rank", "int4")))
    assert 0 < one < both  # the float core was fitted again


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"int4": True}, r"entries.*int4"),
        ({"pivoted": 1}, r"storage.*entries"),
        ({"number_format": "int9"}, "'int9'"),
        ({"number_format": 4}, r"storage.*entries"),
        ({"core_formats": ["int4"]}, r"storage.*entries"),
        ({"core_formats": {"0": None}}, r"storage.*entries"),
        ({"core_formats": {"7": "int4"}}, "cores 7"),
    ],
)
def test_bad_descriptions(data: dict[str, object], message: str) -> None:
    spec = tn.nn.module_spec(layer("mpo", "float"))
    assert spec is not None
    with pytest.raises(FormatError, match=message):
        tn.nn.build_module({**spec, "storage": data}, device="meta")


def test_scales_of_a_damaged_file_are_refused() -> None:
    core = next(x for x in layer("dense", "int4").modules() if isinstance(x, PackedCore))
    core.check_finite("layer.core_matrix")
    core.scales[0, 0] = torch.tensor([torch.nan], dtype=torch.bfloat16).view(torch.int16)[0]
    with pytest.raises(FormatError, match=r"layer\.core_matrix\.scales .*NaN"):
        core.check_finite("layer.core_matrix")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [(1,), (3, 5), (0,), ()])
@pytest.mark.parametrize("name", INTEGERS)
def test_products_in_blocks(
    name: str, tokens: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for elements in ("_BLOCK", "_POINTS"):
        monkeypatch.setattr(integer_matmul, elements, 4 * SHAPE[1])
    made = layer("dense", name).to(dtype)
    rebuilt = copy.deepcopy(made)
    rebuilt.strategy = "reconstruct"
    first = torch.randn(*tokens, SHAPE[1], dtype=dtype)
    inputs = [first.clone().requires_grad_() for _ in range(2)]
    outputs = [module(x) for module, x in zip((made, rebuilt), inputs, strict=True)]
    room = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.03, "atol": 0.1}
    torch.testing.assert_close(*outputs, **room)
    pull = torch.randn_like(outputs[0])
    for y in outputs:
        y.backward(pull)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, **room)
    torch.testing.assert_close(made.bias.grad, rebuilt.bias.grad, **room)  # type: ignore[union-attr]


def test_large_inputs_in_16_bits() -> None:
    made = layer("dense", "int8:row").half()
    x = torch.full((2, SHAPE[1]), 200.0, dtype=torch.float16)
    exact = copy.deepcopy(made).float()(x.float())
    torch.testing.assert_close(made(x).float(), exact, rtol=0.01, atol=0.5)


@pytest.mark.parametrize("name", INTEGERS)
def test_small_weights_in_float16(name: str) -> None:
    """Their scales are subnormal numbers there, which have few digits."""
    small = tn.TensorNetwork(topology_family("dense").build(*SHAPE), (torch.randn(SHAPE) * 1e-4,))
    stored = Storage(number_format=NumberFormat.parse(name))
    made = linear_from_network(small, bias=None, source="linear", storage=stored)
    table = embedding_from_network(small, storage=stored)
    exact, tokens, x = made.to_matrix(), torch.arange(SHAPE[0]), torch.randn(4, SHAPE[1]).half()
    made, table = made.half(), table.half()
    for matrix in (made.to_matrix(), table.to_matrix(), table(tokens)):
        assert torch.equal(matrix, exact.half())
    expected = x.float() @ exact.half().float().T
    torch._dynamo.reset()  # it counts the compilations of a function over all layers of a process
    for run in (made, torch.compile(made, fullgraph=True, backend="eager")):
        for recorded in (False, True):
            y = run(x.detach().requires_grad_(recorded))
            torch.testing.assert_close(y.float(), expected, rtol=1e-3, atol=1e-6)
    program = torch.export.export(made, (x,))
    torch.testing.assert_close(program.module()(x).float(), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("shape", [(64, 96), (20, 36), (32, 48)])
@pytest.mark.parametrize("tokens", [1, 5, 100])
def test_the_int8_kernel_where_it_can_read_the_codes(shape: tuple[int, int], tokens: int) -> None:
    """It crashes on sizes that are not multiples of its blocks."""
    made = topology_family("dense").decompose(torch.randn(shape), Budget()).network
    stored = Storage(number_format=NumberFormat.parse("int8:row"))
    layer = linear_from_network(made, bias=torch.ones(shape[0]), source="linear", storage=stored).bfloat16()
    x, core = torch.randn(tokens, shape[1], dtype=torch.bfloat16), layer.integer_core
    assert isinstance(core, PackedCore)
    assert integer_matmul.PackedMatrix.of(core).has_kernel(x) == (shape == (64, 96) and tokens < 10)
    expected = copy.deepcopy(layer).float()(x.float())
    for _ in range(2):  # chosen, then remembered
        torch.testing.assert_close(layer(x).float(), expected, rtol=0.02, atol=0.2)
    core.codes[0] ^= 1  # in place, and a new buffer
    core.scales = core.scales.clone()
    expected = copy.deepcopy(layer).float()(x.float())
    torch.testing.assert_close(layer(x).float(), expected, rtol=0.02, atol=0.2)


def at_offset(x: torch.Tensor, offset: int) -> torch.Tensor:
    """Copy to memory that begins `offset` bytes after a multiple of 16."""
    memory = torch.empty(x.nbytes + 16, dtype=torch.uint8)
    start = (offset - memory.data_ptr()) % 16
    return memory[start : start + x.nbytes].view(x.dtype).view(x.shape).copy_(x)


def test_the_int8_kernel_gets_aligned_memory() -> None:
    """In torch 2.15 it ends the process otherwise."""
    made = topology_family("dense").decompose(torch.randn(64, 96), Budget()).network
    stored = Storage(number_format=NumberFormat.parse("int8:row"))
    layer = linear_from_network(made, bias=None, source="linear", storage=stored).bfloat16()
    x, core = at_offset(torch.randn(8, 96, dtype=torch.bfloat16), 2), layer.integer_core
    assert isinstance(core, PackedCore)
    assert integer_matmul.PackedMatrix.of(core).has_kernel(x)
    codes = core.codes.clone()
    core.codes = at_offset(codes, 8)
    expected = copy.deepcopy(layer).float()(x.float())
    for _ in range(2):  # chosen, then remembered
        torch.testing.assert_close(layer(x).float(), expected, rtol=0.02, atol=0.2)
    core.align()
    assert core.codes.data_ptr() % 16 == 0
    assert torch.equal(core.codes, codes)


@pytest.mark.parametrize("name", ["int8:row", "int4:g32", "nl4:g32:float16"])
@pytest.mark.parametrize(
    "family",
    ["dense", *(pytest.param(x, marks=pytest.mark.slow) for x in ("low_rank", "residual"))],
)
def test_compiled_exported_and_under_autocast(family: str, name: str) -> None:
    made = layer(family, name).eval()
    x = torch.randn(4, SHAPE[1])
    expected = made(x).detach()
    torch._dynamo.reset()  # it counts the compilations of a function over all layers of a process
    compiled = torch.compile(made, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x).detach(), expected, rtol=1e-4, atol=1e-4)
    program = torch.export.export(made, (x,))
    torch.testing.assert_close(program.module()(x).detach(), expected, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert made(x).dtype == torch.bfloat16
    with torch.no_grad():
        half = copy.deepcopy(made).bfloat16()
        assert made.to(torch.bfloat16)(x.bfloat16()).equal(half(x.bfloat16())), "codes are the same, not this"


@pytest.mark.parametrize("dtype", parts.BIT_DTYPES)
def test_numbers_from_bits_without_a_view(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """As exported programs compute them; all finite numbers of the dtype."""
    kind = parts.BIT_DTYPES[dtype]
    limits = torch.iinfo(kind)
    bits = torch.arange(limits.min, limits.max + 1).to(kind)
    truth = bits.view(dtype)
    monkeypatch.setattr(parts, "is_exporting", lambda: True)
    found, finite = parts.floating(bits, dtype), truth.float().isfinite()
    normal = truth.float().abs() >= 2.0**-126  # smaller ones are zero on some processors
    assert torch.equal(found[finite & normal].float(), truth[finite & normal].float())


@pytest.mark.parametrize(
    ("stored", "given"),
    [("int4:g32", "int4:g32:float16"), ("int4", "nl4"), ("int8:g32:s8", "int8:g32:s6"), ("bf16", "float")],
)
def test_the_state_of_another_format_is_refused(stored: str, given: str, tmp_path: Path) -> None:
    """Its tensors may have the same names, shapes and dtypes, but mean other numbers."""
    shape = (4, 256)
    layers = []
    for name in (stored, given):
        stock = nn.Linear(shape[1], shape[0])
        kept = Storage(pivoted=True, number_format=name)  # type: ignore[arg-type]
        made = topology_family("low_rank").decompose(stock.weight.detach(), Budget(max_bond=2)).network
        if name.startswith(("int", "nl")):
            kept = Storage(number_format=name)  # type: ignore[arg-type]
            made = topology_family("dense").decompose(stock.weight.detach(), Budget()).network
        layers.append(
            nn.Sequential(linear_from_network(made, bias=stock.bias, source="linear", storage=kept))
        )
    mine, other = layers
    before = {name: tensor.clone() for name, tensor in mine.state_dict().items()}
    torch.save(other.state_dict(), tmp_path / "state.pt")
    for state in (other.state_dict(), torch.load(tmp_path / "state.pt")):
        with pytest.raises(FormatError, match=rf"\b{stored}\b.*\b{given}\b"):
            mine.load_state_dict(state)
    cores = {name: tensor for name, tensor in mine.state_dict().items() if "core" in name}
    assert all(torch.equal(tensor, before[name]) for name, tensor in cores.items())
    mine.load_state_dict(copy.deepcopy(mine).state_dict())
    mine.load_state_dict(dict(before))  # plain dicts do not say which format they have


def test_the_state_of_a_model_in_training_is_refused() -> None:
    """Its codes are numbers, not packed, and its scales are numbers, not bits."""
    packed, trained = layer("dense", "int8"), layer("dense", "int8")
    unpack_for_training(trained, codes=True)
    for one, other in ((packed, trained), (trained, packed)):
        with pytest.raises(FormatError, match="training"):
            one.load_state_dict(other.state_dict())
    trained.load_state_dict(copy.deepcopy(trained).state_dict())


@pytest.mark.parametrize("size", [2e-3, 1e-4, 1e-5, 3e-6])
@pytest.mark.parametrize(
    "name", ["int8:g32:s8", "int6:g16:s8", "int3:g16:s6", "nl4:g32:s6", "int2:g16:s4:min", "iq3_s", "iq2_xxs"]
)
def test_a_layer_stores_what_was_rounded(name: str, size: float) -> None:
    """Integer scales, with steps that may be subnormal; bit for bit."""
    torch.manual_seed(0)
    weight = size * torch.randn(40, 256)
    rounded = round_weight(weight, name)
    topology = topology_family("dense").build(*weight.shape)
    core = storage.stored_core(topology, Storage(number_format=name), "matrix", rounded, torch.float32)  # type: ignore[arg-type]
    assert isinstance(core, PackedCore)
    assert torch.equal(core.scale_values, rounded.scales)
    assert torch.equal(core.matrix(torch.float32), rounded.dequantize())


@pytest.mark.parametrize("name", ["int4", "bf16"])
def test_complex_cores_are_refused(name: str) -> None:
    made = topology_family("low_rank").decompose(
        torch.randn(8, 64, dtype=torch.complex64), Budget(max_bond=2)
    )
    with pytest.raises(FormatError, match="complex64"):
        encode(made.network.topology, Storage(number_format=name), made.network.cores)  # type: ignore[arg-type]
