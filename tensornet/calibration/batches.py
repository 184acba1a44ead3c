"""Convert batches to the arguments of a model, find padding, and select rows to measure losses on."""

import inspect
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from operator import length_hint
from typing import Any, Literal, get_origin

import torch
from torch import Tensor, nn

from tensornet._util import unwrapped
from tensornet.errors import TargetError

#: Keyword arguments of a model. The entry `"labels"` may be meant only for the loss.
Batch = Mapping[str, Any]
#: Forms in which callers may pass a batch (see `as_batch`).
BatchLike = Batch | Tensor | Sequence[Any]

#: Label of a position that has no loss.
IGNORED = -100
#: Dtypes that models accept for token indices, but that losses do not accept for labels.
_SHORT = (torch.int32, torch.int16, torch.int8, torch.uint8)
#: Name that is assumed for a model's first argument if the `forward` of the model names no arguments.
_FIRST = "input_ids"
#: Pattern for string annotations of arguments that are mappings.
_MAPPINGS = re.compile(r"(typing\.|t\.)?(dict|Dict|Mapping|MutableMapping)\b")
_FORMS = (
    "a mapping of model arguments, a tensor for the first of them, or a pair (inputs, labels) as a "
    "DataLoader gives it"
)


def check_batches(batches: Any, who: str) -> None:
    """Check that `batches` is an iterable of batches.

    Args:
        batches: the argument of a caller.
        who: name of the called function, for the message.

    Raises:
        TargetError: `batches` is a single batch or not iterable; the message shows its type.
    """
    if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
        raise TargetError(
            f"{who} takes an iterable of batches, got {type(batches).__name__}; pass a list, [batch]."
        )


def as_batch(given: BatchLike, model: nn.Module, device: torch.device) -> Batch:
    """Convert a batch to keyword arguments on a device.

    Args:
        given: one of three forms. A mapping of keyword arguments (a Hugging Face batch); a tensor, the first
            argument of the model; or a pair `(inputs, labels)`, with inputs in one of the first two forms.
        model: the model; the signature of its `forward` gives the name of the first argument.
        device: device to which tensors are moved.

    Raises:
        TargetError: the batch has another form, or token indices have only one dimension.
    """
    if isinstance(given, list | tuple) and len(given) in (1, 2) and isinstance(given[0], Tensor | Mapping):
        batch = dict(as_batch(given[0], model, device))
        if len(given) == 2:
            batch["labels"] = given[1]
    elif isinstance(given, Tensor):
        names, _ = _arguments(model)
        name = names[0] if names else _FIRST
        if name == _FIRST and given.ndim < 2:
            raise TargetError(
                f"A tensor of token indices must have shape (rows, tokens), got {tuple(given.shape)}; pass a "
                "single row as row[None]."
            )
        batch = {name: given}
    elif isinstance(given, Mapping):
        batch = dict(given)
    else:
        raise TargetError(f"A batch must be {_FORMS}; got {_described(given)}.")
    if isinstance(labels := batch.get("labels"), Tensor) and labels.dtype in _SHORT:
        batch["labels"] = labels.long()  # losses accept only int64
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


class Stop(Exception):
    """Exception that ends a forward pass early, when its remaining results are not needed."""


def run_model(model: nn.Module, batch: Batch) -> Any:
    """Run the model on a batch; labels are dropped if its `forward` does not take them.

    If the first argument of the model is annotated as a mapping (`features: dict[str, Tensor]`), a copy of
    the batch without labels is passed as this one argument.

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
                f"{', '.join(names) or 'none'}. A batch must be {_FORMS}."
            )
        batch = {name: value for name, value in batch.items() if name != "labels"}
    return model(**batch)


def takes_labels(model: nn.Module) -> bool:
    """Return True if `forward` takes an argument `labels`, or arbitrary keyword arguments."""
    names, any_name = _arguments(model)
    return _mapping_argument(model) is None and (any_name or "labels" in names)


def _mapping_argument(model: nn.Module) -> str | None:
    """Return the name of a model's first argument if it is annotated as a mapping; else None."""
    first = next(iter(inspect.signature(unwrapped(model).forward).parameters.values()), None)
    if first is None or first.annotation is first.empty:
        return None
    kind = first.annotation
    if isinstance(kind, str):  # annotations are strings under `from __future__ import annotations`
        return first.name if _MAPPINGS.match(kind) else None
    kind = get_origin(kind) or kind
    return first.name if isinstance(kind, type) and issubclass(kind, Mapping) else None


