"""Accuracy of classifiers of text on labelled examples."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from tensornet.context import in_eval_mode
from tensornet.errors import FormatError, TargetError
from tensornet_hf.text.tokens import load_tokenizer, read_text, usual_context

_LONGEST = 512


@dataclass(frozen=True)
class Accuracy:
    """Accuracy of a classifier.

    Args:
        accuracy: share of examples whose likeliest class is the label.
        loss: mean cross-entropy in nats.
        examples: how many there are.
    """

    accuracy: float
    loss: float
    examples: int

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON-ready form."""
        return asdict(self)


def read_examples(path: Path, names: Mapping[str, int]) -> list[tuple[str, int]]:
    """Read labelled texts from a file of JSON lines, `{"text": ..., "label": ...}`.

    Args:
        path: of the file.
        names: classes by name; a label is such a name, or a number.

    Raises:
        FileNotFoundError, ValueError: as `read_text`.
        FormatError: naming the line that is something else.
    """
    found = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            text, label = entry["text"], entry["label"]
        except (ValueError, KeyError, TypeError) as error:
            raise FormatError(
                f'{path}, line {number}: expected {{"text": ..., "label": ...}}, got {line[:80]!r}.'
            ) from error
        index = names.get(label) if isinstance(label, str) else label
        if not isinstance(text, str) or type(index) is not int or index not in names.values():
            known = ", ".join(f"{name} ({value})" for name, value in list(names.items())[:8])
            raise FormatError(f"{path}, line {number}: label {label!r} is no class; the model has {known}.")
        found.append((text, index))
    return found


@torch.no_grad()
def measure_accuracy(
    model: PreTrainedModel, folder: Path, examples: Sequence[tuple[str, int]], *, batch_size: int = 16
) -> Accuracy:
    """Measure the accuracy of a classifier of texts.

    Args:
        model: returns logits of shape `(rows, classes)`.
        folder: holds its tokenizer.
        examples: texts with the numbers of their classes.
        batch_size: texts run at once.

    Raises:
        TargetError: the model is no classifier of texts.

    """
    tokenizer = load_tokenizer(folder)
    length = usual_context(model, limit=_LONGEST)
    right, loss = 0, 0.0
    with in_eval_mode(model):
        for start in range(0, len(examples), batch_size):
            texts, labels = zip(*examples[start : start + batch_size], strict=True)
            batch = tokenizer(
                list(texts), padding=True, truncation=True, max_length=length, return_tensors="pt"
            ).to(model.device)
            logits = getattr(model(**batch), "logits", None)
            if logits is None or logits.ndim != 2 or logits.shape[1] < 2:
                raise TargetError(
                    f"{type(model).__name__} is no classifier of texts, which --labels needs; measure "
                    "language models by --text or --tasks, encoders by --sentences."
                )
            wanted = torch.tensor(labels, device=logits.device)
            right += int((logits.argmax(-1) == wanted).sum())
            loss += float(nn.functional.cross_entropy(logits.float(), wanted, reduction="sum"))
    return Accuracy(right / len(examples), loss / len(examples), len(examples))
