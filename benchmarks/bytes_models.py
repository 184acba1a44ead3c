"""The models of `bytes.py`, with the windows they are calibrated, validated and judged on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from encoder import batches, paragraphs, spread
from real_data import prepare_models, read_text, token_windows
from torch import Tensor, nn

from tensornet.calibration import cosine_losses
from tensornet.calibration.losses import TokenLosses
from tensornet.nn.targets import LayerSelection
from tensornet_hf.embedded import calibration_text, gpt2_path, heldout_text

Batches = list[dict[str, Tensor]]


@dataclass(frozen=True)
class Subject:
    """Model with the texts on which it is calibrated, validated and judged.

    Args:
        name: in the record.
        folder: of the model.
        unit: of the loss.
        calibration: batches for a seed.
        judged: batches the loss is measured on.
        validation: batches that correct the forecast, by the name of their source.
        encoder: the loss is one minus the cosine of the pooled output.
        layers: those that are quantized; all linear ones but the output head by default.
        prompt: what a decoder goes on from in the sample of a row.
    """

    name: str
    folder: Path
    unit: str
    calibration: Callable[[int], Batches]
    judged: Batches
    validation: dict[str, Batches]
    encoder: bool = False
    layers: LayerSelection = field(default_factory=LayerSelection)
    prompt: str | None = None

    def load(self) -> Any:
        """Load the dense model in float32 and eval mode."""
        from transformers import AutoModel, AutoModelForCausalLM

        kind = AutoModel if self.encoder else AutoModelForCausalLM
        return kind.from_pretrained(self.folder, dtype=torch.float32).eval()

    @property
    def losses(self) -> TokenLosses | None:
        """Loss function for calibration; None for the loss of the labels."""
        return cosine_losses if self.encoder else None


def tokens_of(given: Batches) -> int:
    """Count the tokens that are not padding."""
    return sum(int(batch["attention_mask"].sum()) for batch in given)


def windows(ids: Tensor, size: int = 16) -> Batches:
    """Split windows of tokens into batches without padding."""
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(size)]


def drawn(text_ids: Tensor, length: int, count: int, seed: int) -> Tensor:
    """Draw windows that start anywhere in a text, shape `(count, length)`."""
    starts = torch.randint(
        len(text_ids) - length + 1, (count,), generator=torch.Generator().manual_seed(seed)
    )
    return torch.stack([text_ids[k : k + length] for k in starts.tolist()])


def gpt2(count: int = 500, limit: int | None = None, layers: LayerSelection | None = None) -> Subject:
    """Return the embedded GPT-2; every fourth held-out window corrects the forecast, the others judge.

    Args:
        count: calibration windows of 128 tokens.
        limit: characters of the texts, all by default.
        layers: to quantize.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gpt2_path())
    known = token_windows(tokenizer, calibration_text()[:limit], length=1).flatten()
    held = token_windows(tokenizer, heldout_text()[:limit], length=128)
    validation = torch.arange(len(held)) % 4 == 3
    return Subject(
        "gpt2",
        gpt2_path(),
        "nats a token",
        lambda seed: windows(drawn(known, 128, count, seed)),
        windows(held[~validation]),
        {"judged source": windows(held[validation])},
        layers=layers or LayerSelection(),
        prompt="When the program starts, it",
    )


def minilm(cache: Path, calibration: int = 512, judged: int = 400) -> Subject:
    """Return all-MiniLM-L6-v2, calibrated on Python tutorials and judged on the Debian handbook."""
    _, folder = prepare_models(cache)
    known, held, other = (
        paragraphs(read_text(cache / "texts", use)) for use in ("calibration", "heldout", "training")
    )
    chosen = spread(held, judged)
    left = [text for text in held if text not in set(chosen)]

    def observed(seed: int) -> Batches:
        order = torch.randperm(len(known), generator=torch.Generator().manual_seed(seed)).tolist()
        return batches(folder, [known[k] for k in order[:calibration]])

    return Subject(
        "minilm",
        folder,
        "1 - cosine",
        observed,
        batches(folder, chosen),
        {
            "judged source": batches(folder, spread(left, 128)),
            "other source": batches(folder, spread(other, 128)),
        },
        encoder=True,
        layers=LayerSelection(exclude_modules=("pooler.dense",)),  # not in the pooled output that counts
    )


