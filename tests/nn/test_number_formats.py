"""Number formats of cores: every family in every format, stored, moved, copied, described and trained."""

from __future__ import annotations

import copy
import io
import json

import pytest
import torch
from torch import nn

import tensornet as tn
from tensornet.linalg.weighted_svd import Weighting
from tensornet.nn import integer_product
from tensornet.nn.embedding import embedding_from_network
from tensornet.nn.encoding import Storage, decode, encode, layout
from tensornet.nn.linear import TensorNetworkLinear, linear_from_network
from tensornet.quantization import NumberFormat, formats
from tensornet.topologies import topology_family

FAMILIES = ["block_tt", "dense", "kronecker", "low_rank", "mpo", "residual", "tensor_ring", "tucker"]
FORMATS = ["bf16", "int8", "int5:g32", "int4:g32:zero", "int3:row", "int2:g32:float8"]
INTEGERS = [name for name in FORMATS if name != "bf16"]
STORAGES = [Storage(pivoted=p, number_format=NumberFormat.parse(f)) for f in FORMATS for p in (False, True)]
NAMES = [f"{'pivoted-' if x.pivoted else ''}{x.number_format}" for x in STORAGES]
SHAPE = (20, 36)


def network(family: str, shape: tuple[int, int] = SHAPE) -> tn.TensorNetwork:
    torch.manual_seed(0)
    return topology_family(family).decompose(torch.randn(shape), tn.Budget(max_bond=6)).network


def moments(shape: tuple[int, int] = SHAPE) -> Weighting:
    generator = torch.Generator().manual_seed(1)
    rows, columns = (
        torch.randn(2 * n, n, generator=generator) * torch.arange(1, n + 1) ** -0.5 for n in shape
    )
    return Weighting(rows.T @ rows / len(rows), columns.T @ columns / len(columns))


def layer(family: str, storage: Storage, weighting: Weighting | None = None) -> TensorNetworkLinear:
    made = network(family)
    bias = torch.linspace(-1, 1, SHAPE[0])
    return linear_from_network(made, bias=bias, source="linear", storage=storage, weighting=weighting)


def stored(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: x for name, x in module.state_dict().items() if name != "bias"}


@pytest.mark.parametrize("storage", STORAGES, ids=NAMES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_in_every_format(family: str, storage: Storage) -> None:
    """What is stored is what is counted; copies and twins from a description are the same layer."""
    made = layer(family, storage)
    tensors = stored(made)
    assert {k: (tuple(x.shape), x.dtype) for k, x in tensors.items()} == layout(
        made.topology, storage, torch.float32
    )
    assert sum(x.nbytes for x in tensors.values()) == storage.num_bytes(made.topology, torch.float32)
    spec = json.loads(json.dumps(tn.nn.module_spec(made), sort_keys=True))
    twin = tn.nn.build_module(spec, device="meta", dtype=torch.float32)
    assert all(x.is_meta for x in (*twin.parameters(), *twin.buffers()))
    twin.load_state_dict(made.state_dict(), assign=True)
    x = torch.randn(3, SHAPE[1])
    expected = made(x)
    assert torch.equal(twin(x), expected)
    assert twin.weight.device == expected.device
    assert torch.equal(copy.deepcopy(made)(x), expected)
    torch.save(made, file := io.BytesIO())
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("storage", STORAGES[::2], ids=NAMES[::2])
def test_stored_dtypes_stay_when_the_model_changes_its_own(storage: Storage, dtype: torch.dtype) -> None:
    made = layer("low_rank", storage)
    before = {name: x.dtype for name, x in stored(made).items()}
    values = {name: x.clone() for name, x in stored(made).items()}
    for change in (lambda m: m.to(dtype), lambda m: m.to("cpu", dtype)):
        moved = change(copy.deepcopy(made))
        assert {name: x.dtype for name, x in stored(moved).items()} == before
        assert all(torch.equal(x.float(), values[name].float()) for name, x in stored(moved).items())
        assert moved.weight.dtype == dtype
        assert moved.bias is not None
        assert moved.bias.dtype == dtype
        assert moved(torch.randn(2, SHAPE[1], dtype=dtype)).dtype == dtype
    assert copy.deepcopy(made).half().weight.dtype == torch.float16
    assert made.to("meta").weight.is_meta


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_scales_and_inputs_have_gradients_and_integers_are_frozen(family: str, name: str) -> None:
    made = layer(family, Storage(number_format=NumberFormat.parse(name)))
    integers = {k: x.clone() for k, x in made.named_buffers() if not x.is_floating_point()}
    assert integers
    assert [name for name, _ in made.named_parameters()] == ["bias"]
    matrix = made.to_matrix()
    made.train_scales()
    assert torch.equal(made.to_matrix(), matrix)
    made.requires_grad_(True)
    x = torch.randn(4, SHAPE[1], requires_grad=True)
    made(x).square().sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, 2 * made(x.detach()) @ made.to_matrix(), rtol=1e-4, atol=1e-4)
    for key, parameter in made.named_parameters():
        assert parameter.grad is not None, key
        assert bool(parameter.grad.float().abs().sum() > 0), key
    assert all(torch.equal(made.get_buffer(k), x) for k, x in integers.items())
    made.train_scales(False)
    assert [name for name, _ in made.named_parameters()] == ["bias"]
    assert torch.equal(made.to_matrix(), matrix)


