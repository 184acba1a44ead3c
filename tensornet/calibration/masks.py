"""Which positions of a tensor are tokens, and which are padding.

Most layers read `(rows, tokens, features)`. Others read `(tokens, rows, features)`, heads between rows and
tokens, `(rows, heads, tokens, features)`, or rows and tokens in one dimension; there sizes tell where the
rows and tokens are. Experts read `(picked tokens, features)`, whose sizes say nothing. Picking tokens
copies their numbers, though: rows that equal padded rows of the hidden states, bit by bit, are padding.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tensornet.calibration.batches import IGNORED, Batch
from tensornet.errors import CalibrationWarning


def token_mask(batch: Batch, shape: torch.Size) -> Tensor | None:
    """Return the mask of real tokens for the given leading dimensions; None without padding.

    Padding is what `attention_mask` and `decoder_attention_mask` say. A label of -100 is a token without a
    loss, as most are in a batch for masked language modelling; batches padded without a mask are read by the
    model as they are, and so counted. Only a decoder that is given its tokens as labels reads padding after
    the last label of a row. Where an encoder's and a decoder's mask have one shape, a position counts if
    either says so. `place_masks` says which dimensions are rows and tokens.
    """
    named = (batch.get(name) for name in ("attention_mask", "decoder_attention_mask"))
    masks = [x.bool() for x in named if isinstance(x, Tensor) and x.ndim <= 2]
    found = place_masks(masks, shape)
    if found is None and (ended := _ended_labels(batch)) is not None:
        found = place_masks([ended], shape)
    return found


def _ended_labels(batch: Batch) -> Tensor | None:
    """Return the mask of decoder tokens up to the last label of each row; None for other labels.

    Labels are a decoder's if no input of the batch but its own has their shape, and there is no mask of its
    own.
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
        >>> from tensornet.calibration.masks import place_masks
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


@dataclass
class GatheredTokens:
    """Padded rows of the hidden states of one batch, and the picked rows that were recognised.

    Later layers of an expert read results computed from its rows, in the same order: the rows of one are
    those of another whose name differs in one part (`experts.3.up` and `experts.3.down`).

    Example:
        >>> seen = GatheredTokens()
        >>> states, mask = torch.randn(2, 3, 4), torch.tensor([[True, True, False], [True, False, False]])
        >>> seen.remember(states, mask)
        >>> seen.kept("experts.0.up", states[[0, 0, 1], [0, 2, 0]]).tolist()
        [True, False, True]
        >>> seen.kept("experts.0.down", torch.randn(3, 6)).tolist()
        [True, False, True]
    """

    states: dict[int, tuple[Tensor, int, Tensor]] = field(default_factory=dict)
    picked: dict[str, Tensor] = field(default_factory=dict)
    _padding: dict[int, Tensor] = field(default_factory=dict)

    def remember(self, states: Tensor, mask: Tensor) -> None:
        """Remember the newest hidden states of a width.

        Args:
            states: shape `(*mask.shape, features)`.
            mask: true at tokens.
        """
        width = states.shape[-1]
        self.states[width] = (states.detach(), _version(states), mask)
        self._padding.pop(width, None)

    def kept(self, name: str, x: Tensor, placed: Tensor | None = None) -> Tensor | None:
        """Tell tokens from padding among picked rows.

        Args:
            name: of the layer that reads them.
            x: shape `(rows, features)`.
            placed: the mask if the rows are all tokens in order, which their number allows.

        Returns:
            True at tokens, shape `(rows,)`; `placed` where nothing is recognised as padding.
        """
        found = self._recognised(x)
        if found is not None:
            in_order = placed is not None and not bool(found[~placed].any())
            self.picked[name] = placed if in_order and placed is not None else found
            return self.picked[name]
        parts = name.split(".")
        for other, keep in self.picked.items():
            differing = [a != b for a, b in zip(parts, other.split("."), strict=False)]
            if len(keep) == len(x) and sum(differing) == 1 and other.count(".") == name.count("."):
                return keep
        return placed

    def _recognised(self, x: Tensor) -> Tensor | None:
        width = x.shape[-1]
        if width not in self._padding:
            if width not in self.states:
                return None
            states, version, mask = self.states.pop(width)
            if _version(states) != version:  # changed in place since
                return None
            self._padding[width] = _fingerprints(states[~mask])
        padded = torch.isin(_fingerprints(x.detach()), self._padding[width])
        return ~padded if bool(padded.any()) else None


def hidden_states(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], mask: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """Find hidden states among the arguments of a module, with the mask in their shape; None without padding.

    Args:
        args, kwargs: of the module.
        mask: `(rows, tokens)`, true or 1 at tokens.
    """
    if mask is None or mask.ndim != 2 or bool(mask.all()):
        return None
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim in (2, 3):
            for placed in (mask.bool(), mask.bool().reshape(-1)):
                if value.shape[:-1] == placed.shape:
                    return value, placed
    return None


def _fingerprints(rows: Tensor) -> Tensor:
    """Hash each row by its bits alone, independent of the rows beside it."""
    bits = rows.float().contiguous().view(torch.int32).long()
    generator = torch.Generator("cpu").manual_seed(0)
    weights = torch.randint(-(2**62), 2**62, (rows.shape[-1],), generator=generator, device="cpu")
    return (bits * weights.to(rows.device)).sum(-1)  # wraps around, which loses nothing


def _version(x: Tensor) -> int:
    return -1 if x.is_inference() else x._version
