"""Healing and refitting of stacks of experts that share a core: one parameter, trained and fitted once."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from mixture_models import logits, mixture
from stacked_experts import Experts, gaussian
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel

import tensornet as tn
import tensornet_hf as th
from tensornet.healing import refine
from tensornet.healing.shared_layers import SharedLayers, find_shared_layers
from tensornet.healing.teacher_student import Group, PairedMoments, PairedRun
from tensornet.healing.trained import compressed_layers
from tensornet.linalg.weighted_svd import Weighting
from tensornet.network import TensorNetwork
from tensornet_hf.training.heal import heal

E, OUT, IN, READ = 4, 10, 12, 9
CONFIG = tn.CompressionConfig(target_modules="*experts*", param_ratio=0.45, share_experts=True)


class Routed(nn.Module):
    """A linear layer, and experts that read as many of its tokens each."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.first = nn.Linear(READ, weights.shape[2])
        self.experts = Experts(weights.clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(torch.tanh(self.first(x)).reshape(E, -1, self.experts_in)).reshape(len(x), -1)

    experts_in = IN


PLANTED = {
    "inputs": gaussian(E, OUT, 4) @ gaussian(4, IN, seed=1) / 2 + 0.3 * gaussian(E, OUT, IN, seed=2),
    "outputs": gaussian(OUT, 4, seed=1) @ gaussian(E, 4, IN) / 2 + 0.3 * gaussian(E, OUT, IN, seed=2),
    "base": gaussian(OUT, IN, seed=3)
    + 0.4 * gaussian(E, OUT, 1) @ gaussian(E, 1, IN, seed=1)
    + 0.1 * gaussian(E, OUT, IN, seed=2),
}


def routed(form: str) -> tuple[Routed, Routed, list[Tensor]]:
    """Dense, compressed with experts that share a core, and batches."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        dense = Routed(PLANTED[form]).eval()
    small, ratio = copy.deepcopy(dense), 0.6
    options = {"objective": "weight", "topology": "low_rank"}
    config = tn.CompressionConfig("experts*", param_ratio=ratio, share_experts=True, **options)  # type: ignore[arg-type]
    tn.compress(small, config, progress=False)
    tn.compress(small, tn.CompressionConfig("first", max_bond=4, **options), progress=False)  # type: ignore[arg-type]
    return dense, small, [gaussian(E * 100, READ, seed=k) for k in range(10, 26)]


def shared_core(model: nn.Module) -> list[Tensor]:
    """The core that every expert of the first stack holds, each once."""
    layers = compressed_layers(model)
    stack = find_shared_layers(layers)[0]  # type: ignore[arg-type]
    users = [[id(x) for x in layers[name].stored.values()] for name in stack.names]
    common = set(users[0]).intersection(*users[1:])
    return [x for x in layers[stack.names[0]].stored.values() if id(x) in common]


@pytest.mark.parametrize("form", PLANTED)
def test_a_stack_is_refitted_behind_compressed_layers(form: str) -> None:
    dense, small, batches = routed(form)
    (stack,) = find_shared_layers(compressed_layers(small))  # type: ignore[arg-type]
    assert stack.form == form
    count, before = sum(p.numel() for p in small.parameters()), shared_core(small)
    report = refine(small, dense, batches, correction=1.0)
    assert report.kept
    assert report.distances[1] < 0.995 * report.distances[0]
    assert not report.left
    assert {*report.after} == {"first", *stack.names}
    errors = [sum(table[name] for name in stack.names) for table in (report.before, report.after)]
    assert errors[1] < 0.995 * errors[0]
    assert sum(p.numel() for p in small.parameters()) == count
    assert [id(x) for x in shared_core(small)] == [id(x) for x in before]


def test_a_refitted_stack_is_the_joint_fit_to_its_targets() -> None:
    dense, _, batches = routed("inputs")
    exact = copy.deepcopy(dense)  # nothing before the experts is compressed: targets are the matrices
    tn.compress(
        exact,
        tn.CompressionConfig("experts*", param_ratio=0.5, share_experts=True),
        calibration=tn.calibrate(dense, batches[:14], gradient_batches=0),
        progress=False,
    )
    fitted = {name: layer.to_matrix() for name, layer in compressed_layers(exact).items()}
    refine(exact, dense, batches, tn.calibrate(dense, batches[:14], gradient_batches=0))
    for name, layer in compressed_layers(exact).items():
        torch.testing.assert_close(layer.to_matrix(), fitted[name], rtol=1e-3, atol=1e-3)


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
    tn.compress(small, CONFIG, calibration=stats, progress=False)
    assert find_shared_layers(compressed_layers(small))  # type: ignore[arg-type]
    return dense, small, batches, stats


def test_an_expert_with_other_tokens_takes_part_by_its_calibrated_moments(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dense, small, batches, stats = shared_mixture()
    names = find_shared_layers(compressed_layers(small))[0].names  # type: ignore[arg-type]
    whole = PairedRun.moments

    def without_one(run: PairedRun, group: Group) -> PairedMoments | str:
        return "other tokens reached it" if names[1] in group.names else whole(run, group)

    monkeypatch.setattr(PairedRun, "moments", without_one)
    bare = refine(copy.deepcopy(small), dense, batches)
    assert {bare.left[name] for name in names} == {
        f"{names[1]}, with which it shares a core, has no moments of this data or of calibration"
    }
    assert not {*names} & {*bare.after}
    old = {name: layer.to_matrix() for name, layer in compressed_layers(small).items()}
    traces: list[list[float]] = []  # of the input moments in each fit
    fit = SharedLayers.fit

    def traced(stack: SharedLayers, matrices: list[Tensor], weights: list[Weighting]) -> list[TensorNetwork]:
        traces.append([float(x.columns.trace()) for x in weights if x.columns is not None])
        return fit(stack, matrices, weights)

    monkeypatch.setattr(SharedLayers, "fit", traced)
    report = refine(small, dense, batches, stats)
    assert len(traces[0]) == len(names)
    assert max(traces[0]) < 3 * min(traces[0])  # means over tokens, whatever they come from
    assert report.kept
    assert not {*names} & {*report.left}
    assert {*names} & {*report.after} == {names[0], names[2]}
    new = {name: layer.to_matrix() for name, layer in compressed_layers(small).items()}
    assert all(not torch.equal(new[name], old[name]) for name in names)


def test_healing_lowers_the_loss_and_trains_a_shared_core_once(tmp_path: Path) -> None:
    dense, small, batches, _ = shared_mixture()
    (core,) = shared_core(small)
    before, own = core.detach().clone(), len({id(p) for p in small.parameters()})
    report = tn.heal(small, dense, batches, layer_steps=10, steps=40, lr=3e-2)
    assert report.layer_losses[-1] < 0.9 * report.layer_losses[0]
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
    th.save_model(small, tmp_path / "small")
    again = th.load(tmp_path / "small").eval()
    assert torch.equal(logits(again), want)
    assert len(shared_core(again)) == 1


def test_a_resumed_healing_ends_where_the_whole_one_does(tmp_path: Path) -> None:
    dense, small, batches, _ = shared_mixture()
    whole, part = copy.deepcopy(small), copy.deepcopy(small)
    tn.heal(whole, dense, batches, steps=12)
    options = {"steps": 12, "checkpoint": tmp_path / "heal.safetensors", "save_every": 4}
    with pytest.raises(KeyboardInterrupt):
        tn.heal(part, dense, Interrupted(batches, 7), **options)
    again = copy.deepcopy(small)
    report = tn.heal(again, dense, batches, **options)
    assert len(report.losses) == 8
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), whole.parameters(), strict=True))


class Interrupted(list[dict[str, Tensor]]):
    """Batches that are interrupted at one of them."""

    def __init__(self, batches: list[dict[str, Tensor]], at: int) -> None:
        super().__init__(batches[:at])

    def __iter__(self):  # type: ignore[no-untyped-def]
        yield from super().__iter__()
        raise KeyboardInterrupt


class Examples(Dataset[dict[str, Tensor]]):
    def __init__(self, batches: list[dict[str, Tensor]]) -> None:
        self.rows = torch.cat([batch["input_ids"] for batch in batches])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def test_the_trainer_heals_a_shared_core(tmp_path: Path) -> None:
    dense, small, batches, _ = shared_mixture()
    (core,) = shared_core(small)
    before = core.detach().clone()
    trainer = {"output_dir": str(tmp_path), "dataloader_pin_memory": False, "disable_tqdm": True}
    first = heal(small, dense, Examples(batches), steps=4, learning_rate=1e-8, **trainer)
    heal(small, dense, Examples(batches), steps=60, learning_rate=1e-2, **trainer)
    last = heal(small, dense, Examples(batches), steps=4, learning_rate=1e-8, **trainer)
    assert last < 0.8 * first
    assert shared_core(small)[0] is core
    assert not torch.equal(core, before)
    th.save_model(small, tmp_path / "small")
    assert torch.equal(logits(th.load(tmp_path / "small").eval()), logits(small))
