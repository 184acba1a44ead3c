"""Classifiers of text: labelled examples, and accuracy on them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from tensornet.context import in_eval_mode
from tensornet.errors import FormatError, TargetError
from tensornet_hf.evaluation.accuracy import Accuracy, accuracy_of, class_index, is_class_logits
from tensornet_hf.text.tokens import load_tokenizer, read_text, usual_context

_LONGEST = 512


def read_examples(path: Path, names: Mapping[int, str], *, key: str = "text") -> list[tuple[str, int]]:
    """Read labelled examples from a file of JSON lines, `{"text": ..., "label": ...}`.

    Args:
        path: of the file.
        names: of the classes by number; a label is such a name or number.
        key: of the example beside its label.

    Raises:
        FileNotFoundError, ValueError: as `read_text`.
        FormatError: a line of another form; the message gives its number.
    """
    found = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            example, label = entry[key], entry["label"]
            if not isinstance(example, str):
                raise TypeError(key)
        except (ValueError, KeyError, TypeError) as error:
            raise FormatError(
                f'{path}, line {number}: expected {{"{key}": "...", "label": ...}}, got {line[:80]!r}.'
            ) from error
        try:
            found.append((example, class_index(label, names)))
        except ValueError as error:
            raise FormatError(f"{path}, line {number}: {error}") from error
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
        TargetError: the model is not a classifier of texts.

    """
    tokenizer = load_tokenizer(folder)
    length = usual_context(model, limit=_LONGEST)
    found = []
    with in_eval_mode(model):
        for start in range(0, len(examples), batch_size):
            texts = [text for text, _ in examples[start : start + batch_size]]
            batch = tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
            logits = getattr(model(**batch.to(model.device)), "logits", None)
            if not is_class_logits(logits):
                raise TargetError(
                    f"{type(model).__name__} is not a classifier of texts, which --labels needs; measure "
                    "language models by --text or --tasks, encoders by --sentences, classifiers of images by "
                    "--images."
                )
            found.append(logits.float().cpu())
    return accuracy_of(torch.cat(found), torch.tensor([label for _, label in examples]))
