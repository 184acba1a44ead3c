"""Healing that trains the integers themselves, rounded in each pass."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tensornet as tn
import tensornet_moe as tm
from tensornet.errors import TargetError
from tensornet.healing import trained_scales
from tensornet.nn.embedding import embedding_from_network
from tensornet.nn.linear import TensorNetworkLinear, linear_from_network
from tensornet.nn.storage import PackedCore, Storage, TrainedCodes
from tensornet.quantization import NumberFormat
from tensornet.topologies import Budget, topology_family

FORMATS = ["int8", "int5:g32", "int4:g32", "int3:row", "int2:g32:float8"]
FAMILIES = ["dense", "low_rank", "mpo", "residual"]
SHAPE = (20, 36)


def network(family: str, shape: tuple[int, int] = SHAPE) -> tn.TensorNetwork:
    torch.manual_seed(0)
    return topology_family(family).decompose(torch.randn(shape), Budget(max_bond=6)).network


def layer(
    family: str, name: str, pivoted: bool = False, shape: tuple[int, int] = SHAPE
) -> TensorNetworkLinear:
    storage = Storage(pivoted=pivoted, number_format=NumberFormat.parse(name))
    bias = torch.linspace(-1, 1, shape[0])
    return linear_from_network(network(family, shape), bias=bias, source="linear", storage=storage)


def pair(name: str = "int2:g32:float8") -> tuple[nn.Sequential, nn.Sequential, list[torch.Tensor]]:
    """Build a dense model, its student in integers, and batches."""
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(36, 64), nn.Tanh(), nn.Linear(64, 12))
    student = copy.deepcopy(teacher)
    config = tn.CompressionConfig(formats=(name,), method="nearest")
    tn.compress(student, config, progress=False)
    return teacher, student, [torch.randn(128, 36) for _ in range(8)]


def distance(student: nn.Module, teacher: nn.Module, batches: list[torch.Tensor]) -> float:
    with torch.no_grad():
        return sum(float((student(x) - teacher(x)).square().mean()) for x in batches) / len(batches)


def integer_cores(module: nn.Module) -> dict[str, PackedCore]:
    cores = {name: core for name, core in module.named_modules() if isinstance(core, PackedCore)}
    return {name: core for name, core in cores.items() if core.number_format.is_integer}


def bits(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: x.clone() for name, x in module.state_dict().items()}


@pytest.mark.parametrize("pivoted", [False, True])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_codes_become_parameters_and_return_to_the_bit(family: str, name: str, pivoted: bool) -> None:
    made = layer(family, name, pivoted)
    before, x = bits(made), torch.randn(5, SHAPE[1], requires_grad=True)
    matrix, y = made.to_matrix().detach(), made(x).detach()
    with trained_scales(made, codes=True):
        trained = {key: p for key, p in made.named_parameters() if isinstance(p, TrainedCodes)}
        assert set(trained) == {f"{key}.codes" for key in integer_cores(made)} != set()
        torch.testing.assert_close(made.to_matrix(), matrix, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(made(x), y, rtol=1e-5, atol=1e-5)
        made(x).square().sum().backward()
        assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in trained.values())
    after = bits(made)
    assert {key: v.dtype for key, v in after.items()} == {key: v.dtype for key, v in before.items()}
    assert all(torch.equal(after[key], v) for key, v in before.items())
    assert torch.equal(made.to_matrix(), matrix)


@pytest.mark.parametrize("name", [*FORMATS, "int8:row"])
@pytest.mark.parametrize("family", ["dense", "residual"])
def test_what_is_trained_is_what_is_stored(family: str, name: str) -> None:
    """Without gradients, in eval and in bfloat16 too, a pass reads the codes that are trained."""
    made = layer(family, name, shape=(64, 64)).eval()
    x = torch.randn(3, 64)
    with torch.no_grad():
        old = made(x)
    with trained_scales(made, codes=True), torch.no_grad():
        codes = next(iter(integer_cores(made).values())).codes
        codes += torch.randn(64, 64)
        codes[0] = 1000.0  # beyond the grid: the largest code
        new = made(x)
    assert not torch.allclose(old, new)
    torch.testing.assert_close(made(x), new, rtol=1e-5, atol=1e-5)
    small = copy.deepcopy(made).to(torch.bfloat16)(x.bfloat16())
    torch.testing.assert_close(small.float(), new, rtol=0.05, atol=0.1 * float(new.abs().max()))


@pytest.mark.parametrize("name", FORMATS)
def test_gradients_are_those_of_the_values(name: str) -> None:
    number_format = NumberFormat.parse(name)
    torch.manual_seed(0)
    codes = torch.randint(0, number_format.points.top + 1, (3, 70)).double()
    scales = torch.rand(3, number_format.groups(70), dtype=torch.float64) + 0.5
    weights = torch.randn(3, 70, dtype=torch.float64)
    codes.requires_grad_(True)
    scales.requires_grad_(True)
    values = number_format.decode(codes, scales, None, torch.float64)
    known = number_format.decode(codes.detach().to(torch.uint8), scales, None, torch.float64)
    torch.testing.assert_close(values, known)
    (values * weights).sum().backward()
    (expected,) = torch.autograd.grad((known * weights).sum(), scales)
    torch.testing.assert_close(scales.grad, expected)
    step = torch.zeros_like(codes)
    step[1, 40] = 1.0  # one unit of the grid moves one value by its scale
    group = 40 // (number_format.group or 70)
    assert codes.grad is not None
    torch.testing.assert_close(codes.grad[1, 40], weights[1, 40] * scales.detach()[1, group])


@pytest.mark.parametrize("name", FORMATS)
def test_under_autocast_values_are_made_in_its_dtype(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs and gradients are those of a matrix that autocast casts, to the bit, without that pass."""
    made, asked, decode = layer("dense", name, shape=(64, 64)), [], NumberFormat.decode
    x = torch.randn(5, 64)

    def spy(*given: Any) -> Tensor:
        if given[1].is_floating_point():
            asked.append(given[-1])
        return decode(*given)

    def gradients(y: Tensor) -> list[Tensor]:
        y.float().square().sum().backward()
        found = [p.grad for p in made.parameters() if p.grad is not None]
        made.zero_grad()
        return [y, *found]

    monkeypatch.setattr(NumberFormat, "decode", spy)
    with trained_scales(made, codes=True):
        with torch.autocast("cpu", torch.bfloat16):
            cast = gradients(torch.nn.functional.linear(x, made.to_matrix(), made.bias))
            direct = gradients(made(x))
        assert asked == [torch.float32, torch.bfloat16]
        assert len(cast) == len(direct) > 2
        assert all(torch.equal(a, b) for a, b in zip(direct, cast, strict=True))
        assert made(x).dtype == torch.float32


