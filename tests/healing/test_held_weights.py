"""Held weights: products under autocast are the same to the bit, and layers are as before afterwards."""

from __future__ import annotations

import copy

import pytest
import torch
from healing_pairs import batches, pair
from hf_models import llama
from torch import Tensor, nn

import tensornet as tn
from tensornet.healing.heal import HealReport
from tensornet.healing.held_weights import held_weights
from tensornet.nn import cached_bytes

INTEGERS = tn.CompressionConfig(formats=("int3:g32:float8",), objective="weight", target_modules="all")


def integer_pair(build: object = llama) -> tuple[nn.Module, nn.Module]:
    """A dense model and one whose layers are all integers with scales that are not trained."""
    teacher = copy.deepcopy(pair(build)[0])
    student = copy.deepcopy(teacher)
    tn.compress(student, INTEGERS, progress=False)
    return teacher, student.eval()


def state(model: nn.Module) -> dict[str, tuple[int, torch.dtype, bool]]:
    return {
        name: (id(p), p.dtype, p.requires_grad) for name, p in model.named_parameters(remove_duplicate=False)
    }


@pytest.mark.parametrize("which", ["dense", "compressed", "integers", "gpt2"])
def test_outputs_are_the_same_to_the_bit(which: str) -> None:
    model = {
        "dense": lambda: pair(llama)[0],
        "compressed": lambda: pair(llama)[1],
        "integers": lambda: integer_pair()[1],
        "gpt2": lambda: pair()[0],
    }[which]()
    model = copy.deepcopy(model).requires_grad_(False)
    batch = {"input_ids": batches()[0]}
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(**batch).logits
        with held_weights(model, dtype=torch.bfloat16):
            found = [model(**batch).logits for _ in range(2)]
    assert all(torch.equal(x, expected) for x in found)


def test_everything_is_as_before_afterwards() -> None:
    teacher, student = integer_pair()
    before = [state(teacher), state(student)]
    strategies = [x.strategy for x in student.modules() if isinstance(x, tn.nn.NetworkModule)]

    def fail() -> None:
        with held_weights(teacher, student, dtype=torch.bfloat16), torch.autocast("cpu", torch.bfloat16):
            student(batches()[0])
            assert teacher.lm_head.weight.dtype == torch.bfloat16
            assert cached_bytes(student) > 0
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [state(teacher), state(student)] == before
    assert [x.strategy for x in student.modules() if isinstance(x, tn.nn.NetworkModule)] == strategies
    assert cached_bytes(student) == 0


def test_tied_weights_are_cast_once_and_embeddings_stay() -> None:
    first, second, table = nn.Linear(8, 8), nn.Linear(8, 8), nn.Embedding(8, 8)
    second.weight = first.weight
    table.weight = first.weight
    with held_weights(nn.ModuleList([first, second, table]), dtype=torch.bfloat16):
        assert first.weight is second.weight
        assert first.weight.dtype == torch.bfloat16
        assert table.weight.dtype == torch.float32
        assert first.bias.dtype == torch.float32
    assert first.weight is second.weight is table.weight


def test_trained_weights_and_float64_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4).double())
    with held_weights(model, dtype=torch.bfloat16, trained=[model[0].weight]):
        assert [layer.weight.dtype for layer in model] == [torch.float32, torch.float64]


def healed(**options: object) -> tuple[HealReport, dict[str, Tensor], list[str]]:
    teacher, student = integer_pair()
    dtypes: list[str] = []
    handle = teacher.lm_head.register_forward_pre_hook(lambda m, x: dtypes.append(str(m.weight.dtype)))
    report = tn.heal(student, teacher, batches(), steps=4, autocast=torch.bfloat16, **options)
    handle.remove()
    return report, student.state_dict(), dtypes


def test_healing_makes_the_same_steps() -> None:
    (held, one, dtypes), (cast, other, stock) = healed(), healed(hold_weights=False)
    assert set(dtypes) == {"torch.bfloat16"}
    assert set(stock) == {"torch.float32"}
    assert held.losses == cast.losses
    assert all(torch.equal(x, y) for x, y in zip(one.values(), other.values(), strict=True))
