"""Windowed perplexity against a token-by-token truth, and the promises about its windows."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from hf_architectures import PAGE_ARCHITECTURES
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import Gemma3ForConditionalGeneration

from tensornet.calibration.losses import IGNORED
from tensornet.errors import NonFiniteError, ShapeError, TargetError
from tensornet_hf.evaluate import _quantile, divergence, perplexity, text_windows
from tensornet_hf.text import usual_context

VOCABULARY = 11


class TinyForCausalLM(nn.Module):
    """A causal model without a library: logits depend on the mean embedding of all tokens so far."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 6)
        self.head = nn.Linear(6, VOCABULARY)
        self.config = SimpleNamespace(max_position_embeddings=64, vocab_size=VOCABULARY)
        self.batches: list[tuple[int, ...]] = []

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        self.batches.append(tuple(input_ids.shape))
        total = self.embed(input_ids).cumsum(1)
        count = torch.arange(1, input_ids.shape[1] + 1)[None, :, None]
        return SimpleNamespace(logits=self.head(3 * total / count))


@pytest.fixture
def model() -> TinyForCausalLM:
    return TinyForCausalLM()


@torch.no_grad()
def slow_perplexity(
    model: TinyForCausalLM, tokens: Tensor, context: int, stride: int, bos: int | None = None
) -> tuple[float, int]:
    """Every token by a run of its own, over its prefix in the first window that holds both."""
    losses = []
    for position in range(1, len(tokens)):
        start = 0
        while position >= start + context:
            start += stride
        if position == start:
            continue  # first of its window: nothing to predict it from
        prefix = tokens[start:position].clone()
        prefix[0] = prefix[0] if bos is None else bos
        logits = model(prefix[None]).logits[0, -1]
        losses.append(-float(torch.log_softmax(logits.double(), 0)[tokens[position]]))
    return math.exp(sum(losses) / len(losses)), len(losses)


@pytest.mark.parametrize("length", [2, 7, 8, 9, 33, 50])
@pytest.mark.parametrize(("context", "stride"), [(8, 8), (8, 3), (8, 1), (2, 2), (2, 1), (60, 60)])
@pytest.mark.parametrize("bos", [None, 3])
def test_agrees_with_the_slow_truth(
    model: TinyForCausalLM, length: int, context: int, stride: int, bos: int | None
) -> None:
    tokens = torch.randint(VOCABULARY, (length,))
    truth, count = slow_perplexity(model, tokens, context, stride, bos)
    got = perplexity(model, tokens, context=context, stride=stride, batch_size=3, bos=bos)
    assert got.tokens == count
    assert got.perplexity == pytest.approx(truth, rel=1e-5)
    assert got.loss == pytest.approx(math.log(truth), rel=1e-5)


@given(length=st.integers(2, 200), context=st.integers(2, 40), data=st.data())
def test_windows_score_each_token_once(length: int, context: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, context))
    scored: list[int] = []
    for batch in text_windows(torch.arange(length), context=context, stride=stride, batch_size=3):
        assert batch["input_ids"].shape[1] <= context
        for labels in batch.get("labels", batch["input_ids"])[:, 1:]:  # the first has no predecessor
            scored += labels[labels != IGNORED].tolist()
    if stride < context:
        assert scored == list(range(1, length))
    else:
        assert scored == [t for t in range(length) if t % context != 0]


def test_states_how_it_was_measured_and_puts_the_training_flag_back(model: TinyForCausalLM) -> None:
    model.train()
    result = perplexity(model, torch.arange(40) % 11, context=16)
    assert model.training
    assert result.how == "37 tokens scored in 3 windows of 16, stride 16"


