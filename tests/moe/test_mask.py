"""GradientMask: bit-identity of masked cores, draws, schedules, resuming, bad input."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import tensornet as tn
import tensornet_moe as tm
from tensornet.errors import FormatError

TOPOLOGY = tn.topologies.mpo(out_dims=(2, 2, 2), in_dims=(2, 2, 2), max_bond=3)

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "sgd_fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, fused=True),
    "adam_fused": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
}


class Model(nn.Module):
    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(tm.SharedCoreExperts(TOPOLOGY, 2) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(x @ layer.expert_matrices().sum(0))
        return x

    @property
    def centers(self) -> list[nn.Parameter]:
        return [layer.core_1 for layer in self.layers]  # type: ignore[misc]


def backward(model: nn.Module, seed: int = 0) -> None:
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(seed))
    model(x).square().sum().backward()


def train(model: Model, optimizer: torch.optim.Optimizer, steps: range) -> list[list[bool]]:
    """Step, and say which centers each step left bit-identical."""
    left = []
    for step in steps:
        optimizer.zero_grad()
        backward(model, step)
        before = [c.detach().clone() for c in model.centers]
        optimizer.step()
        left.append([torch.equal(a, b) for a, b in zip(before, model.centers, strict=True)])
    return left


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_masked_core_is_bit_identical_and_the_rest_moves(name: str) -> None:
    model = Model()
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer, range(3))  # momentum there is, which a zero gradient would not stop
    mask = tm.GradientMask(model, p=0.5, seed=3).attach(optimizer)
    twin = torch.Generator().manual_seed(3)
    left = train(model, optimizer, range(3, 15))
    wanted = [(torch.rand(3, generator=twin, dtype=torch.float64) < 0.5).tolist() for _ in range(12)]
    assert left == wanted
    assert {value for row in left for value in row} == {True, False}
    assert mask.steps == 12
    private = [p.detach().clone() for p in model.parameters() if p.ndim == 5]
    train(model, optimizer, range(1))
    moved = [
        not torch.equal(a, b)
        for a, b in zip(private, (p for p in model.parameters() if p.ndim == 5), strict=True)
    ]
    assert all(moved)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("p", [0.0, 1.0])
def test_both_ends_are_exact(name: str, p: float) -> None:
    masked, other = Model(), Model()
    other.load_state_dict(masked.state_dict())
    if p == 1.0:
        for center in other.centers:
            center.requires_grad_(False)
    first = OPTIMIZERS[name](masked.parameters())
    second = OPTIMIZERS[name]([x for x in other.parameters() if x.requires_grad])
    tm.GradientMask(masked, p=p).attach(first)
    train(masked, first, range(6))
    train(other, second, range(6))
    assert all(torch.equal(a, b) for a, b in zip(masked.parameters(), other.parameters(), strict=True))


def test_the_draw_is_apart_from_the_models_randomness_and_the_same_everywhere() -> None:
    left = []
    for rank in range(2):
        model = Model()
        optimizer = OPTIMIZERS["sgd"](model.parameters())
        tm.GradientMask(model, p=0.5, seed=9).attach(optimizer)
        torch.manual_seed(rank)
        left.append(train(model, optimizer, range(10)))
        assert float(torch.rand(1)) == float(torch.rand(1, generator=torch.Generator().manual_seed(rank)))
    assert left[0] == left[1]


@pytest.mark.parametrize("name", ["adamw", "adamw_fused"])
def test_grad_scaler_draws_only_for_steps_that_happen(name: str) -> None:
    model = Model()
    optimizer = OPTIMIZERS[name](model.parameters())
    mask = tm.GradientMask(model, p=1.0).attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = [c.detach().clone() for c in model.centers]
    for broken in (False, True, False):
        optimizer.zero_grad()
        scaler.scale(model(torch.randn(4, 8)).square().sum()).backward()
        if broken:
            model.layers[0].core_0.grad.fill_(torch.inf)  # type: ignore[union-attr]
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
    assert mask.steps == 2
    assert all(torch.equal(a, b) for a, b in zip(before, model.centers, strict=True))


@pytest.mark.parametrize("granularity", ["core", "element"])
def test_a_resumed_run_repeats_the_uninterrupted_one(granularity: tm.mask.Granularity) -> None:
    options = {"p": 0.5, "granularity": granularity, "schedule": tm.linear_fade(30)}
    model = Model()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    mask = tm.GradientMask(model, **options).attach(optimizer)
    train(model, optimizer, range(5))
    buffer = io.BytesIO()
    torch.save(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "mask": mask.state_dict()}, buffer
    )
    train(model, optimizer, range(5, 12))
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    resumed = Model()
    resumed.load_state_dict(state["model"])
    second = OPTIMIZERS["adamw"](resumed.parameters())
    second.load_state_dict(state["optimizer"])
    tm.GradientMask(resumed, **options, seed=77).attach(second).load_state_dict(state["mask"])
    train(resumed, second, range(5, 12))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))


def test_masks_of_elements_do_not_depend_on_which_parameters_have_gradients() -> None:
    def masked(first: bool) -> Tensor:
        parameters = [nn.Parameter(torch.zeros(64)) for _ in range(2)]
        for parameter in parameters[0 if first else 1 :]:
            parameter.grad = torch.ones(64)
        tm.GradientMask(parameters, p=0.5, granularity="element").apply()
        assert parameters[1].grad is not None
        return parameters[1].grad

    assert torch.equal(masked(first=True), masked(first=False))


def test_elements_are_masked_one_by_one() -> None:
    parameter = nn.Parameter(torch.zeros(40, 50))
    for p in (0.0, 0.3, 1.0):
        mask = tm.GradientMask([parameter], p=p, granularity="element")
        parameter.grad = torch.ones_like(parameter)
        assert mask.apply() == 0
        assert float((parameter.grad == 0).float().mean()) == pytest.approx(p, abs=0.04)
        parameter.grad = None
        mask.apply()
        mask.detach()


def test_schedule_fades_and_is_clipped() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    mask = tm.GradientMask([parameter], p=0.8, schedule=tm.linear_fade(4))
    seen = []
    for _ in range(6):
        seen.append(mask.current_p)
        mask.apply()
    assert seen == pytest.approx([0.8, 0.6, 0.4, 0.2, 0, 0])
    with pytest.raises(ValueError, match="1 step"):
        tm.linear_fade(0)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_compensation_scales_the_update_under_every_optimizer(name: str) -> None:
    plain = Model(1)
    models = [copy.deepcopy(plain) for _ in range(20)]  # the first draw masks the core in about half of them
    before, moves = plain.centers[0].detach().clone(), []
    for seed, model in enumerate([*models, plain]):
        optimizer = OPTIMIZERS[name](model.parameters())
        if model is not plain:
            tm.GradientMask(model, p=0.5, compensate=True, seed=seed).attach(optimizer)
        backward(model)
        optimizer.step()
        moves.append((model.centers[0] - before).detach())
    *scaled, alone = moves
    kept = [moved for moved in scaled if bool(moved.any())]
    assert 0 < len(kept) < 20
    for moved in kept:
        torch.testing.assert_close(moved, 2 * alone, rtol=1e-4, atol=1e-7)


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [torch.optim.LBFGS, torch.optim.SGD])
def test_a_closure_would_undo_the_mask_and_is_refused(kind: type[torch.optim.Optimizer]) -> None:
    model = Model()
    optimizer = kind(model.parameters(), lr=0.1)
    mask = tm.GradientMask(model, p=0.5).attach(optimizer)
    before = mask.state_dict()

    def closure() -> float:
        backward(model)
        return 0.0

    for step in (lambda: optimizer.step(closure), lambda: optimizer.step(closure=closure)):
        with pytest.raises(RuntimeError, match="closure"):
            step()
    assert mask.steps == before["steps"]
    if kind is torch.optim.SGD:
        closure()
        optimizer.step(None)
        assert mask.steps == 1


def test_the_optimizer_that_accelerate_wraps_is_masked() -> None:
    from accelerate import Accelerator

    model, wanted = Model(), []
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    prepared, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    mask = tm.GradientMask(model, p=0.5, seed=3).attach(optimizer)
    twin, left = torch.Generator().manual_seed(3), []
    for step in range(8):
        before = [p.detach().clone() for p in model.centers]
        with accelerator.accumulate(prepared):
            accelerator.backward(prepared(torch.randn(4, 8)).square().sum())
            optimizer.step()
            optimizer.zero_grad()
        if step % 2:
            left.append([torch.equal(a, b) for a, b in zip(before, model.centers, strict=True)])
            wanted.append((torch.rand(3, generator=twin, dtype=torch.float64) < 0.5).tolist())
    assert (left, mask.steps) == (wanted, 4)
    mask.detach()


def test_an_attached_mask_draws_by_itself_and_once() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    mask = tm.GradientMask([parameter], p=0.5, compensate=True)
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    mask.attach(optimizer)
    with pytest.raises(RuntimeError, match="draws by itself"):
        mask.apply()
    with pytest.raises(RuntimeError, match="attached"):
        mask.attach(optimizer)


def test_a_state_of_another_mask_is_refused() -> None:
    mask = tm.GradientMask(Model(3), p=0.5)
    other = tm.GradientMask(Model(2), p=0.5)
    with pytest.raises(FormatError, match=r"2 cores.*3"):
        mask.load_state_dict(other.state_dict())
    with pytest.raises(FormatError, match="GradientMask"):
        mask.load_state_dict({"steps": 3})
    state = tm.GradientMask(Model(3), p=0.5, granularity="element").state_dict()
    with pytest.raises(FormatError, match="granularity='element'"):
        mask.load_state_dict(state)