def _arguments(model: nn.Module) -> tuple[list[str], bool]:
    """Return the names of the arguments of `forward`, and whether it also takes arbitrary keywords."""
    kinds = inspect.signature(unwrapped(model).forward).parameters
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return (
        [name for name, parameter in kinds.items() if parameter.kind in by_name],
        any(parameter.kind == inspect.Parameter.VAR_KEYWORD for parameter in kinds.values()),
    )


def _described(given: Any) -> str:
    if isinstance(given, list | tuple):
        return f"a {type(given).__name__} of {', '.join(type(x).__name__ for x in given) or 'nothing'}"
    return f"a {type(given).__name__}"


def token_mask(batch: Batch, shape: torch.Size) -> Tensor | None:
    """Find the positions of a tensor inside a model that are tokens and not padding.

    Padding is read from `attention_mask` and `decoder_attention_mask`; a position counts as a token if either
    mask is set. A label of -100 marks a token without a loss, not padding; most tokens in masked language
    modelling have this label. There is one exception: if a decoder gets its tokens as labels, positions after
    the last label of a row are padding.

    The mask is matched to the tensor by sizes: `(rows, tokens, ...)`, `(rows * tokens, ...)`, `(tokens, rows,
    ...)` or `(rows, heads, tokens)`, in this order. Tensors of other sizes get no mask, so that their padding
    counts as tokens. So do, for example, the tokens that a router selected for an expert.

    Args:
        batch: arguments of the model.
        shape: shape of the tensor without its last dimension, the features.

    Returns:
        A mask of this shape, True at tokens; None if no padding is known.
    """
    masks: dict[torch.Size, Tensor] = {}
    for name in ("attention_mask", "decoder_attention_mask"):
        if isinstance(mask := batch.get(name), Tensor) and mask.ndim == 2:
            masks[mask.shape] = mask.bool() | masks.get(mask.shape, torch.zeros_like(mask.bool()))
    for mask in masks.values():
        if (found := _placed(mask, shape)) is not None:
            return found
    ended = _ended_labels(batch)
    return None if ended is None else _placed(ended, shape)


def _placed(mask: Tensor, shape: torch.Size) -> Tensor | None:
    """Broadcast a mask `(rows, tokens)` to a shape (see `token_mask`); None if the sizes do not fit."""
    rows, tokens = mask.shape
    layout = token_layout(shape, rows, {tokens})
    if layout is None:
        return None
    rest = [1] * (len(shape) - 2)
    if layout == "merged":
        mask = mask.reshape(-1, *[1] * (len(shape) - 1))
    elif layout == "tokens last":
        mask = mask[:, None]
    else:
        mask = (mask if layout == "rows first" else mask.T).reshape(*shape[:2], *rest)
    return mask.expand(shape)


Layout = Literal["rows first", "merged", "tokens first", "tokens last"]


def token_layout(shape: torch.Size, rows: int, tokens: Collection[int]) -> Layout | None:
    """Find out by size which dimensions of a tensor inside a model are the rows and the tokens of the batch.

    Args:
        shape: shape of the tensor without its last dimension, the features.
        rows: number of rows in the batch.
        tokens: possible numbers of tokens per row.

    Returns:
        The first of these that fits: `"rows first"` for `(rows, tokens, ...)`, `"merged"` for `(rows *
        tokens, ...)`, `"tokens first"` for `(tokens, rows, ...)`, `"tokens last"` for `(rows, heads,
        tokens)`. None if none of them fits.
    """
    first, second = (*shape, None, None)[:2]
    if first == rows and second in tokens:
        return "rows first"
    if first in {rows * count for count in tokens}:
        return "merged"
    if first in tokens and second == rows:
        return "tokens first"
    if len(shape) == 3 and first == rows and shape[2] in tokens:
        return "tokens last"
    return None


