"""Keep a few rows of the batches that calibration walks through, to measure losses on later."""

from collections.abc import Iterable, Iterator, Sequence
from operator import length_hint
from typing import Any

from torch import Tensor, nn

from tensornet.calibration.batches import Batch, BatchLike, as_batch, check_batches

#: Batches that rows are taken from, at most.
_PARTS = 4
#: Tokens of a row whose arguments do not show them, as the patches of an image.
_TOKENS_OF_IMAGE = 196


class BatchSample:
    """Iterable that hands batches on and remembers a few of them, evenly spaced.

    Args:
        batches: any iterable, even one that can be walked through only once.

    Example:
        >>> from tensornet.calibration.batch_sample import BatchSample
        >>> sample = BatchSample(torch.full((2, 3), float(k)) for k in range(100))
        >>> len(list(sample)), [int(batch[0, 0]) for batch in sample.kept]
        (100, [0, 16, 32, 48, 64, 80, 96])
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


def some_rows(
    batches: Sequence[BatchLike], model: nn.Module, tokens: int, *, parts: int = _PARTS
) -> list[Batch]:
    """Select the first rows of a few batches, of about so many tokens in all.

    Batches with an argument that does not have one entry for each row are taken as a whole.

    Args:
        batches: as for `calibrate`.
        model: whose arguments they are.
        tokens: of all rows together; at least one row is taken.
        parts: batches that rows are taken from, at most.

    Example:
        >>> from tensornet.calibration.batch_sample import some_rows
        >>> batches = [{"input_ids": torch.ones(16, 128, dtype=torch.int64)}] * 8
        >>> [tuple(batch["input_ids"].shape) for batch in some_rows(batches, torch.nn.Linear(1, 1), 1024)]
        [(2, 128), (2, 128), (2, 128), (2, 128)]
    """
    device = next(model.parameters()).device
    if not batches:
        return []
    width = _tokens_of_row(as_batch(batches[0], model, device))
    count = min(parts, len(batches), max(1, round(tokens / width)))
    places = [k * len(batches) // count for k in range(count)]
    return [_first_rows(as_batch(batches[k], model, device), tokens / count) for k in places]


def _first_rows(batch: Batch, tokens: float) -> Batch:
    """Select the first rows of a batch, and of long token windows their beginning."""
    arrays = {name: value for name, value in batch.items() if isinstance(value, Tensor) and value.ndim}
    sizes = {len(value) for value in arrays.values()}
    others = [value for value in batch.values() if not isinstance(value, Tensor)]
    if len(sizes) != 1 or any(isinstance(value, Sequence) and not isinstance(value, str) for value in others):
        return batch
    rows = max(1, round(tokens / _tokens_of_row(batch)))
    cut: dict[str, Any] = {name: value[:rows] for name, value in arrays.items()}
    if rows == 1 and _is_one_window(arrays):
        cut = {name: value[:, : max(1, round(tokens))] for name, value in cut.items()}
    return {**batch, **cut}


def _is_one_window(arrays: dict[str, Tensor]) -> bool:
    """Return True if all arguments are integers `(rows, tokens)` without padding, so that tokens can go."""
    shapes = {tuple(value.shape) for value in arrays.values()}
    integers = all(value.ndim == 2 and not value.is_floating_point() for value in arrays.values())
    mask = arrays.get("attention_mask")
    return "input_ids" in arrays and integers and len(shapes) == 1 and (mask is None or bool(mask.all()))


def _tokens_of_row(batch: Batch) -> float:
    """Estimate how many tokens a row has, padding left out; 1 where a row is one vector."""
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return max(1.0, float((mask != 0).sum()) / len(mask))
    first = next((value for value in batch.values() if isinstance(value, Tensor) and value.ndim), None)
    if first is None or first.ndim < 2 or (first.ndim == 2 and first.is_floating_point()):
        return 1.0
    return float(first.shape[1] if first.ndim < 4 else _TOKENS_OF_IMAGE)
