"""Every kind of stock layer keeps the laws of kinds; embeddings are recognised by what their forward does."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn
from transformers.models.bart.modeling_bart import BartLearnedPositionalEmbedding, BartScaledWordEmbedding
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

import tensornet as tn
import tensornet_hf  # noqa: F401 - registers Falcon's layers
from tensornet.nn.layer_kinds import Scale, ScaledEmbedding, embedding_scale, kind_of
from tensornet.testing import laws

FACTOR = 24**0.5  # not exact in 16 bits


class TestLinear(laws.LayerKindLaws):
    def layer(self) -> nn.Module:
        return nn.Linear(12, 20)

    def inputs(self, tokens: int) -> Tensor:
        return torch.randn(tokens, 12)


class TestFalcon(TestLinear):
    def layer(self) -> nn.Module:
        return FalconLinear(12, 20)


class TestConv1D(TestLinear):
    def layer(self) -> nn.Module:
        layer = Conv1D(20, 12)
        nn.init.normal_(layer.bias)
        return layer


class TestEmbedding(laws.LayerKindLaws):
    def layer(self) -> nn.Module:
        return nn.Embedding(30, 12, padding_idx=0)

    def inputs(self, tokens: int) -> Tensor:
        return torch.randint(30, (tokens,))


class TestConstantOfBart(TestEmbedding):
    def layer(self) -> nn.Module:
        return BartScaledWordEmbedding(30, 12, 0, FACTOR)


class TestConstantOfGemma(TestEmbedding):
    def layer(self) -> nn.Module:
        return Gemma3TextScaledWordEmbedding(30, 12, 0, FACTOR)


class TestScaledEmbedding(TestEmbedding):
    def layer(self) -> nn.Module:
        return ScaledEmbedding(30, 12, Scale(FACTOR, True), padding_idx=0)


SCALED = (BartScaledWordEmbedding, Gemma3TextScaledWordEmbedding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", SCALED)
def test_rows_are_multiplied_bit_for_bit_in_every_dtype(kind: type[nn.Embedding], dtype: torch.dtype) -> None:
    """The table is one core, so nothing else is rounded; the dtype changes before and after compression."""
    ids = torch.arange(30).reshape(5, 6)
    stock = kind(30, 12, 0, FACTOR)
    small = tn.nn.MPOEmbedding.from_embedding(stock, topology="dense")
    assert torch.equal(small.to(dtype)(ids), stock.to(dtype)(ids))
    again = tn.nn.MPOEmbedding.from_embedding(stock, topology="dense")
    assert torch.equal(again(ids), stock(ids))
    assert torch.equal(again.to_embedding()(ids), stock(ids))


def test_rows_are_multiplied_in_compiled_and_reconstructed_passes() -> None:
    ids, stock = torch.arange(30), Gemma3TextScaledWordEmbedding(30, 12, 0, FACTOR)
    small = tn.nn.MPOEmbedding.from_embedding(stock)
    compiled = torch.compile(small, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids), stock(ids))
    small.strategy = "reconstruct"
    torch.testing.assert_close(small(ids), stock(ids))


class Documented(nn.Embedding):
    factor = 3

    def forward(self, tokens: Tensor) -> Tensor:
        """Look up rows."""
        return super().forward(tokens) * self.factor


class Inherits(Documented):
    factor = 5


@pytest.mark.parametrize(("kind", "factor"), [(Documented, 3), (Inherits, 5)])
def test_the_code_of_forward_decides_not_the_name(kind: type[nn.Embedding], factor: int) -> None:
    assert embedding_scale(kind(8, 4)) == Scale(factor, False)


def traced(forward):  # type: ignore[no-untyped-def]
    @functools.wraps(forward)
    def wrapped(*args):  # type: ignore[no-untyped-def]
        return forward(*args) + 1

    return wrapped


class Wrapped(nn.Embedding):
    factor = 3

    @traced
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.factor


class Clamped(nn.Embedding):
    factor = 3

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids.clamp(min=1)) * self.factor


class Shifted(nn.Embedding):
    factor, shift = 3, 1

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.factor + self.shift


class OfAnother(Clamped):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.factor


class Trained(nn.Embedding):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.factor = nn.Parameter(torch.tensor(3.0))

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.factor


class Saved(Trained):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        del self.factor
        self.register_buffer("factor", torch.tensor(3.0))


class Columns(Trained):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        del self.factor
        self.register_buffer("factor", torch.ones(sizes[1]), persistent=False)


MADE = type(
    "Made", (nn.Embedding,), {"forward": eval("lambda self, ids: nn.Embedding.forward(self, ids) * 3")}
)
OTHERS = [Wrapped, Clamped, Shifted, OfAnother, Trained, Saved, Columns, MADE, BartLearnedPositionalEmbedding]


@pytest.mark.parametrize("kind", OTHERS)
def test_embeddings_that_compute_or_keep_anything_else_stay_dense(kind: type[nn.Embedding]) -> None:
    assert kind_of(kind(8, 4)) is None


def test_a_parametrized_embedding_stays_dense() -> None:
    assert kind_of(nn.utils.parametrizations.weight_norm(Documented(8, 4))) is None
