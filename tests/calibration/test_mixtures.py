"""Moments of experts: how rare experts weigh in the loss, what they borrow, and the memory of the sums."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import tensornet as tn
from tensornet.calibration import sampled_losses
from tensornet.calibration.moment_sums import (
    GRADIENT_PRIOR,
    PRIOR,
    USAGE_SPREAD,
    MomentSum,
    find_siblings,
)

EXPERTS, WIDTH, HIDDEN, CLASSES = 6, 12, 10, 9


class Mixture(nn.Module):
    """A classifier with one mixture, in which each token has two experts, some of them rarely."""

    def __init__(self, bias: tuple[float, ...] = (4.0, 3.0, 2.0, 0.0, -1.0, -30.0)) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.router.bias.data = torch.tensor(bias)
        self.experts = nn.ModuleList(
            nn.ModuleDict(
                {
                    "gate": nn.Linear(WIDTH, HIDDEN),
                    "up": nn.Linear(WIDTH, HIDDEN),
                    "down": nn.Linear(HIDDEN, WIDTH),
                }
            )
            for _ in range(EXPERTS)
        )
        self.head = nn.Linear(WIDTH, CLASSES)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=1.5 * layer.in_features**-0.5)

    def chosen(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.router(x).softmax(-1).topk(2)

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.chosen(x)
        mixed = x
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == number)
            if len(token):
                part = x[token]
                gate, up, down = (expert.get_submodule(name) for name in ("gate", "up", "down"))
                y = down(torch.sigmoid(gate(part)) * up(part))
                mixed = mixed.index_add(0, token, y * weights[token, slot, None])
        return self.head(mixed)


def data(count: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, WIDTH, generator=generator)
    return [(part, torch.zeros(len(part), dtype=torch.long)) for part in x.split(512)]


def divergence(model: nn.Module, x: Tensor, dense: Tensor) -> float:
    return float(
        nn.functional.kl_div(model(x).log_softmax(-1), dense, log_target=True, reduction="batchmean")
    )


@pytest.mark.parametrize("layer", ["gate", "up", "down"])
def test_the_predicted_loss_of_an_expert_counts_all_tokens(layer: str) -> None:
    """An error in an expert that few tokens reach increases the mean loss of all tokens only a little."""
    torch.manual_seed(0)
    model = Mixture().requires_grad_(False)
    batches = data(16384)
    stats = tn.calibrate(model, batches, loss_fn=sampled_losses, tokens=16384)
    x = torch.cat([part for part, _ in batches])
    dense = model(x).log_softmax(-1)
    shares = []
    for number in range(EXPERTS - 1):
        name = f"experts.{number}.{layer}"
        weight = model.get_parameter(f"{name}.weight")
        measured = predicted = 0.0
        for _ in range(8):
            error = 0.05 * weight.std() * torch.randn_like(weight)
            predicted += 0.5 * float(torch.trace(stats.rows[name] @ error @ stats.columns[name] @ error.T))
            for sign in (1, -1):
                weight.data.add_(sign * error)
                measured += divergence(model, x, dense) / 2
                weight.data.sub_(sign * error)
        shares.append(stats.counts[name] / len(x))
        # Moments of rare experts are mostly those of the mixture, so predictions for them may be too high.
        least = 0.5 if shares[-1] > 0.2 else 0.0
        assert least < measured / predicted < 1.5, (name, shares[-1], measured, predicted)
    seen = [share for share in shares if share > 0.2]
    assert min(seen) < 0.5 < max(seen)  # the range over which a wrong scale would be seen


def tokens_of(model: Mixture, batches: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """The inputs of each expert, found without hooks."""
    x = torch.cat([part for part, _ in batches])
    chosen = model.chosen(x)[1]
    return [x[(chosen == number).any(1)] for number in range(EXPERTS)]


def test_few_tokens_blend_towards_the_mixture() -> None:
    torch.manual_seed(0)
    model, batches = Mixture(), data(100)
    stats = tn.calibrate(model, batches, loss_fn=sampled_losses)
    inputs = tokens_of(model, batches)
    everything = torch.cat(inputs)
    mean = everything.T @ everything / len(everything)
    prior = PRIOR * WIDTH
    for number, x in enumerate(inputs):
        expected = (x.T @ x + prior * mean) / (len(x) + prior)
        for layer in ("gate", "up"):
            torch.testing.assert_close(stats.columns[f"experts.{number}.{layer}"], expected)
        assert stats.columns[f"experts.{number}.gate"] is stats.columns[f"experts.{number}.up"]
        assert stats.counts[f"experts.{number}.down"] == len(x)
    assert not len(inputs[-1])
    assert max(map(len, inputs)) <= 100  # so the mixture counts for at least a tenth of each moment


def test_gradients_blend_and_experts_get_the_tokens_expected_in_other_text() -> None:
    torch.manual_seed(0)
    model, batches = Mixture(), data(100)
    stats = tn.calibrate(model, batches)
    outputs: dict[int, Tensor] = {}
    for number, expert in enumerate(model.experts):
        expert.get_submodule("down").register_forward_hook(
            lambda _, args, y, k=number: outputs.update({k: y})
        )
    ((x, labels),) = batches
    loss = nn.functional.cross_entropy(model(x), labels, reduction="sum")
    found = dict(zip(outputs, torch.autograd.grad(loss, list(outputs.values())), strict=True))
    total = sum(map(len, found.values()))
    mean = sum(g.T @ g for g in found.values()) / total
    for number in range(EXPERTS):
        g = found.get(number, torch.zeros(0, WIDTH))
        own = (g.T @ g + GRADIENT_PRIOR * mean) / (len(g) + GRADIENT_PRIOR)
        expected = (1 - USAGE_SPREAD) * len(g) + USAGE_SPREAD * total / EXPERTS
        torch.testing.assert_close(stats.rows[f"experts.{number}.down"], own * expected / 100)
    assert EXPERTS - 1 not in found  # its moment is the mean


def test_layers_that_receive_all_tokens_keep_their_own_moments() -> None:
    """Blocks are numbered as experts are, and a block that never ran does not make them a mixture."""

    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[2](self.blocks[0](x).tanh())

    model, x = Blocks(), torch.randn(6, 4)
    stats = tn.calibrate(model, [(x, torch.zeros(6, dtype=torch.long))])
    torch.testing.assert_close(stats.columns["blocks.0"], x.T @ x / 6)
    hidden = model.blocks[0](x).tanh().detach()
    torch.testing.assert_close(stats.columns["blocks.2"], hidden.T @ hidden / 6)


def test_a_router_that_sends_all_tokens_to_one_expert_leaves_the_others_its_moment() -> None:
    torch.manual_seed(0)
    model, batches = nn.Sequential(Mixture((90.0, 80.0, 0.0, 0.0, 0.0, 0.0))), data(30)
    stats = tn.calibrate(model, batches)
    ((x, _),) = batches
    for number in range(EXPERTS):  # two experts received everything
        torch.testing.assert_close(stats.columns[f"0.experts.{number}.gate"], x.T @ x / 30)
        assert stats.counts[f"0.experts.{number}.gate"] == (30 if number < 2 else 0)


@pytest.mark.parametrize("diagonal", [False, True])
def test_a_sum_takes_the_memory_of_its_vectors_or_of_a_moment(diagonal: bool) -> None:
    found, parts = MomentSum(16, diagonal=diagonal), torch.randn(9, 5, 16).unbind()
    for count, part in enumerate(parts, start=1):
        copied = found.copy()
        found.add(part)
        x = torch.cat(parts[:count])
        expected = x.square().sum(0) if diagonal else (x.T @ x).triu()
        torch.testing.assert_close(found.upper() if diagonal else found.upper().triu(), expected)
        assert found.num_bytes == (64 if diagonal else min(len(x), 16) * 64 if len(x) <= 16 else 16 * 64)
        assert copied.count == found.count - 5
    if not diagonal:
        expected = torch.cat(parts[:-1]).T @ torch.cat(parts[:-1])
        torch.testing.assert_close(copied.upper().triu(), expected.triu())


def test_siblings_differ_in_the_last_number() -> None:
    shapes = {
        "layers.0.experts.0.up": (4, 2),
        "layers.0.experts.1.up": (4, 2),
        "layers.0.experts.2.up": (4, 3),
        "layers.1.experts.0.up": (4, 2),
        "layers.0.w_1": (4, 2),
        "layers.0.w_2": (4, 2),
        "expert_1.w": (4, 2),
        "expert_2.w": (4, 2),
        "head": (4, 2),
    }
    found = find_siblings(shapes)
    assert found["layers.0.experts.0.up"] == ["layers.0.experts.0.up", "layers.0.experts.1.up"]
    assert found["expert_2.w"] == ["expert_1.w", "expert_2.w"]
    assert "layers.0.experts.2.up" not in found
    assert "layers.0.w_1" not in found
    assert "head" not in found
