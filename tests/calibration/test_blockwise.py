"""Moments of one block at a time are those that calibration of the whole model collects."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from block_models import TwoReaders, perceptron
from hf_models import bert, gpt2, llama, qwen2, t5_relu
from mixture_models import mixture
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import tensornet as tn
from tensornet.calibration.batches import as_batch, first_rows
from tensornet.calibration.blockwise import inputs_by_block, moments_by_block
from tensornet.calibration.calibrate import MomentRecorder, observed
from tensornet.calibration.losses import default_losses
from tensornet.calibration.stats import CalibrationStats
from tensornet.calibration.walk import Walk, find_blocks, find_chains
from tensornet.errors import NonFiniteError
from tensornet_hf.embedded import calibration_text, gpt2_path

Batch = dict[str, Tensor]


class Conditioned(nn.Module):
    """Every block reads the hidden state and a second tensor, which an outer layer computes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.condition = nn.Linear(6, 8), nn.Linear(6, 8)
        self.blocks = nn.ModuleList(Gated() for _ in range(3))
        self.head = nn.Linear(8, 4)

    def forward(self, input: Tensor) -> Tensor:
        x, condition = self.first(input), self.condition(input)
        for block in self.blocks:
            x = block(x, condition)
        return self.head(x)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return x + torch.sigmoid(condition) * self.down(torch.relu(self.up(x)))