def test_bad_input(model: TinyForCausalLM) -> None:
    tokens = torch.arange(10)
    with pytest.raises(ShapeError, match="two token"):
        perplexity(model, tokens[:1], context=4)
    with pytest.raises(ShapeError, match="two token"):
        perplexity(model, tokens[None], context=4)
    with pytest.raises(ValueError, match=r"context 65.*64"):
        perplexity(model, tokens, context=65)
    for context in (1, 0, -3):
        with pytest.raises(ValueError, match="at least 2"):
            perplexity(model, tokens, context=context)
    with pytest.raises(ValueError, match=r"stride.*got 5"):
        perplexity(model, tokens, context=4, stride=5)
    with pytest.raises(ValueError, match="batch_size"):
        perplexity(model, tokens, context=4, batch_size=0)
    nn.init.constant_(model.head.bias, float("nan"))
    with pytest.raises(NonFiniteError, match="is nan"):
        perplexity(model, tokens, context=4)


@pytest.mark.parametrize(("context", "stride"), [(8, None), (8, 3)])
def test_divergence_of_every_prediction(model: TinyForCausalLM, context: int, stride: int | None) -> None:
    torch.manual_seed(2)
    other, tokens = TinyForCausalLM(), torch.randint(VOCABULARY, (41,))
    found = divergence(other, model, tokens, context=context, stride=stride, batch_size=2)
    divergences, same, increases = [], [], []
    with torch.no_grad():
        for batch in text_windows(tokens, context=context, stride=stride, batch_size=1):
            ids = batch["input_ids"]
            labels = batch.get("labels", ids)[0]
            for k in range(1, ids.shape[1]):
                if labels[k] != IGNORED:
                    p, q = (x(ids[:, :k]).logits[0, -1].double().softmax(-1) for x in (model, other))
                    divergences.append(float((p * (p / q).log()).sum()))
                    same.append(float(p.argmax() == q.argmax()))
                    increases.append(float((p[labels[k]] / q[labels[k]]).log()))
    truth = torch.tensor(divergences)
    measured = perplexity(other, tokens, context=context, stride=stride)
    assert found.perplexity.tokens == measured.tokens == len(truth)
    assert found.perplexity.loss == pytest.approx(measured.loss, rel=1e-6)
    assert found.mean[0] == pytest.approx(float(truth.mean()), rel=1e-4)
    assert found.mean[1] == pytest.approx(float(truth.std()) / len(truth) ** 0.5, rel=0.05)
    assert found.median[0] == pytest.approx(float(truth.quantile(0.5)), rel=1e-4)
    assert found.percentile_99[0] == pytest.approx(float(truth.quantile(0.99)), rel=1e-4)
    assert found.same_top[0] == pytest.approx(sum(same) / len(same))
    assert found.loss_increase[0] == pytest.approx(sum(increases) / len(increases), abs=1e-5)


def test_standard_error_of_a_quantile_is_its_spread() -> None:
    """Against the spread of independent medians."""
    generator = torch.Generator().manual_seed(0)
    found = [_quantile(torch.randn(400, generator=generator), 0.5) for _ in range(300)]
    spread = float(torch.tensor([value for value, _ in found]).std())
    assert sum(error for _, error in found) / 300 == pytest.approx(spread, rel=0.15)


def test_divergence_needs_one_vocabulary(model: TinyForCausalLM) -> None:
    other = TinyForCausalLM()
    other.head = nn.Linear(6, VOCABULARY + 1)
    with pytest.raises(TargetError, match="vocabular"):
        divergence(other, model, torch.arange(10), context=4)
    torch.nn.init.constant_(other.head.weight, float("nan"))
    with pytest.raises(NonFiniteError):
        divergence(other, other, torch.arange(10), context=4)


def test_sizes_of_the_text_model_count(model: TinyForCausalLM) -> None:
    """A configuration for images and text has those of the text model in a part of its own."""
    options = copy.deepcopy(dict(PAGE_ARCHITECTURES["Gemma 3"].options))
    options["text_config"] |= {"max_position_embeddings": 96, "vocab_size": 60_000}
    config = Gemma3ForConditionalGeneration.config_class(**options)
    with torch.device("meta"):
        assert usual_context(Gemma3ForConditionalGeneration(config)) == 96
    model.config = config
    perplexity(model, torch.arange(480) % VOCABULARY, context=96)
    assert model.batches == [(2, 96), (2, 96), (1, 96)]  # at most 16 million logits at once
    with pytest.raises(ValueError, match="96 positions"):
        perplexity(model, torch.arange(480) % VOCABULARY, context=97)