def test_heal_trains_scales_and_keeps_integers() -> None:
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(36, 20), nn.ReLU(), nn.Linear(20, 36))
    student = copy.deepcopy(teacher)
    for k in (0, 2):
        topology = topology_family("dense").build(*teacher[k].weight.shape)
        made = tn.TensorNetwork(topology, (teacher[k].weight.detach(),))
        storage = Storage(number_format=NumberFormat.parse("int2:g32"))
        student[k] = linear_from_network(made, bias=teacher[k].bias, source="linear", storage=storage)
    before = {name: x.clone() for name, x in student.state_dict().items()}
    batches = [(torch.randn(64, 36), torch.randn(64, 36)) for _ in range(4)]

    def distance() -> float:
        return float((student(batches[0][0]) - teacher(batches[0][0])).detach().square().mean())

    first = distance()
    report = tn.heal(student, teacher, batches, steps=60, lr=1e-2, progress=False)
    assert report.steps == 60
    after = student.state_dict()
    assert {k: x.dtype for k, x in after.items()} == {k: x.dtype for k, x in before.items()}
    assert torch.equal(after["0.core_matrix"], before["0.core_matrix"])
    assert not torch.equal(after["0.scale_matrix"].float(), before["0.scale_matrix"].float())
    assert distance() < 0.95 * first


def test_gradients_of_scales_are_those_of_the_matrix() -> None:
    made = layer("dense", Storage(number_format=NumberFormat.parse("int8:g32")))
    made.train_scales()
    made.scale_matrix = nn.Parameter(made.scale_matrix.detach().double())
    made.double()
    made.to_matrix().square().sum().backward()
    scale = made.scale_matrix
    assert scale.grad is not None
    with torch.no_grad():
        values = []
        for step in (1e-4, -1e-4):
            scale[3, 1] += step
            values.append(float(made.to_matrix().square().sum()))
            scale[3, 1] -= step
    assert float(scale.grad[3, 1]) == pytest.approx((values[0] - values[1]) / 2e-4, rel=1e-6)