def smollm2(cache: Path, calibration: int = 24, judged: int = 20) -> Subject:
    """Return SmolLM2-135M-Instruct with a rotated residual stream; texts as for MiniLM."""
    from transformers import AutoTokenizer

    folder, _ = prepare_models(cache)
    made = cache / "smollm2-turned"
    if not (made / "config.json").is_file():
        turn(folder, made)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    known, held, other = (
        token_windows(tokenizer, read_text(cache / "texts", use), length=512)
        for use in ("calibration", "heldout", "training")
    )
    places = torch.linspace(0, len(held) - 1, judged).long()
    left = torch.ones(len(held), dtype=torch.bool)
    left[places] = False

    def some(ids: Tensor, count: int) -> Batches:
        return windows(ids[torch.linspace(0, len(ids) - 1, count).long()], 2)

    return Subject(
        "smollm2",
        made,
        "nats a token",
        lambda seed: windows(drawn(known.flatten(), 512, calibration, seed), 2),
        windows(held[places], 2),
        {"judged source": some(held[left], 24), "other source": some(other, 24)},
        prompt="A computer needs an operating system because",
    )


@torch.no_grad()
def turn(folder: Path, destination: Path, seed: int = 0) -> None:
    """Save a Llama model whose residual stream is rotated by a random orthogonal matrix: the same function.

    The published file holds weights on a 4-bit grid, on which every integer baseline would be exact. Gains of
    norms are folded into the layers that read them, since only a norm without gains commutes with a rotation;
    the head then differs from the embedding, so that both are stored.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    body = model.model
    size = model.config.hidden_size
    noise = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    rotation = torch.linalg.qr(noise).Q
    model.config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(body.embed_tokens.weight.clone())

    def read(layer: nn.Linear, gain: Tensor) -> None:
        layer.weight.copy_((layer.weight.double() * gain.double()) @ rotation)

    def write(layer: nn.Linear) -> None:
        layer.weight.copy_(rotation.T @ layer.weight.double())

    body.embed_tokens.weight.copy_(body.embed_tokens.weight.double() @ rotation)
    for block in body.layers:
        attention, mlp = block.self_attn, block.mlp
        for layer in (attention.q_proj, attention.k_proj, attention.v_proj):
            read(layer, block.input_layernorm.weight)
        for layer in (mlp.gate_proj, mlp.up_proj):
            read(layer, block.post_attention_layernorm.weight)
        write(attention.o_proj)
        write(mlp.down_proj)
        block.input_layernorm.weight.fill_(1)
        block.post_attention_layernorm.weight.fill_(1)
    read(model.lm_head, body.norm.weight)
    body.norm.weight.fill_(1)
    model.save_pretrained(destination)
    AutoTokenizer.from_pretrained(folder).save_pretrained(destination)


@torch.no_grad()
def judge(subject: Subject, model: nn.Module, dense: list[Tensor]) -> Tensor:
    """Compute the loss of every judged token or, for an encoder, one minus the cosine to the dense output."""
    found = []
    for index, batch in enumerate(subject.judged):
        if subject.encoder:
            found.append(1 - (pooled(model, batch) * dense[index]).sum(1))
            continue
        logits = model(**batch).logits[:, :-1]
        labels = batch["input_ids"][:, 1:].flatten()
        found.append(nn.functional.cross_entropy(logits.flatten(0, 1), labels, reduction="none"))
    return torch.cat(found).double()


@torch.no_grad()
def pooled(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Compute mean-pooled unit vectors, shape `(texts, width)`."""
    hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None].to(hidden)
    return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


@torch.no_grad()
def sample(subject: Subject, model: Any, tokens: int = 40) -> str | None:
    """Continue the prompt with the likeliest token each time; None without a prompt."""
    from transformers import AutoTokenizer

    if subject.prompt is None:
        return None
    tokenizer = AutoTokenizer.from_pretrained(subject.folder)
    ids = tokenizer(subject.prompt, return_tensors="pt").input_ids
    written = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id or 0,
    )
    return str(tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True))
