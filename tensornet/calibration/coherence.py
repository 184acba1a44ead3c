"""Coherence of the tokens of one row: by how much their gradients of a weight add up.

The gradient of a weight by the loss of one row of a batch (a text, an image) is `G = sum_t g_t x_t^T` over
its tokens, with inputs `x_t` and gradients `g_t` of the outputs. K-FAC takes the tokens for independent, so
that `E |G|^2` is the sum of `|g_t|^2 |x_t|^2`. Where a model pools its tokens, as encoders of sentences and
images do, all `g_t` of its last layers are alike, and an error there costs many times more.
"""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from tensornet.calibration.batches import Batch

#: Elements of the products of one step.
_STEP = 1 << 24


class CoherenceSum:
    """Running sums over rows, for the coherence of one layer.

    Example:
        >>> from tensornet.calibration.coherence import CoherenceSum
        >>> seen = CoherenceSum()
        >>> seen.add(torch.ones(2, 5, 3), torch.ones(2, 5, 4))  # five tokens that are all alike
        >>> seen.ratio
        5.0
    """

    def __init__(self) -> None:
        self.joint = self.alone = torch.zeros((), dtype=torch.float64)

    def add(self, x: Tensor, gradient: Tensor, mask: Tensor | None = None) -> None:
        """Add rows of tokens.

        Args:
            x: inputs, shape `(rows, tokens, in)`.
            gradient: of the outputs, shape `(rows, tokens, out)`.
            mask: true at tokens, shape `(rows, tokens)`; all if absent.
        """
        if mask is not None:
            x, gradient = (y * mask[..., None].to(y) for y in (x, gradient))
        squares = [y.float().square().sum(-1) for y in (x, gradient)]
        self.alone = self.alone.to(x.device) + (squares[0] * squares[1]).sum(dtype=torch.float64)
        self.joint = self.joint.to(x.device) + squared_row_gradients(x, gradient)

    @property
    def ratio(self) -> float | None:
        """Squared gradients of rows relative to those of independent tokens; None if nothing arrived."""
        alone = float(self.alone)
        return float(self.joint) / alone if alone > 0 else None


def squared_row_gradients(x: Tensor, gradient: Tensor) -> Tensor:
    """Compute `sum_rows |sum_t g_t x_t^T|^2`, by the smaller one of two products.

    Args:
        x: shape `(rows, tokens, in)`.
        gradient: shape `(rows, tokens, out)`.

    Returns:
        A scalar in double precision.

    Example:
        >>> from tensornet.calibration.coherence import squared_row_gradients
        >>> x, gradient = torch.randn(2, 5, 3), torch.randn(2, 5, 4)
        >>> known = (gradient.mT @ x).square().sum()
        >>> torch.allclose(squared_row_gradients(x, gradient).float(), known)
        True
    """
    tokens, inputs, outputs = x.shape[1], x.shape[2], gradient.shape[2]
    by_tokens = tokens * (inputs + outputs) < inputs * outputs
    step = max(1, _STEP // (tokens**2 if by_tokens else inputs * outputs))
    total = x.new_zeros((), dtype=torch.float64)
    for a, b in zip(x.split(step), gradient.split(step), strict=True):
        if by_tokens:
            total += ((a @ a.mT).float() * (b @ b.mT).float()).sum(dtype=torch.float64)
        else:
            total += (b.mT @ a).float().square().sum(dtype=torch.float64)
    return total


def grouped(parts: Sequence[Tensor], mask: Tensor | None, batch: Batch) -> list[Tensor]:
    """Reshape inputs, gradients and mask of a layer by rows; tokens whose row is unknown are a row each.

    Args:
        parts: of equal shape but for the features, `(..., features)` each.
        mask: true at tokens, shape `(...)`; no padding if absent.
        batch: that the model runs on.

    Returns:
        The parts, shape `(rows, tokens, features)`, and the mask `(rows, tokens)` if there is one.

    Example:
        >>> from tensornet.calibration.coherence import grouped
        >>> x, mask = torch.zeros(28, 8), torch.ones(28)
        >>> [tuple(part.shape) for part in grouped([x, x], mask, {"input_ids": torch.ones(4, 7)})]
        [(4, 7, 8), (4, 7, 8), (4, 7)]
    """
    sizes = row_sizes(batch)

    def one(x: Tensor) -> Tensor:
        found = by_rows(x, *sizes)
        return x.reshape(-1, 1, x.shape[-1]) if found is None else found

    return [one(x) for x in parts] + ([] if mask is None else [one(mask[..., None])[..., 0]])


def row_sizes(batch: Batch) -> tuple[int, frozenset[int]]:
    """Return the number of rows of a batch, and how many tokens they may have.

    Example:
        >>> from tensornet.calibration.coherence import row_sizes
        >>> row_sizes({"input_ids": torch.ones(4, 7), "decoder_input_ids": torch.ones(4, 3)})
        (4, frozenset({3, 7}))
    """
    tensors = [x for x in batch.values() if isinstance(x, Tensor) and x.ndim > 0]
    rows = len(tensors[0]) if tensors else 1
    return rows, frozenset(x.shape[1] for x in tensors if x.ndim > 1 and len(x) == rows)


def by_rows(x: Tensor, rows: int, tokens: Collection[int]) -> Tensor | None:
    """Reshape what a layer reads to `(rows, tokens, features)`.

    Args:
        x: shape `(rows, ..., features)`, `(tokens, rows, ..., features)`, or with rows and their parts in one
            dimension: all tokens, or windows of an image.
        rows: of the batch.
        tokens: that a row may have.

    Returns:
        None where the sizes do not show the rows, as for tokens that a router has gathered.

    Example:
        >>> from tensornet.calibration.coherence import by_rows
        >>> shapes = (4, 7, 8), (7, 4, 8), (28, 8), (12, 7, 8)
        >>> [tuple(by_rows(torch.zeros(shape), rows=4, tokens={7}).shape) for shape in shapes]
        [(4, 7, 8), (4, 7, 8), (4, 7, 8), (4, 21, 8)]
        >>> by_rows(torch.zeros(20, 8), rows=4, tokens={7})
    """
    first, *others = x.shape[:-1]
    if not others:
        known = first == rows or first in {rows * count for count in tokens}
        return x.reshape(rows, -1, x.shape[-1]) if known and x.numel() else None
    if first != rows and others[0] == rows and first in tokens:
        x, first = x.transpose(0, 1), rows
    return x.reshape(rows, -1, x.shape[-1]) if first % rows == 0 and x.numel() else None


class HeldInput:
    """Input of a layer, held until the gradient of its output arrives; or nothing.

    Args:
        x: the input; None to hold nothing.

    Example:
        >>> from tensornet.calibration.coherence import HeldInput
        >>> x = torch.zeros(2, 3)
        >>> held = HeldInput(x)
        >>> held.unchanged is None, x.add_(1).sum().item(), held.unchanged is None
        (False, 6.0, True)
    """

    def __init__(self, x: Tensor | None) -> None:
        self._x = None if x is None else x.detach()
        self._version = None if x is None else version_of(x)

    @property
    def unchanged(self) -> Tensor | None:
        """The input, or None if it was changed in place since, or has no version that tells."""
        if self._x is None or self._version is None or version_of(self._x) != self._version:
            return None
        return self._x


def version_of(x: Tensor) -> int | None:
    """Return the in-place version of a tensor; None if it has no version counter.

    Example:
        >>> from tensornet.calibration.coherence import version_of
        >>> x = torch.zeros(2)
        >>> version_of(x), version_of(x.add_(1))
        (0, 1)
    """
    return None if x.is_inference() else x._version