@pytest.mark.parametrize("pivoted", [False, True])
@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_tables_read_rows(family: str, name: str, pivoted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made = network(family)
    storage = Storage(pivoted=pivoted, number_format=NumberFormat.parse(name))
    table = embedding_from_network(made, storage=storage)
    expected = table.to_matrix()
    if family in ("dense", "low_rank") and not pivoted:  # the first core is read row by row
        most, real = [], formats._scaled
        monkeypatch.setattr(
            formats, "_scaled", lambda x, *rest, **more: (most.append(len(x)), real(x, *rest, **more))[1]
        )
        table(torch.tensor([3, 3, 7]))
        assert 3 in most
        assert SHAPE[0] not in most
    tokens = torch.tensor([[0, 19, 7], [3, 3, 11]])
    torch.testing.assert_close(table(tokens), expected[tokens])
    with pytest.raises(IndexError, match="Token index 20 is outside the table"):
        table(torch.tensor([20]))
    with pytest.raises(IndexError, match="Token index -1 is outside the table"):
        table(torch.tensor([-1]))


@pytest.mark.parametrize("name", ["int4:g32", "int3:g32", "int2:g32"])
@pytest.mark.parametrize("pivoted", [False, True])
@pytest.mark.parametrize("family", ["dense", "low_rank", "mpo", "tucker"])
def test_moments_lower_the_loss_increase(family: str, pivoted: bool, name: str) -> None:
    made, weighting = network(family), moments()
    storage = Storage(pivoted=pivoted, number_format=NumberFormat.parse(name)).for_topology(made.topology)
    costs = []
    for given in (None, weighting):
        kept = encode(made.topology, storage, made.cores, given)
        again = tn.TensorNetwork(made.topology, decode(made.topology, storage, kept))
        costs.append(weighting.cost(made.to_matrix() - again.to_matrix()))
    assert costs[1] < (0.9 if family == "dense" else 1.02) * costs[0]


def test_low_rank_in_integers_takes_the_numbers_of_its_pivoted_form() -> None:
    topology = tn.topologies.low_rank(out_features=64, in_features=128, rank=32)
    storage = Storage(pivoted=True, number_format=NumberFormat.parse("int8:row"))
    elements, scales, order = 32 * (64 + 128 - 32), 32 + 32, 64
    assert storage.num_params(topology) == elements + scales + order
    assert storage.num_bytes(topology, torch.float32) == elements + 2 * scales + 4 * order


def test_one_core_may_have_a_format_of_its_own() -> None:
    storage = Storage(number_format="int4", core_formats={"1": "float"})  # type: ignore[arg-type]
    made = layer("low_rank", storage)
    assert made.core_0.dtype == torch.uint8
    assert made.core_1.dtype == torch.float32
    assert made.storage == Storage.from_dict(json.loads(json.dumps(storage.to_dict())))
    whole = Storage(number_format=NumberFormat.parse("int4"))
    exact = network("low_rank").to_matrix()
    one, both = (float((layer("low_rank", x).to_matrix() - exact).detach().norm()) for x in (storage, whole))
    assert 0 < one < both  # the float core was fitted again


def test_old_descriptions_are_as_they_were() -> None:
    assert Storage(pivoted=True).to_dict() == {"pivoted": True}
    assert Storage.from_dict({}) == Storage()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"int4": True},
            "A storage holds pivoted, .*core_formats; got the unknown entries int4",
        ),
        ({"pivoted": 1}, "is true or false"),
        ({"number_format": "int9"}, "Unknown number format 'int9'; known are float, bf16, int8"),
        ({"number_format": 4}, "number_format is the name of a format"),
        ({"core_formats": ["int4"]}, "core_formats maps names of cores"),
        ({"core_formats": {"0": None}}, "core_formats maps names of cores"),
        ({"core_formats": {"7": "int4"}}, "number formats for cores 7; the topology 'mpo' has 0, 1, 2"),
    ],
)
def test_bad_descriptions(data: dict[str, object], message: str) -> None:
    spec = tn.nn.module_spec(layer("mpo", Storage()))
    assert spec is not None
    with pytest.raises(tn.FormatError, match=message):
        tn.nn.build_module({**spec, "storage": data}, device="meta")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [(1,), (3, 5), (0,), ()])