class Counting(nn.Module):
    """Looks like a chain, but what a block gets beside the hidden state depends on the blocks before."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Gated() for _ in range(3))
        self.head = nn.Linear(8, 4)

    def forward(self, input: Tensor) -> Tensor:
        x = torch.cat([input, input[..., :2]], -1)
        condition = x
        for block in self.blocks:
            last, x = x, block(x, condition)
            condition = x - last
        return self.head(x)


def text(rows: int = 3) -> Batch:
    ids = torch.randint(3, 101, (rows, 9))
    return {"input_ids": ids, "labels": ids}


def padded() -> Batch:
    batch = text()
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[1, 6:], mask[2, :4] = 0, 0
    return {**batch, "attention_mask": mask, "labels": batch["labels"].masked_fill(mask == 0, -100)}


def masked() -> Batch:
    batch = padded()
    return {**batch, "labels": batch["labels"].masked_fill(torch.rand(3, 9) < 0.5, -100)}


def vectors(*shape: int) -> Callable[[], Any]:
    return lambda: (torch.randn(5, *shape), torch.randint(4, (5,)))


def embedded() -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(gpt2_path())


def written() -> Batch:
    start = int(torch.randint(10_000, ()))
    ids = torch.tensor([list(calibration_text()[start : start + 24].encode())]) % 90 + 1
    return {"input_ids": ids, "labels": ids}


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 4)
    )


#: Models, one of their batches, and the number of their blocks; 0 means that the model is one block.
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], int]] = {
    "llama": (llama, text, 2),
    "llama, padded": (llama, padded, 2),
    "tied embedding": (qwen2, padded, 2),
    "trained GPT-2": (embedded, written, 4),
    "GPT-2, padded": (gpt2, padded, 2),
    "BERT, padded": (bert, masked, 2),
    "mixture": (lambda: mixture("mixtral"), padded, 2),
    "encoder and decoder": (t5_relu, text, 0),
    "a second argument of the blocks": (Conditioned, vectors(6), 0),
    "a second argument that depends on blocks": (Counting, vectors(6), 0),
    "one weight in two blocks": (TwoReaders, vectors(8), 3),
    "convolutional": (convolutional, vectors(2, 6, 6), 5),
    "sequence of layers": (perceptron, vectors(8), 5),
    "layer": (lambda: nn.Linear(6, 4), vectors(6), 0),
}


def gathered(
    model: nn.Module, batches: list[Any], *, full: bool, up_to: int = 8192, states: Any = None
) -> tuple[list[str], Mapping[str, CalibrationStats], CalibrationStats]:
    """Collect moments by block; returns the blocks, the statistics of each, and all of them together."""
    recorder = MomentRecorder(diagonal_gradients=not full, full_up_to=up_to)
    with observed(model, recorder, None):
        given = [as_batch(batch, model, torch.device("cpu")) for batch in batches]
        with recorder.paused(), torch.no_grad():
            loss_fn, _ = default_losses(model, first_rows(given[0], 1))
            names = find_blocks(model, first_rows(given[0], 1))
        walk = Walk(model, names, given, {} if states is None else states)
        found = dict(moments_by_block(walk, recorder, loss_fn))
    rows, columns, coherence, counts = (
        {name: x for stats in found.values() for name, x in getattr(stats, key).items()}
        for key in ("rows", "columns", "coherence", "counts")
    )
    (loss,) = {stats.loss for stats in found.values()}
    (scored,) = {stats.scored for stats in found.values()}
    together = CalibrationStats(
        rows, columns, max(counts.values()), loss, coherence=coherence, counts=counts, scored=scored
    )
    return list(names), found, together


@pytest.mark.parametrize("full", [True, False], ids=["full gradients", "diagonal"])
@pytest.mark.parametrize("case", CASES)
def test_moments_by_block_are_those_of_the_whole_model(case: str, full: bool) -> None:
    make, batch, blocks = CASES[case]
    torch.manual_seed(0)
    model, batches = make().eval(), [batch() for _ in range(3)]
    expected = tn.calibrate(model, batches, tokens=10_000)
    names, found, stats = gathered(model, batches, full=full)
    assert len(names) == blocks
    assert list(found) == [*reversed(names), ""]
    assert stats.loss == pytest.approx(expected.loss, rel=1e-5)
    assert (stats.tokens, stats.scored) == (expected.tokens, expected.scored)
    assert stats.counts == expected.counts
    assert stats.columns.keys() == expected.columns.keys()
    assert stats.rows.keys() == expected.rows.keys()
    for name, moment in expected.columns.items():
        assert stats.columns[name].shape == moment.shape
        scale = float(moment.abs().max())
        torch.testing.assert_close(stats.columns[name], moment, rtol=1e-3, atol=1e-4 * scale)
    tables = {name for name, x in model.named_modules() if isinstance(x, nn.Embedding)}
    for name, moment in expected.rows.items():
        diagonal = moment if full or name in tables or moment.ndim == 1 else moment.diagonal()
        assert stats.rows[name].shape == diagonal.shape
        scale = float(moment.abs().max())
        torch.testing.assert_close(stats.rows[name], diagonal, rtol=1e-3, atol=1e-4 * scale)
    if full:
        assert stats.coherence == pytest.approx(expected.coherence, rel=1e-2)


def test_every_item_has_the_layers_of_its_block_only() -> None:
    model = llama().eval()
    names, found, _ = gathered(model, [text()], full=False)
    for name in names:
        assert found[name].columns
        assert all(x.startswith(f"{name}.") for x in (*found[name].columns, *found[name].rows))
    assert set(found[""].rows) == {"model.embed_tokens", "lm_head"}


def test_layers_with_one_input_share_one_moment() -> None:
    _, found, _ = gathered(llama().eval(), [text()], full=False)
    columns = found["model.layers.1"].columns
    q, k, up, gate = (
        columns[f"model.layers.1.{x}_proj"] for x in ("self_attn.q", "self_attn.k", "mlp.up", "mlp.gate")
    )
    assert q is k
    assert up is gate
    assert q is not up


def test_moments_of_wide_inputs_are_diagonals() -> None:
    torch.manual_seed(0)
    model, batches = llama().eval(), [text()]
    _, _, full = gathered(model, batches, full=True)
    _, _, stats = gathered(model, batches, full=True, up_to=30)
    for name, moment in full.columns.items():
        wide = len(moment) > 30 and moment.ndim == 2
        torch.testing.assert_close(stats.columns[name], moment.diagonal() if wide else moment)
    assert stats.columns["model.layers.0.mlp.down_proj"].shape == (44,)


class Recorded(dict[Any, Tensor]):
    """A mapping that knows how many states it had at most, and what it was asked for."""

    most = 0

    def __setitem__(self, key: Any, value: Tensor) -> None:
        super().__setitem__(key, value.clone())
        self.most = max(self.most, len(self))


def test_states_may_be_in_another_mapping() -> None:
    torch.manual_seed(0)
    model, batches, states = llama().eval(), [text(), text()], Recorded()
    _, _, here = gathered(model, batches, full=False, states=states)
    _, _, there = gathered(model, batches, full=False)
    assert states.most >= 3 * 2  # before both blocks and behind them
    for name, moment in there.rows.items():
        torch.testing.assert_close(here.rows[name], moment)


@pytest.mark.parametrize("make", [llama, gpt2, bert, t5_relu, perceptron], ids=lambda x: x.__name__)
def test_moments_of_inputs_alone_come_from_the_first_block_to_the_last(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = make().eval()
    batches = [vectors(8)() if make is perceptron else padded() for _ in range(2)]
    recorder = MomentRecorder()
    expected = tn.calibrate(model, batches, tokens=10_000, gradients=False)
    with observed(model, recorder, None):
        given = [as_batch(batch, model, torch.device("cpu")) for batch in batches]
        with recorder.paused():
            names = find_blocks(model, first_rows(given[0], 1))
        found = dict(inputs_by_block(Walk(model, names, given), recorder))
    assert list(found) == [*names, ""]
    columns = {name: x for stats in found.values() for name, x in stats.columns.items()}
    rows = {name: x for stats in found.values() for name, x in stats.rows.items()}
    assert columns.keys() == expected.columns.keys()
    for name, moment in expected.columns.items():
        torch.testing.assert_close(columns[name], moment, rtol=1e-4, atol=1e-5 * float(moment.max()))
    assert rows.keys() == expected.rows.keys()
    for name, moment in expected.rows.items():
        torch.testing.assert_close(rows[name], moment)


def test_blocks_and_the_head_run_to_the_end_on_one_batch_only_if_inputs_alone_are_asked_for() -> None:
    model, runs = llama().eval(), []
    recorder, names = MomentRecorder(), ("model.layers.0", "model.layers.1")
    with observed(model, recorder, None):
        given = [as_batch(text(rows), model, torch.device("cpu")) for rows in (1, 2, 3)]
        last = [*(f"{name}.mlp.down_proj" for name in names), "lm_head"]
        for name in last:
            model.get_submodule(name).register_forward_hook(lambda *_, name=name: runs.append(name))
        found = dict(inputs_by_block(Walk(model, names, given), recorder))
    # Every batch also runs through the first block at the beginning, and through each block behind its item.
    assert Counter(runs) == dict(zip(last, (3 + 1 + 3, 1 + 3, 1), strict=True))
    tokens = sum(batch["input_ids"].numel() for batch in given)
    assert all(count == tokens for stats in found.values() for count in stats.counts.values())


class OneExpert(nn.Module):
    """Each batch is read by the expert of its first token; no head follows."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.block = nn.ModuleList([nn.Linear(4, 4)])

    def forward(self, input: Tensor) -> Tensor:
        x = self.block[0](input)
        for expert in self.experts if input[0, 0] > 0 else self.experts[:1]:
            x = expert(x)
        return x