def test_healing_codes_comes_closer_than_healing_the_rest() -> None:
    found = {}
    for parameters in ("vectors", "codes"):
        teacher, student, batches = pair()
        first, before = distance(student, teacher, batches), bits(student)
        report = tn.heal(student, teacher, batches, steps=100, lr=1e-3, parameters=parameters)
        assert report.trained == (64 + 12 if parameters == "vectors" else 64 + 12 + 36 * 64 + 64 * 12)
        found[parameters] = distance(student, teacher, batches) / first
        after = bits(student)
        assert {key: v.dtype for key, v in after.items()} == {key: v.dtype for key, v in before.items()}
        changed = not torch.equal(after["0.core_matrix.codes"], before["0.core_matrix.codes"])
        assert changed == (parameters == "codes")
        assert torch.equal(after["0.core_matrix.scales"].float(), before["0.core_matrix.scales"].float())
    assert found["codes"] < 0.6 * found["vectors"], found


def test_scales_of_sixteen_bits_are_trained_beside_codes() -> None:
    teacher, student, batches = pair("int3")
    before = bits(student)
    tn.heal(student, teacher, batches, steps=100, lr=1e-3, parameters="codes")
    after = bits(student)
    for part in ("codes", "scales"):
        assert not torch.equal(after[f"0.core_matrix.{part}"], before[f"0.core_matrix.{part}"])


def test_tied_embedding_and_head_stay_tied() -> None:
    """An embedding unpacks the rows that are asked for alone, also of codes that are trained."""
    table = network("dense", (50, 36))
    storage = Storage(number_format=NumberFormat.parse("int4:g32:float8"))
    embedding = embedding_from_network(table, storage=storage)
    head = linear_from_network(table, bias=None, source="linear", storage=storage)
    head.share_cores(embedding)
    model = nn.Sequential(embedding, head)
    tokens = torch.tensor([[3, 49, 0]])
    before = model(tokens)
    with trained_scales(model, codes=True):
        assert embedding.core_matrix is head.core_matrix
        torch.testing.assert_close(model(tokens), before)
        model(tokens).square().sum().backward()
        assert embedding.core_matrix.codes.grad is not None
    assert embedding.core_matrix is head.core_matrix
    assert torch.equal(model(tokens), before)


@pytest.mark.parametrize("whole", [True, False])
def test_banks_of_experts_train_their_codes(whole: bool) -> None:
    torch.manual_seed(0)
    bank = tm.SharedCoreExperts.from_dense(torch.randn(32, 64), num_experts=3)
    bank.quantize("int4")
    before = bits(bank)
    matrices = bank.expert_matrices(None if whole else [2]).detach()
    with trained_scales(bank, codes=True):
        found = bank.expert_matrices(None if whole else [2])
        torch.testing.assert_close(found, matrices, rtol=1e-5, atol=1e-5)
        found.square().sum().backward()
        codes = [p for p in bank.parameters() if isinstance(p, TrainedCodes)]
        assert len(codes) == len(integer_cores(bank)) > 0
        assert all(p.grad is not None for p in codes)
    assert all(torch.equal(x, before[key]) for key, x in bits(bank).items())


def test_a_model_without_integers_is_refused() -> None:
    teacher = nn.Sequential(nn.Linear(36, 36))
    student = copy.deepcopy(teacher)
    tn.compress(student, tn.CompressionConfig(topology_options={"max_bond": 4}, method="svd"), progress=False)
    with pytest.raises(TargetError, match="integers"):
        tn.heal(student, teacher, [torch.randn(4, 36)], steps=1, parameters="codes")
