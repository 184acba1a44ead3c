"""Sentence encoders: cosine with a reference model, and retrieval of one half of a pair by the other."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tensornet.calibration.losses import pooled
from tensornet.context import in_eval_mode
from tensornet.errors import FormatError, TargetError
from tensornet_hf.text.tokens import load_tokenizer, read_text, usual_context

#: Longest sentence, in tokens; longer ones are truncated.
_LONGEST = 512


@dataclass(frozen=True)
class EncoderScores:
    """Scores of a sentence encoder.

    Args:
        sentences: how many were read, both halves of pairs counted.
        cosine: mean cosine with the outputs of the reference model, None without one.
        hits: share of first halves whose own second half is the nearest of all, None without pairs.
        reciprocal_rank: mean reciprocal rank of the own second half, likewise.
    """

    sentences: int
    cosine: float | None = None
    hits: float | None = None
    reciprocal_rank: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON-ready form."""
        return asdict(self)


def read_sentences(path: Path) -> list[tuple[str, ...]]:
    """Read one sentence a line, or pairs separated by a tab.

    Raises:
        FileNotFoundError, ValueError: as `read_text`.
        FormatError: some lines are pairs and some are not.
    """
    lines = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    found = [tuple(part.strip() for part in line.split("\t")) for line in lines]
    size = len(found[0])
    for number, parts in enumerate(found, start=1):
        if len(parts) != size or size > 2 or not all(parts):
            raise FormatError(
                f"{path}, sentence {number}: {len(parts)} parts, where the first has {size}; write one "
                "sentence a line, or two separated by a tab in every line."
            )
    return found


def measure_encoder(
    model: PreTrainedModel,
    folder: Path,
    sentences: Sequence[tuple[str, ...]],
    *,
    reference: tuple[PreTrainedModel, Path] | None = None,
    batch_size: int = 16,
) -> EncoderScores:
    """Measure a sentence encoder on sentences or pairs of them.

    Outputs are pooled as the model says, else the mean over tokens, and normalized.

    Args:
        model: returns hidden states.
        folder: holds its tokenizer.
        sentences: tuples of one, or of two that belong together.
        reference: dense model and its folder.
        batch_size: sentences run at once.

    Raises:
        TargetError: the model returns no hidden states, or there is nothing to measure: single sentences
            without a reference.
    """
    pairs = len(sentences[0]) == 2
    if not pairs and reference is None:
        raise TargetError(
            "Single sentences say nothing by themselves: give a reference model (--reference DENSE) for the "
            "cosine of both outputs, or pairs, separated by a tab, for retrieval."
        )
    flat = [part for parts in zip(*sentences, strict=True) for part in parts]
    found = embed(model, folder, flat, batch_size=batch_size)
    cosine = hits = rank = None
    if reference is not None:
        wanted = embed(*reference, flat, batch_size=batch_size)
        if wanted.shape != found.shape:
            raise TargetError(
                f"The reference model returns {wanted.shape[1]} numbers for a sentence, this one "
                f"{found.shape[1]}: it is another model."
            )
        cosine = float((found * wanted).sum(-1).mean())
    if pairs:
        first, second = found.chunk(2)
        likeness = first @ second.T
        ranks = (likeness > likeness.diagonal()[:, None]).sum(1) + 1
        hits, rank = float((ranks == 1).double().mean()), float((1 / ranks).double().mean())
    return EncoderScores(len(flat), cosine, hits, rank)


@torch.no_grad()
def embed(model: PreTrainedModel, folder: Path, sentences: Sequence[str], *, batch_size: int = 16) -> Tensor:
    """Return one unit vector for each sentence, shape `(sentences, width)`.

    Raises:
        TargetError: the model returns no hidden states.
    """
    tokenizer = load_tokenizer(folder)
    length = usual_context(model, limit=_LONGEST)
    found = []
    with in_eval_mode(model):
        for start in range(0, len(sentences), batch_size):
            batch = dict(
                tokenizer(
                    list(sentences[start : start + batch_size]),
                    padding=True,
                    truncation=True,
                    max_length=length,
                    return_tensors="pt",
                ).to(model.device)
            )
            output = model(**batch)
            if getattr(output, "last_hidden_state", None) is None:
                raise TargetError(
                    f"{type(model).__name__} returns no hidden states: it is not an encoder of sentences. "
                    "Measure language models by --text or --tasks, classifiers by --labels."
                )
            found.append(pooled(output, batch))
    return torch.cat(found)