def row_sizes(batch: Batch) -> tuple[int, frozenset[int]]:
    """Return the number of rows in a batch, and each possible number of tokens per row."""
    tensors = [x for x in batch.values() if isinstance(x, Tensor) and x.ndim > 0]
    rows = len(tensors[0]) if tensors else 1
    return rows, frozenset(x.shape[1] for x in tensors if x.ndim > 1 and len(x) == rows)


def by_rows(x: Tensor, rows: int, tokens: Collection[int]) -> Tensor | None:
    """Reshape the input of a layer to `(rows, tokens, features)`.

    Args:
        x: input in a layout of `token_layout`; or `(rows * windows, ..., features)`, where all windows of an
            image and their tokens belong to one row.
        rows: number of rows in the batch.
        tokens: possible numbers of tokens per row.

    Returns:
        The reshaped input. None if the shape of `x` does not show which tokens belong to a row, as in an
        expert after a router.
    """
    layout = token_layout(x.shape[:-1], rows, tokens)
    if layout == "tokens first":
        x = x.transpose(0, 1)
    windows = x.shape[0] % rows == 0 if x.ndim > 2 else x.shape[0] == rows
    return x.reshape(rows, -1, x.shape[-1]) if (layout or windows) and x.numel() else None


def _ended_labels(batch: Batch) -> Tensor | None:
    """Return a mask of the positions up to the last label of each row; None if labels are not decoder tokens.

    Two conditions tell that labels are the tokens of a decoder. There is no decoder mask, and no argument
    except the inputs of the decoder has the shape of the labels.
    """
    labels = batch.get("labels")
    if batch.get("decoder_attention_mask") is not None or not isinstance(labels, Tensor) or labels.ndim != 2:
        return None
    others = (x for name, x in batch.items() if name != "labels" and not name.startswith("decoder_"))
    inputs = [x for x in others if isinstance(x, Tensor)]
    if labels.is_floating_point() or not inputs or any(x.shape[:2] == labels.shape for x in inputs):
        return None
    real = (labels != IGNORED).flip(1).cumsum(1).flip(1) > 0
    return real if bool(real.any()) else None


#: Largest number of batches from which rows are selected.
_PARTS = 4
#: Assumed number of tokens in an image: the arguments of a model do not show how many patches it has.
_TOKENS_OF_IMAGE = 196


