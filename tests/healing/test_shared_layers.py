"""Healing and refitting of stacks of experts that share a core: one parameter, trained and fitted once."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path

import pytest
import torch
from mixture_models import logits, mixture
from stacked_experts import gaussian
from torch import Tensor, nn
from transformers import PreTrainedModel

import tensornet as tn
import tensornet_hf as th
from tensornet.healing import refine
from tensornet.healing.heal import compressed_layers

E = 4
CONFIG = tn.CompressionConfig(target_modules="*experts*", param_ratio=0.45, share_experts=True)


def shared_core(model: nn.Module) -> list[Tensor]:
    """The tensors that several experts store together, each once."""
    stored = [x for layer in compressed_layers(model).values() for x in layer.stored.values()]
    counts = Counter(map(id, stored))
    return [*{id(x): x for x in stored if counts[id(x)] > 1}.values()]


def planted() -> PreTrainedModel:
    """A mixture whose experts read few directions of their inputs."""
    model = mixture("mixtral")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("gate_up_proj", "down_proj")):
                parameter.mul_(3)  # experts matter, so that their errors are seen
            if name.endswith("gate_up_proj"):
                basis, _ = torch.linalg.qr(gaussian(parameter.shape[2], 14, seed=1))
                parameter.copy_(0.9 * parameter @ basis @ basis.T + 0.1 * parameter)
    return model


def shared_mixture() -> tuple[PreTrainedModel, PreTrainedModel, list[dict[str, Tensor]], tn.CalibrationStats]:
    dense = planted()
    draw = torch.Generator().manual_seed(3)
    inputs = [torch.randint(3, 101, (8, 11), generator=draw) for _ in range(8)]
    batches = [{"input_ids": ids, "labels": ids} for ids in inputs]
    small, stats = copy.deepcopy(dense), tn.calibrate(dense, batches)
    report = tn.compress(small, CONFIG, calibration=batches, progress=False)
    assert report.plan.stacks
    return dense, small, batches, stats


def test_refitting_skips_layers_that_share_a_core() -> None:
    dense, small, batches, stats = shared_mixture()
    cores = [core.clone() for core in shared_core(small)]
    with pytest.warns(UserWarning, match="share cores"):
        report = refine(small, dense, batches, stats)
    sharing = {name for name, why in report.left.items() if "shares cores" in why}
    assert len(sharing) >= E
    assert not sharing & {*report.after}
    assert all(torch.equal(a, b) for a, b in zip(shared_core(small), cores, strict=True))


def test_healing_lowers_the_loss_and_trains_a_shared_core_once(tmp_path: Path) -> None:
    dense, small, batches, _ = shared_mixture()
    core = shared_core(small)[0]
    before, own = core.detach().clone(), len({id(p) for p in small.parameters()})
    report = tn.heal(small, dense, batches, steps=40, lr=3e-2)
    assert sum(report.losses[-8:]) < 0.7 * sum(report.losses[:8])
    layers = compressed_layers(small).values()
    cores = {
        id(x): x.numel() for layer in layers for x in layer.stored.values() if isinstance(x, nn.Parameter)
    }
    assert report.trained == sum(cores.values())  # the shared core counts once
    assert shared_core(small)[0] is core
    assert not torch.equal(core, before)
    assert len({id(p) for p in small.parameters()}) == own
    want = logits(small)
    th.save(small, tmp_path / "small")
    again = th.load(tmp_path / "small").eval()
    torch.testing.assert_close(logits(again), want, rtol=1e-4, atol=1e-4)
    assert len(shared_core(again)) == len(shared_core(small))