class KeepsSigns(OneExpert):
    """A block with experts; all blocks use the same one for a batch."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).copysign(input)


class TwoBlocks(nn.Module):
    """Two blocks with experts."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(KeepsSigns() for _ in range(2))

    def forward(self, input: Tensor) -> Tensor:
        return self.layers[1](self.layers[0](input))


@pytest.mark.parametrize(
    ("make", "names"), [(OneExpert, ()), (TwoBlocks, ("layers.0", "layers.1"))], ids=["model", "blocks"]
)
def test_no_expert_loses_tokens_because_a_batch_ended_early(
    make: Callable[[], nn.Module], names: tuple[str, ...]
) -> None:
    model, recorder = make().eval(), MomentRecorder()
    with observed(model, recorder, None):
        given = [{"input": torch.full((3, 4), sign)} for sign in (-1.0, 1.0)]
        for name, stats in inputs_by_block(Walk(model, names, given), recorder):
            if name or not names:
                prefix = f"{name}." if name else ""
                assert [stats.counts[f"{prefix}experts.{k}"] for k in (0, 1)] == [6, 3]


class SkipsItsLast(nn.Module):
    """A block whose last layer is skipped for some batches."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.sometimes = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, input: Tensor) -> Tensor:
        x = self.always(input)
        return (self.sometimes(x) if input[0, 0] > 0 else x).copysign(input)


def test_a_layer_that_the_first_batch_skips_is_seen_later() -> None:
    model, recorder = nn.Sequential(SkipsItsLast(), SkipsItsLast()).eval(), MomentRecorder()
    with observed(model, recorder, None):
        given = [{"input": torch.full((3, 4), sign)} for sign in (-1.0, 1.0)]
        for name, stats in inputs_by_block(Walk(model, ("0", "1"), given), recorder):
            if name:
                assert [stats.counts[f"{name}.{x}"] for x in ("always", "sometimes")] == [6, 3]


def test_the_model_is_left_as_it_was() -> None:
    model = llama().train()
    model.lm_head.weight.requires_grad_(False)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    gathered(model, [text()], full=False)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert model.training
    assert [name for name, x in model.named_parameters() if not x.requires_grad] == ["lm_head.weight"]
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())


@pytest.mark.parametrize("place", ["first", "inside", "head"])
def test_moments_that_are_not_finite_name_the_layer(place: str) -> None:
    model = llama().eval()
    named = {
        "first": "model.layers.0.self_attn.q_proj",
        "inside": "model.layers.1.self_attn.q_proj",
        "head": "lm_head",
    }
    broken = {"first": model.model.embed_tokens, "inside": model.model.layers[0].mlp.down_proj}
    with torch.no_grad():
        broken.get(place, model.model.norm).weight.fill_(float("nan"))  # type: ignore[union-attr]
    recorder = MomentRecorder()
    with observed(model, recorder, None):
        given = [as_batch(text(), model, torch.device("cpu"))]
        names = ("model.layers.0", "model.layers.1")
        with pytest.raises(NonFiniteError, match=named[place]):
            list(inputs_by_block(Walk(model, names, given), recorder))


def test_what_looks_like_a_chain_but_is_none_is_one_block() -> None:
    """The replay skips all blocks but the first, so it cannot know what depends on the others."""
    torch.manual_seed(0)
    model = Counting().eval()
    batch = {"input": torch.randn(5, 6)}
    assert list(find_chains(model, batch)) == ["blocks"]
    assert find_blocks(model, batch) == ()


def test_one_block_gives_one_item() -> None:
    names, found, _ = gathered(t5_relu().eval(), [text()], full=False)
    assert names == []
    assert list(found) == [""]