class BatchSample:
    """Iterable that yields all batches, and stores a few evenly spaced batches in `kept`.

    Args:
        batches: the batches; a generator that can be iterated only once is allowed.
    """

    def __init__(self, batches: Iterable[BatchLike]) -> None:
        check_batches(batches, "calibrate")
        self._batches = batches
        self.kept: list[BatchLike] = []

    def __iter__(self) -> Iterator[BatchLike]:
        self.kept, stride = [], 1
        for number, batch in enumerate(self._batches):
            if number % stride == 0:
                self.kept.append(batch)
            if len(self.kept) > 2 * _PARTS:
                self.kept, stride = self.kept[::2], 2 * stride
            yield batch

    def __length_hint__(self) -> int:
        return length_hint(self._batches)


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model; the CPU if all its weights are read from files when they are needed."""
    return next((x.device for x in model.parameters() if not x.is_meta), torch.device("cpu"))


def some_rows(
    batches: Sequence[BatchLike], model: nn.Module, tokens: int, *, parts: int = _PARTS
) -> list[Batch]:
    """Select the first rows of a few evenly spaced batches, with about `tokens` tokens in total.

    If an argument of a batch does not have one entry for each row, all rows of this batch are selected.

    Args:
        batches: batches in one of the forms that `as_batch` accepts.
        model: the model that the batches are for.
        tokens: total number of tokens; at least one row is selected.
        parts: largest number of batches from which rows are selected.
    """
    device = device_of(model)
    if not batches:
        return []
    width = tokens_of_row(as_batch(batches[0], model, device))
    count = min(parts, len(batches), max(1, round(tokens / width)))
    places = [k * len(batches) // count for k in range(count)]
    return [first_rows(as_batch(batches[k], model, device), tokens / count) for k in places]


def tokens_of(batch: Batch) -> int:
    """Estimate the number of tokens in a batch, without padding."""
    first = next((x for x in batch.values() if isinstance(x, Tensor) and x.ndim), None)
    return 1 if first is None else round(len(first) * tokens_of_row(batch))


def first_rows(batch: Batch, tokens: float) -> Batch:
    """Select the first rows of a batch, with about `tokens` tokens; a single longer row of ids is cut."""
    arrays = {name: value for name, value in batch.items() if isinstance(value, Tensor) and value.ndim}
    sizes = {len(value) for value in arrays.values()}
    others = [value for value in batch.values() if not isinstance(value, Tensor)]
    if len(sizes) != 1 or any(isinstance(value, Sequence) and not isinstance(value, str) for value in others):
        return batch
    rows = max(1, round(tokens / tokens_of_row(batch)))
    cut: dict[str, Any] = {name: value[:rows] for name, value in arrays.items()}
    if rows == 1 and _is_one_window(arrays):
        cut = {name: value[:, : max(1, round(tokens))] for name, value in cut.items()}
    return {**batch, **cut}


@torch.no_grad()
def small_batch(batch: Batch, model: nn.Module) -> Batch | None:
    """Return the first row of a batch, or the whole batch if the model does not run on one row.

    The result is None if the model runs on neither, since the batch contains what only a loss function reads.
    """
    for part in (first_rows(batch, 1), batch):
        with suppress(Exception):
            run_model(model, part)
            return part
    return None


def read_batches(
    batches: Iterable[BatchLike], model: nn.Module, *, tokens: float, rows: int = 0, most: float = math.inf
) -> list[Batch]:
    """Read batches until they have a number of tokens and of rows; the last batch is cut.

    Args:
        batches: batches in one of the forms that `as_batch` accepts.
        model: the model that the batches are for.
        tokens: number of tokens to read.
        rows: number of rows to read.
        most: number of tokens at which reading ends, even if there are too few rows.
    """
    device = device_of(model)
    found: list[Batch] = []
    read, count = 0, 0
    for given in batches:
        batch = as_batch(given, model, device)
        if count >= rows and tokens_of(batch) > tokens - read:
            batch = first_rows(batch, tokens - read)
        found.append(batch)
        read, count = read + tokens_of(batch), count + row_sizes(batch)[0]
        if read >= most or (read >= tokens and count >= rows):
            break
    return found


def _is_one_window(arrays: dict[str, Tensor]) -> bool:
    """Return True if rows can be cut to fewer tokens.

    This is possible if all arguments are integer tensors of the same shape `(rows, tokens)` without padding,
    and `input_ids` is one of them.
    """
    shapes = {tuple(value.shape) for value in arrays.values()}
    integers = all(value.ndim == 2 and not value.is_floating_point() for value in arrays.values())
    mask = arrays.get("attention_mask")
    return "input_ids" in arrays and integers and len(shapes) == 1 and (mask is None or bool(mask.all()))


def tokens_of_row(batch: Batch) -> float:
    """Estimate the mean number of tokens per row, without padding; 1 if each row is a single vector."""
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return max(1.0, float((mask != 0).sum()) / len(mask))
    first = next((value for value in batch.values() if isinstance(value, Tensor) and value.ndim), None)
    if first is None or first.ndim < 2 or (first.ndim == 2 and first.is_floating_point()):
        return 1.0
    return float(first.shape[1] if first.ndim < 4 else _TOKENS_OF_IMAGE)
