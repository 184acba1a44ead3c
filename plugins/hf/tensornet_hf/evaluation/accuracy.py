"""Accuracy of classifiers: the score, and labels by name or number."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeGuard

from torch import Tensor, nn

#: Classes from which on the five likeliest are scored too, and how many a message lists.
_TOP, _SHOWN = 5, 8


@dataclass(frozen=True)
class Accuracy:
    """Accuracy of a classifier.

    Args:
        accuracy: share of examples whose likeliest class is the label (top-1).
        loss: mean cross-entropy in nats.
        examples: how many there are.
        top5: share of examples whose label is among the five likeliest classes; None for models of at most
            five classes, where it is 1.
    """

    accuracy: float
    loss: float
    examples: int
    top5: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON-ready form."""
        return asdict(self)


def accuracy_of(logits: Tensor, labels: Tensor) -> Accuracy:
    """Score logits against labels.

    Args:
        logits: shape `(examples, classes)`.
        labels: numbers of the classes, shape `(examples,)`.

    Example:
        >>> import torch
        >>> from tensornet_hf.evaluation.accuracy import accuracy_of
        >>> accuracy_of(torch.eye(3), torch.tensor([0, 1, 0])).accuracy
        0.6666666666666666
    """
    examples, classes = logits.shape
    right = int((logits.argmax(-1) == labels).sum())
    loss = float(nn.functional.cross_entropy(logits.double(), labels))
    top5 = None
    if classes > _TOP:
        among = logits.topk(_TOP, dim=-1).indices == labels[:, None]
        top5 = int(among.any(-1).sum()) / examples
    return Accuracy(right / examples, loss, examples, top5)


def class_index(label: object, names: Mapping[int, str]) -> int:
    """Return the number of a class that is given by name or by number.

    Args:
        label: name, or number.
        names: of the classes by number, as in `model.config.id2label`.

    Raises:
        ValueError: not among the classes, or a name that several of them have.

    Example:
        >>> from tensornet_hf.evaluation.accuracy import class_index
        >>> class_index("wet", {0: "dry", 1: "wet"})
        1
    """
    if type(label) is int and label in names:
        return label
    found = [index for index, name in names.items() if name == label]
    if len(found) > 1:
        raise ValueError(f"label {label!r} names classes {', '.join(map(str, found))}: write the number.")
    if not found:
        known = ", ".join(f"{name} ({index})" for index, name in list(names.items())[:_SHOWN])
        more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
        raise ValueError(f"label {label!r} is not a class; the model has {known}{more}.")
    return found[0]


def is_class_logits(logits: object) -> TypeGuard[Tensor]:
    """Return True for logits of shape `(rows, classes)`, of two classes at least.

    Example:
        >>> import torch
        >>> from tensornet_hf.evaluation.accuracy import is_class_logits
        >>> is_class_logits(torch.ones(4, 3)), is_class_logits(torch.ones(4, 7, 3)), is_class_logits(None)
        (True, False, False)
    """
    return isinstance(logits, Tensor) and logits.ndim == 2 and logits.shape[1] >= 2
