"""Tied layers share what stores their cores: moved, copied, averaged, saved and loaded as one."""

from __future__ import annotations

import copy
from pathlib import Path

import distributed_tasks as tasks
import pytest
import torch
from hf_models import ARCHITECTURES, logits
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import tensornet as tn
import tensornet_hf as th
from tensornet_hf.checkpoint import read_checkpoint

FORMS = {
    "pivoted": {"pivoted": True, "topology": "low_rank", "param_ratio": 0.7},
    "int8": {"formats": ("int8",)},
    "bf16": {"formats": ("bf16",)},
}
IDS = torch.arange(30)
each_form = pytest.mark.parametrize("form", FORMS)


def options(form: str) -> tn.CompressionConfig:
    return tn.CompressionConfig(target_modules="all", objective="weight", **FORMS[form])  # type: ignore[arg-type]


class Tied(nn.Module):
    """An embedding tied to its head, and a layer between."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner = nn.Embedding(30, 12), nn.Linear(12, 12)
        self.head = nn.Linear(12, 30, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.inner(self.table(ids)))


def compressed(form: str) -> Tied:
    torch.manual_seed(1)
    model = Tied()
    tn.compress(model, options(form), progress=False)
    return model.eval()


@each_form
def test_every_parameter_can_require_gradients(form: str) -> None:
    model = compressed(form).requires_grad_(True)
    assert all(p.is_floating_point() for p in model.parameters())
    model(IDS).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())


@each_form
def test_moves_copies_and_averages_keep_them_tied(form: str) -> None:
    model = compressed(form)
    expected = model(IDS)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    average.update_parameters(model)
    torch.testing.assert_close(average(IDS), expected)
    model._apply(torch.clone)  # as moving to a device makes new tensors
    for moved in (model, copy.deepcopy(model), copy.deepcopy(model).double()):
        stored = moved.table.stored
        assert all(tensor is moved.head.stored[name] for name, tensor in stored.items())
        torch.testing.assert_close(moved(IDS).float(), expected, rtol=1e-4, atol=1e-5)
    other = compressed(form)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(IDS), expected)


@each_form
def test_sizes_count_them_once(form: str) -> None:
    model, fresh = compressed(form), Tied()
    report = tn.compress(fresh, options(form), progress=False)
    stored = {id(x): x for x in model.state_dict(keep_vars=True).values()}.values()
    dense = sum(x.numel() for x in Tied().parameters())
    assert report.model_params_after == dense - report.plan.params_before + report.plan.params_after
    assert report.model_bytes_after == sum(x.nbytes for x in stored)


@each_form
def test_files_and_folders_keep_them_tied(form: str, tmp_path: Path) -> None:
    small = compressed(form)
    tn.save_model(small, tmp_path / "net.safetensors")
    again = tn.load_model(Tied(), tmp_path / "net.safetensors").eval()
    torch.testing.assert_close(again(IDS), small(IDS), rtol=0, atol=0)
    assert again.head.stored_cores[0] is again.table.stored_cores[0]
    model = ARCHITECTURES["gpt2"].dense
    tn.compress(model, options(form), progress=False)
    model.save_pretrained(tmp_path / "gpt2")
    loaded = th.load(tmp_path / "gpt2")
    torch.testing.assert_close(loaded(IDS[None]).logits, model(IDS[None]).logits, atol=0, rtol=0)
    assert loaded.lm_head.stored_cores[0] is loaded.transformer.wte.stored_cores[0]
    assert not any(name.startswith("lm_head.core") for name in read_checkpoint(tmp_path / "gpt2").tensors)
    loaded.tie_weights()
    got = logits(loaded, ARCHITECTURES["gpt2"])
    torch.testing.assert_close(got, logits(model, ARCHITECTURES["gpt2"]), atol=0, rtol=0)


@pytest.mark.slow
def test_sharded_by_fsdp1(tmp_path: Path) -> None:
    (losses,) = tasks.in_processes(fsdp1, 1, tmp_path)
    assert losses[-1] < losses[0]


def fsdp1(rank: int, ranks: int) -> list[float]:
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = compressed("pivoted").train()
    sharded = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    optimizer = torch.optim.SGD(sharded.parameters(), lr=0.05)
    losses = []
    for _ in range(3):
        loss = nn.functional.cross_entropy(sharded(IDS), IDS)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
