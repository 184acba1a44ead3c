"""What a healing run leaves on file, and goes on from."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from pathlib import Path

import pytest
import safetensors.torch
import torch
from healing_pairs import CONFIG, batches, divergence, pair
from hf_models import gpt2
from torch import Tensor
from transformers import BertConfig, BertModel

import tensornet as tn
from tensornet.errors import DestinationError, FormatError
from tensornet.healing.heal import compressed_layers, output_distance


def test_an_interrupted_run_goes_on_to_the_same_result(tmp_path: Path) -> None:
    teacher, whole = pair()
    halves = copy.deepcopy(whole)
    tn.heal(whole, teacher, batches(), steps=8)
    path = tmp_path / "heal.safetensors"

    class StopError(Exception):
        pass

    def stopping(student: object, wanted: object, batch: object) -> Tensor:
        stopping.calls += 1  # type: ignore[attr-defined]
        if stopping.calls == 5:  # type: ignore[attr-defined]
            raise StopError
        return output_distance(student, wanted, batch)  # type: ignore[arg-type]

    stopping.calls = 0  # type: ignore[attr-defined]
    options = {"steps": 8, "checkpoint": path, "save_every": 2}
    with pytest.raises(StopError):
        tn.heal(halves, teacher, batches(), distance=stopping, **options)  # type: ignore[arg-type]
    _, fresh = pair()
    report = tn.heal(fresh, teacher, batches(), **options)  # type: ignore[arg-type]
    assert len(report.losses) == 4  # 4 steps were on file
    assert report.steps == 8
    for (name, a), (_, b) in zip(whole.named_parameters(), fresh.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_a_checkpoint_says_which_row_is_which(tmp_path: Path) -> None:
    """Another machine may choose other pivots for the same layer; cores mean nothing without theirs."""
    teacher, first = pair()
    path = tmp_path / "heal.safetensors"
    tn.heal(first, teacher, batches(), steps=2, checkpoint=path)
    _, second = pair()
    for layer in compressed_layers(second).values():
        for name, tensor in layer.stored.items():
            if name.startswith("order"):
                tensor.data = tensor.flip(0)
    tn.heal(second, teacher, batches(), steps=2, checkpoint=path)
    assert divergence(second, first) < 1e-6


def test_a_checkpoint_of_a_head_tied_to_its_embedding(tmp_path: Path) -> None:
    teacher, student = gpt2().eval(), gpt2().eval()
    student.load_state_dict(teacher.state_dict())
    tn.compress(student, dataclasses.replace(CONFIG, target_modules="all"), progress=False)
    twin, path = copy.deepcopy(student), tmp_path / "state"
    tn.heal(student, teacher, batches(), steps=2, checkpoint=path, save_every=1)
    whole = tn.heal(twin, teacher, batches(), steps=2)
    assert tn.heal(student, teacher, batches(), steps=2, checkpoint=path).steps == whole.steps
    torch.testing.assert_close(student(batches()[0]).logits, twin(batches()[0]).logits)


def test_layers_that_no_gradient_reaches(tmp_path: Path) -> None:
    """The pooler of an encoder takes no part in its hidden states; the checkpoint is written all the same."""
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 44}
    teacher = BertModel(BertConfig(**sizes, vocab_size=101)).eval()
    student = copy.deepcopy(teacher)
    tn.compress(student, CONFIG, progress=False)
    path = tmp_path / "heal.safetensors"
    tn.heal(student, teacher, batches(), steps=2, checkpoint=path)
    assert tn.heal(student, teacher, batches(), steps=4, checkpoint=path).steps == 4


def test_time_that_is_up_is_on_file(tmp_path: Path) -> None:
    teacher, student = pair()
    path, ticks = tmp_path / "heal.safetensors", itertools.count()
    tn.heal(student, teacher, batches(), max_seconds=3.5, clock=lambda: float(next(ticks)), checkpoint=path)
    assert tn.heal(student, teacher, batches(), steps=3, checkpoint=path).losses == ()


@pytest.mark.parametrize("content", [b"", b"\x08\x00\x00\x00\x00\x00\x00\x00{}      "])
def test_damaged_checkpoint(tmp_path: Path, content: bytes) -> None:
    teacher, student = pair()
    (tmp_path / "heal.safetensors").write_bytes(content)
    with pytest.raises(FormatError, match="Cannot resume healing"):
        tn.heal(student, teacher, batches(), steps=2, checkpoint=tmp_path / "heal.safetensors")


def test_checkpoint_of_another_compression(tmp_path: Path) -> None:
    teacher, student = pair()
    path = tmp_path / "heal.safetensors"
    tn.heal(student, teacher, batches(), steps=1, checkpoint=path)
    other = copy.deepcopy(teacher)
    tn.compress(other, tn.CompressionConfig(param_ratio=0.3, method="svd", topology="low_rank"))
    with pytest.raises(FormatError, match="another compressed model"):
        tn.heal(other, teacher, batches(), steps=2, checkpoint=path)


def test_a_checkpoint_that_cannot_be_written(tmp_path: Path) -> None:
    teacher, student = pair()
    for path in (tmp_path, tmp_path / "none" / "heal.safetensors"):
        with pytest.raises(DestinationError, match="name a file"):
            tn.heal(student, teacher, batches(), steps=1, checkpoint=path)


def test_a_checkpoint_that_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    teacher, student = pair()
    path = tmp_path / "heal.safetensors"
    _, other = pair()
    tn.heal(other, teacher, batches(), steps=2, checkpoint=path)
    with safetensors.safe_open(str(path), framework="pt") as file:
        tensors, header = {x: file.get_tensor(x) for x in file.keys()}, file.metadata()  # noqa: SIM118
    last = list(compressed_layers(student))[-1]
    name = next(name for name in tensors if name.startswith(last) and "/" not in name)
    safetensors.torch.save_file({**tensors, name: torch.zeros(3)}, str(path), metadata=header)
    before = copy.deepcopy(student.state_dict())
    with pytest.raises(FormatError, match=f"another compressed model: {name}"):
        tn.heal(student, teacher, batches(), steps=4, checkpoint=path)
    assert all(torch.equal(value, before[key]) for key, value in student.state_dict().items())
