"""Calibration of models the library does not recognise: in-place changes, odd routing, layouts and losses."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tensornet as tn
from tensornet.calibration.batches import token_mask
from tensornet.calibration.losses import (
    label_losses,
    losses_against,
    output_losses,
    own_losses,
    sampled_losses,
)
from tensornet.calibration.moment_sums import PRIOR
from tensornet.errors import TargetError

X, Y = torch.randn(32, 8, generator=torch.Generator().manual_seed(0)), torch.arange(32) % 4


def same(a: tn.CalibrationStats, b: tn.CalibrationStats) -> None:
    assert a.loss == pytest.approx(b.loss)
    for side in ("rows", "columns"):
        assert getattr(a, side).keys() == getattr(b, side).keys()
        for name, moment in getattr(a, side).items():
            torch.testing.assert_close(moment, getattr(b, side)[name])


class Changing(nn.Module):
    """Two layers read one tensor that is changed in place in between."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        y = self.first(x)
        x.mul_(3).add_(1)
        return y + self.second(x)


def test_a_tensor_that_changed_in_place_is_another_input() -> None:
    stats = tn.calibrate(Changing(), [(X, Y)])
    torch.testing.assert_close(stats.columns["first"], X.T @ X / 32)
    torch.testing.assert_close(stats.columns["second"], (3 * X + 1).T @ (3 * X + 1) / 32)


@pytest.mark.parametrize("behind", [nn.ReLU, nn.SiLU])
def test_in_place_operations_behind_any_layer(behind: type[nn.ReLU]) -> None:
    def model(inplace: bool) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(8, 6),
            behind(inplace=inplace),
            nn.Linear(6, 6),
            behind(inplace=inplace),
            nn.Linear(6, 4),
        )

    same(tn.calibrate(model(True), [(X, Y)]), tn.calibrate(model(False), [(X, Y)]))


class Routed(nn.Module):
    """Experts that all read one tensor, where only those that a batch asks for run."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 4) for _ in range(3))

    def forward(self, x: Tensor, used: list[int]) -> Tensor:
        return sum(self.experts[number](x) for number in used)  # type: ignore[return-value]


def test_experts_that_some_batches_do_not_reach() -> None:
    model, used = Routed(), ([0, 1], [1], [0, 1], [1, 0])
    parts = X.split(8)
    batches = [
        {"x": x, "used": experts, "labels": y} for x, experts, y in zip(parts, used, Y.split(8), strict=True)
    ]
    stats = tn.calibrate(model, batches)
    without = torch.cat([parts[0], *parts[2:]])
    first, second = without.T @ without, X.T @ X
    mean, prior = (first + second) / 56, PRIOR * 8
    torch.testing.assert_close(stats.columns["experts.0"], (first + prior * mean) / (24 + prior))
    torch.testing.assert_close(stats.columns["experts.1"], (second + prior * mean) / (32 + prior))
    torch.testing.assert_close(stats.columns["experts.2"], mean)
    assert stats.counts == {"experts.0": 24, "experts.1": 32, "experts.2": 0}
    config = tn.CompressionConfig(param_ratio=0.9)
    made = tn.plan(model, config, stats)
    assert {layer.name for layer in made} == {"experts.0", "experts.1", "experts.2"}
    assert made.unrouted == ("experts.2",)
    assert "other experts of their layer: experts.2" in str(made)
    together = tn.calibrate(model, batches[2:])
    assert together.columns["experts.0"] is together.columns["experts.1"]


def test_a_layer_that_reads_one_tensor_twice_counts_it_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.other = nn.Linear(8, 4), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + self.other(x) + self.layer(x)

    stats = tn.calibrate(Twice(), [(X, Y)])
    for name in ("layer", "other"):
        torch.testing.assert_close(stats.columns[name], X.T @ X / 32)


@pytest.mark.parametrize("method", ["svd", "gptq", "auto"])
@pytest.mark.parametrize("tiny", [1, 2])
def test_a_tiny_layer_stays_dense_and_the_others_keep_the_ratio(tiny: int, method: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 48), nn.Linear(48, tiny), nn.Linear(tiny, tiny), nn.Linear(tiny, 48), nn.Linear(48, 48)
    )
    config = tn.CompressionConfig(target_modules="all", param_ratio=0.5, method=method)
    report = tn.compress(model, config, calibration=[(X, torch.arange(32) % 48)], progress=False)
    assert report.plan["2"].topology is None
    assert report.plan["4"].topology is not None
    assert report.plan.params_after <= 0.5 * report.plan.params_before


MASK = torch.tensor([[True, True, True, True, True], [True, True, True, False, False]])


def of_heads(mask: Tensor, heads: int) -> Tensor:
    return mask[:, None].expand(-1, heads, -1)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((2, 5), MASK),
        ((5, 2), MASK.T),
        ((10,), MASK.reshape(-1)),
        ((2, 3, 5), of_heads(MASK, 3)),
        ((2, 5, 3), of_heads(MASK, 3).transpose(1, 2)),
        ((2, 1, 5), of_heads(MASK, 1)),
        ((10, 3), MASK.reshape(-1, 1).expand(-1, 3)),
        ((4, 6), None),
        ((5,), None),
        ((3, 7, 2), None),
    ],
)
def test_masks_find_rows_and_tokens(shape: tuple[int, ...], expected: Tensor | None) -> None:
    found = token_mask({"attention_mask": MASK.long()}, torch.Size(shape))
    assert (found is None) == (expected is None)
    if expected is not None:
        assert torch.equal(found, expected)  # type: ignore[arg-type]


class Heads(nn.Module):
    """Reads heads between rows and tokens, and tokens first."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.by_head = nn.Embedding(20, 6), nn.Linear(2, 2)
        self.tokens_first, self.head = nn.Linear(6, 6), nn.Linear(6, 20)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        x = self.table(input_ids)
        x = x + self.by_head(x.unflatten(-1, (3, 2)).transpose(1, 2)).transpose(1, 2).flatten(2)
        x = x + self.tokens_first(x.transpose(0, 1)).transpose(0, 1)
        logits = self.head(x)
        found = {"logits": logits}
        if labels is not None:
            found["loss"] = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return found


