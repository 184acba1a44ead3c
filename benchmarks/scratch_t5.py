"""A small T5 for moe_from_scratch.py: both stacks have the networks of a row, and it learns to restore spans.

Of each window of text 15 % is cut out in spans of three tokens on average. The encoder reads what is left,
with one marker for each span; the decoder writes the spans, each after its marker. All windows have as many
spans and as many tokens in them, so that nothing is padded.

Reference:
    Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer",
    section 3.3.4.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from scratch_rows import KINDS, Row, Sizes
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

CUT, SPAN = 0.15, 3.0


def spans_of(context: int) -> tuple[int, int]:
    """Count the tokens that are cut out of a window, and the spans they form."""
    cut = max(1, round(CUT * context))
    return cut, max(1, round(cut / SPAN))


def corrupt(windows: Tensor, sizes: Sizes, generator: torch.Generator) -> Tensor:
    """Cut spans out of windows.

    The end token is number `vocabulary`, the marker of span `k` number `vocabulary + 1 + k`.

    Args:
        windows: of text, shape `(windows, context)` or longer, of which the rest is left out.
        sizes: give the context and the vocabulary of the text.
        generator: decides where the spans lie.

    Returns:
        Inputs of the encoder and, behind them, what the decoder is to write; both end with the end token.
        Shape `(windows, context + 2 * spans + 2)`.
    """
    text = windows[:, : sizes.context].long()
    count, (cut, spans) = len(text), spans_of(sizes.context)
    # A window is kept text, span, kept text, span, ...: pieces at even and odd places of `lengths`.
    lengths = torch.stack(
        [_pieces(total, spans, count, generator) for total in (sizes.context - cut, cut)], dim=2
    ).flatten(1)
    ends = lengths.cumsum(1)
    piece = torch.searchsorted(ends, torch.arange(sizes.context).expand(count, -1).contiguous(), right=True)
    first = torch.zeros_like(text, dtype=torch.bool).scatter_(1, ends[:, :-1], True)
    first[:, 0] = True
    marker, in_span = sizes.vocabulary + 1 + piece // 2, piece % 2 == 1
    end = text.new_full((count, 1), sizes.vocabulary)

    def side(masked: Tensor) -> Tensor:
        """Put one marker in place of each masked piece."""
        return torch.where(masked, marker, text)[~masked | first].reshape(count, -1)

    return torch.cat([side(in_span), end, side(~in_span), end], dim=1)


def _pieces(total: int, pieces: int, rows: int, generator: torch.Generator) -> Tensor:
    """Divide a length at random into pieces of at least one, shape `(rows, pieces)`."""
    order = torch.rand(rows, total - 1, generator=generator).argsort(1)[:, : pieces - 1] + 1
    bounds = torch.nn.functional.pad(order.sort(1).values, (1, 0), value=0)
    return torch.diff(torch.nn.functional.pad(bounds, (0, 1), value=total), dim=1)


def batch_generator(seed: int, step: int) -> torch.Generator:
    """Return the generator of a training step: the spans are a function of seed and step."""
    # The generator reads 32 bits of its seed. Held-out examples have number 0.
    return torch.Generator().manual_seed(10_000_019 * seed + step + 1)


def span_loss(model: nn.Module, batch: Tensor, sizes: Sizes) -> Tensor:
    """Mean loss of a token that the decoder writes, in nats."""
    cut, spans = spans_of(sizes.context)
    inputs, targets = batch.split([sizes.context - cut + spans + 1, cut + spans + 1], dim=1)
    found: Tensor = model(input_ids=inputs, labels=targets.contiguous()).loss
    return found


def build_t5(row: Row, sizes: Sizes, *, seed: int) -> T5ForConditionalGeneration:
    """Build the model of a row, as deep in the encoder as in the decoder, with the networks of the row."""
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=sizes.vocabulary + 1 + spans_of(sizes.context)[1],
        d_model=sizes.width,
        d_kv=sizes.width // sizes.heads,
        d_ff=sizes.hidden,
        num_layers=sizes.layers,
        num_heads=sizes.heads,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        eos_token_id=sizes.vocabulary,
        use_cache=False,
    )
    model = T5ForConditionalGeneration(config)
    deep = replace(sizes, layers=2 * sizes.layers)
    networks, owner = KINDS[row.kind](row, deep, torch.Generator().manual_seed(seed + 1))
    if owner is not None:
        model.add_module("owner", owner)
    for layer, network in zip(_feed_forward_layers(model), networks, strict=True):
        layer.DenseReluDense = network
    return model


def t5_networks(model: nn.Module) -> list[nn.Module]:
    """List the feed-forward networks of both stacks in order."""
    return [layer.DenseReluDense for layer in _feed_forward_layers(model)]


def _feed_forward_layers(model: nn.Module) -> list[nn.Module]:
    assert isinstance(model, T5ForConditionalGeneration)
    return [block.layer[-1] for stack in (model.encoder, model.decoder) for block in stack.block]
