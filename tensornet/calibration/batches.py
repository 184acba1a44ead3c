"""Conversion of data batches to the arguments of a model."""

import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_origin

import torch
from torch import Tensor, nn

from tensornet._util import unwrapped
from tensornet.errors import TargetError

#: Keyword arguments of a model. `"labels"` may be there for the loss alone.
Batch = Mapping[str, Any]
#: What callers may pass for one: see `as_batch`.
BatchLike = Batch | Tensor | Sequence[Any]

#: Label of a position that has no loss.
IGNORED = -100
#: Dtypes of labels that no loss takes, though models take such indices of tokens.
_SHORT = (torch.int32, torch.int16, torch.int8, torch.uint8)
#: First argument of a model that does not name it.
_FIRST = "input_ids"
#: Annotations of an argument that is a mapping, as text.
_MAPPINGS = re.compile(r"(typing\.|t\.)?(dict|Dict|Mapping|MutableMapping)\b")
_FORMS = (
    "a mapping of model arguments, a tensor for the first of them, or a pair (inputs, labels) as a "
    "DataLoader gives it"
)


def check_batches(batches: Any, who: str) -> None:
    """Raise TargetError for a single batch, or for batches that cannot be iterated over.

    Raises:
        TargetError: another type; the message shows it.
    """
    if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
        raise TargetError(
            f"{who} takes an iterable of batches, got {type(batches).__name__}; pass a list, [batch]."
        )


def as_batch(given: BatchLike, model: nn.Module, device: torch.device) -> Batch:
    """Convert a batch to keyword arguments on a device.

    Args:
        given: keyword arguments (a Hugging Face batch); or a tensor, which is the model's first argument; or
            `(inputs, labels)`, with inputs in either form.
        model: whose `forward` names the arguments.
        device: where tensors go.

    Raises:
        TargetError: it has another form, or token indices come without rows.
    """
    if isinstance(given, list | tuple) and len(given) in (1, 2) and isinstance(given[0], Tensor | Mapping):
        batch = dict(as_batch(given[0], model, device))
        if len(given) == 2:
            batch["labels"] = given[1]
    elif isinstance(given, Tensor):
        name = _first_argument(model)
        if name == _FIRST and given.ndim < 2:
            raise TargetError(
                f"A tensor of token indices has shape (rows, tokens), got {tuple(given.shape)}; a single row "
                "is given as row[None]."
            )
        batch = {name: given}
    elif isinstance(given, Mapping):
        batch = dict(given)
    else:
        raise TargetError(f"A batch is {_FORMS}; got {_described(given)}.")
    if isinstance(labels := batch.get("labels"), Tensor) and labels.dtype in _SHORT:
        batch["labels"] = labels.long()  # losses take no other integers
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


def fullest_row(batch: Batch) -> Batch:
    """Select the row with most labels of a batch of token indices without padding, to try a model on.

    Returns:
        The batch itself where some value is not a tensor of the shape `(rows, tokens)` of the token indices,
        or some tokens are padding, which is recognised by all rows together.

    Example:
        >>> from tensornet.calibration.batches import fullest_row
        >>> ids, labels = torch.tensor([[1, 2], [3, 4]]), torch.tensor([[-100, 2], [3, 4]])
        >>> fullest_row({"input_ids": ids, "labels": labels})["input_ids"].tolist()
        [[3, 4]]
    """
    ids = batch.get(_FIRST)
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        return batch
    if any(not isinstance(value, Tensor) or value.shape != ids.shape for value in batch.values()):
        return batch
    if "attention_mask" in batch and not bool(batch["attention_mask"].all()):
        return batch
    place = int((batch["labels"] != IGNORED).sum(1).argmax()) if "labels" in batch else 0
    return {name: value[place : place + 1] for name, value in batch.items()}


def run_model(model: nn.Module, batch: Batch) -> Any:
    """Run the model on a batch, without the labels that its `forward` does not take.

    A model whose first argument is annotated as a mapping (`features: dict[str, Tensor]`) is given the batch
    as that one argument, a copy without labels.

    Raises:
        TargetError: the batch has another argument that `forward` does not take.
    """
    names, any_name = _arguments(model)
    if (whole := _mapping_argument(model)) is not None and whole not in batch:
        return model({name: value for name, value in batch.items() if name != "labels"})
    if not any_name and (unknown := [name for name in batch if name not in names]):
        if unknown != ["labels"]:
            unknown = [name for name in unknown if name != "labels"]
            raise TargetError(
                f"{type(model).__name__}.forward takes no {', '.join(unknown)}; its arguments are "
                f"{', '.join(names) or 'none'}. A batch is {_FORMS}."
            )
        batch = {name: value for name, value in batch.items() if name != "labels"}
    return model(**batch)


def takes_labels(model: nn.Module) -> bool:
    """Return True if `forward` takes an argument `labels`, or any keyword."""
    names, any_name = _arguments(model)
    return _mapping_argument(model) is None and (any_name or "labels" in names)


def _mapping_argument(model: nn.Module) -> str | None:
    """Return the name of the first argument of a model that takes one mapping; None for other models."""
    first = next(iter(inspect.signature(unwrapped(model).forward).parameters.values()), None)
    if first is None or first.annotation is first.empty:
        return None
    kind = first.annotation
    if isinstance(kind, str):  # of a module that puts off the evaluation of annotations
        return first.name if _MAPPINGS.match(kind) else None
    kind = get_origin(kind) or kind
    return first.name if isinstance(kind, type) and issubclass(kind, Mapping) else None


def _arguments(model: nn.Module) -> tuple[list[str], bool]:
    """Return the keywords that `forward` names, and True if it takes any other keyword as well."""
    kinds = inspect.signature(unwrapped(model).forward).parameters
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return (
        [name for name, parameter in kinds.items() if parameter.kind in by_name],
        any(parameter.kind == inspect.Parameter.VAR_KEYWORD for parameter in kinds.values()),
    )


def _first_argument(model: nn.Module) -> str:
    names, _ = _arguments(model)
    return names[0] if names else _FIRST


def _described(given: Any) -> str:
    if isinstance(given, list | tuple):
        return f"a {type(given).__name__} of {', '.join(type(x).__name__ for x in given) or 'nothing'}"
    return f"a {type(given).__name__}"