def test_padding_counts_for_nothing_in_any_layout() -> None:
    torch.manual_seed(0)
    model, ids = Heads(), torch.tensor([[5, 7, 9, 11, 13], [6, 8, 10, 0, 0]])
    padded = tn.calibrate(model, [{"input_ids": ids, "attention_mask": MASK.long()}])
    rows = [(ids[:1], MASK[:1]), (ids[1:, :3], MASK[1:, :3])]
    same(padded, tn.calibrate(model, [{"input_ids": x, "attention_mask": m.long()} for x, m in rows]))


class Writer(nn.Module):
    """A small causal model whose class name says nothing, with a loss of one convention or none."""

    def __init__(self, convention: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convention = convention
        self.table, self.head = nn.Embedding(20, 6), nn.Linear(6, 20)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.head(self.table(input_ids).cumsum(1))
        if labels is None or self.convention == "none":
            return {"logits": logits}
        scored, wanted = (logits[:, :-1], labels[:, 1:]) if "shifted" in self.convention else (logits, labels)
        smoothing = 0.1 if "smooth" in self.convention else 0.0
        loss = nn.functional.cross_entropy(
            scored.flatten(0, 1), wanted.flatten(), label_smoothing=smoothing, reduction="mean"
        )
        if "balanced" in self.convention:
            loss = loss + 3 * logits.square().mean()  # as routers add one
        return {"logits": logits, "loss": 2 * loss if "twice" in self.convention else loss}


IDS = torch.randint(20, (3, 7), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("convention", ["shifted", "in place", "smooth shifted", "balanced in place"])
def test_an_unknown_class_is_scored_by_its_own_loss(convention: str) -> None:
    model = Writer(convention)
    wanted = model(IDS, IDS)["loss"].item()
    for batch in ({"input_ids": IDS}, {"input_ids": IDS, "labels": IDS}):
        losses = label_losses(model, batch)
        assert losses.shape == (21,)
        assert losses.mean().item() == pytest.approx(wanted, rel=1e-5)
    stats = tn.calibrate(model, [IDS])
    assert (stats.loss, stats.scored) == (pytest.approx(wanted, rel=1e-5), 21)
    same(stats, tn.calibrate(model, [IDS], loss_fn=own_losses))
    against = losses_against(model)(Writer(convention), {"input_ids": IDS})
    assert against.mean().item() == pytest.approx(wanted, rel=1e-5)


class WriterForCausalLM(Writer):
    """The name of its class tells that labels are shifted."""


class WriterForMaskedLM(Writer):
    """The name of its class tells that labels are scored in their place."""


def test_an_unknown_class_without_a_loss_is_scored_as_documented() -> None:
    model, given = Writer("none"), {"input_ids": IDS, "labels": IDS.roll(-1, 1)}
    assert tn.calibrate(model, [given]).loss == pytest.approx(
        Writer("in place")(**given)["loss"].item(), rel=1e-5
    )
    found, expected = tn.calibrate(model, [IDS]), tn.calibrate(model, [IDS], loss_fn=output_losses)
    torch.testing.assert_close(found.rows, expected.rows)
    with pytest.raises(TargetError, match="loss_fn"):
        tn.calibrate(model, [{"input_ids": IDS, "labels": IDS}])


@pytest.mark.parametrize(("kind", "like"), [(WriterForCausalLM, "shifted"), (WriterForMaskedLM, "in place")])
def test_names_of_classes_tell_where_labels_are_scored(kind: type[Writer], like: str) -> None:
    wanted = Writer(like)(IDS, IDS)["loss"].item()
    assert tn.calibrate(kind("none"), [IDS]).loss == pytest.approx(wanted, rel=1e-5)


def test_perplexity_refuses_models_that_score_labels_in_their_place() -> None:
    from tensornet_hf.evaluate import perplexity

    found = perplexity(WriterForCausalLM("shifted"), IDS.flatten(), context=7)
    assert found.loss == pytest.approx(Writer("shifted")(IDS, IDS)["loss"].item(), rel=1e-5)
    with pytest.raises(TargetError, match="same position"):
        perplexity(WriterForMaskedLM("in place"), IDS.flatten(), context=7)


class Projector(nn.Module):
    """Returns vectors nobody labelled, as a tensor, a mapping or a tuple."""

    def __init__(self, form: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.form, self.first, self.second = form, nn.Linear(8, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> object:
        y = self.second(torch.tanh(self.first(x)))
        return {"tensor": y, "mapping": {"image": y, "inputs": x.long()}, "tuple": (y, None)}[self.form]


@pytest.mark.parametrize("form", ["tensor", "mapping", "tuple"])
def test_outputs_without_labels_are_judged_by_their_distance(form: str) -> None:
    model = Projector(form)
    stats = tn.calibrate(model, [X] * 40)
    y = Projector("tensor")(X)
    error = 1e-3 * torch.randn_like(model.second.weight)
    predicted = 0.5 * float(torch.trace(stats.rows["second"] @ error @ stats.columns["second"] @ error.T))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.second.weight += error
    measured = losses_against(model)(twin, {"x": X}).mean().item()
    moved = ((Projector("tensor")(X) - y) ** 2).sum()
    assert moved == 0
    assert predicted == pytest.approx(measured, rel=0.5)  # K-FAC takes inputs and gradients as independent
    assert math.isnan(stats.loss or 0)
    config = tn.CompressionConfig(target_modules="all", param_ratio=0.7)
    report = tn.compress(twin, config, calibration=[X], progress=False)
    assert report.plan.predicted_loss_increase > 0  # type: ignore[operator]
    before = losses_against(model)(twin, {"x": X}).mean().item()
    tn.heal(twin, model, [X], steps=40, lr=1e-2)
    assert losses_against(model)(twin, {"x": X}).mean().item() < before


@pytest.mark.parametrize("options", [{}, {"loss_fn": sampled_losses}], ids=["projected", "sampled"])
def test_draws_are_the_same_in_every_run(options: dict[str, Any]) -> None:
    model = Projector("tensor") if options else Projector("mapping")
    runs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        runs.append(tn.calibrate(model, [X, X], **options))
        assert torch.equal(torch.get_rng_state(), state)
    once = tn.calibrate(model, [X], **options)
    for name, moment in runs[0].rows.items():
        assert torch.equal(moment, runs[1].rows[name])
        assert not torch.allclose(moment, once.rows[name])  # a batch that comes again gets other draws


class Sentences(nn.Module):
    """Takes one mapping and returns it with more in it, as the models of sentence-transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.first, self.second = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 6)

    def forward(self, features: dict[str, Tensor], **kwargs: object) -> dict[str, Tensor]:
        hidden = torch.tanh(self.first(self.table(features["input_ids"])))
        weights = features["attention_mask"][..., None].float()
        mean = self.second((hidden * weights).sum(1) / weights.sum(1))
        features.update(token_embeddings=hidden, sentence_embedding=mean)
        return features


def test_models_that_map_a_mapping_to_a_mapping() -> None:
    model = Sentences()
    batch = {
        "input_ids": torch.tensor([[5, 7, 9], [6, 8, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
    }
    stats = tn.calibrate(model, [batch] * 4)
    assert list(batch) == ["input_ids", "attention_mask"]
    torch.testing.assert_close(stats.rows["table"].nonzero().flatten(), torch.tensor([5, 6, 7, 8, 9]))
    teacher = copy.deepcopy(model)
    config = tn.CompressionConfig(target_modules=["first", "second"], param_ratio=0.6)
    report = tn.compress(model, config, calibration=[batch] * 4, progress=False)
    assert report.plan.predicted_loss_increase > 0  # type: ignore[operator]
    tn.heal(model, teacher, [batch], steps=2)