@pytest.mark.parametrize("name", INTEGERS)
def test_products_in_blocks(
    name: str, tokens: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for elements in ("_BLOCK", "_POINTS"):
        monkeypatch.setattr(integer_product, elements, 4 * SHAPE[1])
    made = layer("dense", Storage(number_format=NumberFormat.parse(name))).to(dtype)
    twin = copy.deepcopy(made).configure(strategy="reconstruct")
    inputs = [torch.randn(*tokens, SHAPE[1], dtype=dtype, requires_grad=True) for _ in range(2)]
    with torch.no_grad():
        inputs[1].copy_(inputs[0])
    outputs = [module(x) for module, x in zip((made, twin), inputs, strict=True)]
    room = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.03, "atol": 0.1}
    torch.testing.assert_close(*outputs, **room)
    pull = torch.randn_like(outputs[0])
    for y in outputs:
        y.backward(pull)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, **room)
    assert made.bias is not None
    assert twin.bias is not None
    torch.testing.assert_close(made.bias.grad, twin.bias.grad, **room)


def test_outputs_are_scaled_only_where_that_is_the_same() -> None:
    def row_scales(name: str, dtype: torch.dtype) -> torch.Tensor | None:
        matrix = layer("dense", Storage(number_format=NumberFormat.parse(name)))._integers(
            torch.ones(SHAPE[1])
        )
        assert matrix is not None
        return matrix.row_scales(dtype)

    for dtype in (torch.float32, torch.bfloat16):
        scales = row_scales("int8:row", dtype)
        assert scales is not None
        assert (scales.shape, scales.dtype) == ((SHAPE[0],), dtype)
    assert row_scales("int8:row", torch.float16) is None  # products with integers may be too large
    assert all(row_scales(name, torch.float32) is None for name in ("int8:g32", "int8:row:zero", "int4:row"))


def test_large_inputs_in_16_bits() -> None:
    made = layer("dense", Storage(number_format=NumberFormat.parse("int8:row"))).half()
    made.configure(strategy="factorized")
    x = torch.full((2, SHAPE[1]), 200.0, dtype=torch.float16)
    exact = copy.deepcopy(made).float()(x.float())
    torch.testing.assert_close(made(x).float(), exact, rtol=0.01, atol=0.5)


@pytest.mark.parametrize("name", INTEGERS)
def test_small_weights_in_float16(name: str) -> None:
    """Their scales are subnormal numbers there, which have few digits."""
    topology = topology_family("dense").build(*SHAPE)
    small = tn.TensorNetwork(topology, (torch.randn(SHAPE) * 1e-4,))
    storage = Storage(number_format=NumberFormat.parse(name))
    made = linear_from_network(small, bias=None, source="linear", storage=storage)
    table = embedding_from_network(small, storage=storage)
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
    made = topology_family("dense").decompose(torch.randn(shape), tn.Budget()).network
    storage = Storage(number_format=NumberFormat.parse("int8:row"))
    layer = linear_from_network(made, bias=None, source="linear", storage=storage).bfloat16()
    x = torch.randn(tokens, shape[1], dtype=torch.bfloat16)
    integers = layer._integers(x)
    assert integers is not None
    assert integers.has_kernel(x) == (shape == (64, 96) and tokens < 10)
    expected = x.float() @ copy.deepcopy(layer).float().to_matrix().T
    torch.testing.assert_close(layer(x).float(), expected, rtol=0.02, atol=0.2)


@pytest.mark.parametrize("name", ["int8:row", "int4:g32", "int3:g32:zero"])
@pytest.mark.parametrize("family", ["dense", "low_rank"])
def test_compiled_exported_and_under_autocast(family: str, name: str) -> None:
    made = layer(family, Storage(number_format=NumberFormat.parse(name))).eval()
    x = torch.randn(4, SHAPE[1])
    expected = made(x).detach()
    torch._dynamo.reset()  # it counts the compilations of a function over all layers of a process
    compiled = torch.compile(made, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x).detach(), expected, rtol=1e-4, atol=1e-4)
    program = torch.export.export(made, (x,))
    torch.testing.assert_close(program.module()(x).detach(), expected, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert made(x).dtype == torch.bfloat16
    made.configure(strategy="cached")
    with torch.no_grad():
        torch.testing.assert_close(made(x), expected, rtol=1e-4, atol=1e-4)
        assert tn.nn.cached_bytes(made) == 4 * SHAPE[0] * SHAPE[1]
        assert torch.equal(made(x), made(x))
