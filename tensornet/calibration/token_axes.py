"""Row and token dimensions of a layer's input, inferred from their sizes.

Most layers read `(rows, tokens, features)`. Others read `(tokens, rows, features)`, heads between rows and
tokens, `(rows, heads, tokens, features)`, or rows and tokens in one dimension.
"""

import warnings
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tensornet.errors import CalibrationWarning


def place_masks(masks: Sequence[Tensor], shape: torch.Size) -> Tensor | None:
    """Reshape a mask over the tokens of a batch to match a tensor with one value for each token.

    Masks of one shape count together: a position is a token if either says so. Where sizes fit in several
    ways that disagree about padding, a `CalibrationWarning` says so: rows first are assumed for
    `(rows, tokens)`, and for more dimensions every position counts.

    Args:
        masks: of shape `(rows, tokens)`, true at tokens; one for an encoder, one for a decoder. Where rows
            have a single label, `(rows,)`.
        shape: dimensions of the tensor, features left out.

    Returns:
        The mask, of that shape, or None where no mask fits it.

    Example:
        >>> from tensornet.calibration.token_axes import place_masks
        >>> mask = torch.tensor([[True, True, True], [True, False, False]])
        >>> place_masks([mask], torch.Size([3, 2])).tolist()  # tokens first
        [[True, True], [True, False], [True, False]]
    """
    by_shape: dict[torch.Size, Tensor] = {}
    for mask in masks:
        by_shape[mask.shape] = mask | by_shape[mask.shape] if mask.shape in by_shape else mask
    placed = [found for mask in by_shape.values() for found in _placements(mask, shape)]
    if not placed:
        return None
    first, *others = placed
    if all(torch.equal(first, other) for other in others):
        return first
    fallback = "rows are taken to come first" if len(shape) == 2 else "padding is counted as tokens"
    warnings.warn(
        f"A layer reads a tensor of shape {(*shape, 'features')} in a batch of "
        f"{' and '.join(str(tuple(x)) for x in by_shape)} (rows, tokens), so its sizes do not show which "
        f"positions are padding: {fallback}. Pass batches with another number of rows or tokens, or without "
        "padding.",
        CalibrationWarning,
        stacklevel=3,
    )
    return first if len(shape) == 2 else torch.ones(shape, dtype=torch.bool, device=first.device)


def _placements(mask: Tensor, shape: torch.Size) -> Iterator[Tensor]:
    """List the ways to match the dimensions of a mask with those of a shape, rows before tokens first."""
    if mask.ndim != 2:
        if mask.shape == shape:
            yield mask
        return
    rows, tokens = mask.shape
    for axis, size in enumerate(shape):
        if size == rows * tokens:
            yield _spread(mask.reshape(-1), (axis,), shape)
    found = [
        (row, token)
        for row, size in enumerate(shape)
        for token, other in enumerate(shape)
        if row != token and size == rows and other == tokens
    ]
    for row, token in sorted(found, key=lambda pair: pair[0] > pair[1]):
        ordered = mask if row < token else mask.T
        yield _spread(ordered, (min(row, token), max(row, token)), shape)


def _spread(values: Tensor, axes: tuple[int, ...], shape: torch.Size) -> Tensor:
    """Broadcast values along some dimensions over all others of a shape."""
    sizes = [shape[axis] if axis in axes else 1 for axis in range(len(shape))]
    return values.reshape(sizes).expand(shape)
