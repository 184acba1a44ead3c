"""Coherence of the tokens of one row: how far their first-order loss changes add up instead of canceling.

The error `E` of a weight changes the loss of one row of a batch (a text, an image) by `sum_t e_t`, with `e_t
= g_t^T E x_t` over its tokens, inputs `x_t` and gradients `g_t` of the outputs. K-FAC treats the tokens as
independent, so that the mean square is that of `sum_t e_t^2`. If a model pools its tokens, as encoders of
sentences and images do, all `g_t` of its last layers are nearly equal, and the true loss increase is many
times larger.

Rounding and truncation are weighted by both moments `R = E[g g^T]` and `C = E[x x^T]`; their errors are
isotropic after both sides are whitened. So the ratio is computed from whitened tokens. Without whitening, a
few directions that all tokens share would dominate, although little error is left in them.
"""

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tensornet._util import remembered
from tensornet.calibration.batches import Batch
from tensornet.linalg.weighted_svd import cholesky, damped, root

#: Number of rows that are kept for a layer, and of tokens for each row.
ROWS, TOKENS = 16, 32
#: Shares of the mean diagonal that are added to moments of inputs and of gradients, as for rounding.
COLUMN_DAMPING, ROW_DAMPING = 0.01, 0.1
#: Smallest ratio: the estimate may be near zero if tokens cancel or samples are few.
_LEAST = 0.1


@dataclass(frozen=True)
class HeldTokens:
    """Inputs of some tokens of one row, kept until the gradients of their outputs are known.

    Args:
        slot: index among the rows that are kept.
        row: index of the row in the batch.
        places: positions of the tokens in their row, shape `(tokens,)`.
        x: their inputs, shape `(tokens, in)`.
        count: number of tokens of the whole row.
    """

    slot: int
    row: int
    places: Tensor
    x: Tensor
    count: int


@dataclass(frozen=True)
class _Kept:
    x: Tensor
    gradient: Tensor
    count: int


class CoherenceSample:
    """Random tokens of random rows of one layer, kept until its moments are known.

    Args:
        name: name of the layer, which seeds the random choice.

    Example:
        >>> from tensornet.calibration.coherence import CoherenceSample
        >>> x, gradient = torch.ones(2, 5, 3), torch.ones(2, 5, 4)  # five equal tokens
        >>> sample = CoherenceSample("layer")
        >>> sample.add(sample.hold(x, None, {"input": x}), gradient, {"input": x})
        >>> round(sample.ratio(torch.eye(3), torch.eye(4)), 4)
        5.0
    """

    def __init__(self, name: str) -> None:
        self._random = random.Random(name)
        self._seen = 0
        self._kept: dict[int, _Kept] = {}

    def hold(self, x: Tensor, mask: Tensor | None, batch: Batch) -> list[HeldTokens]:
        """Choose some rows of the input of a layer, and copy some of their tokens.

        Args:
            x: input, shape `(..., in)`.
            mask: true at tokens that are not padding, shape `(...)`; all if absent.
            batch: the batch on which the model runs.

        Returns:
            The copied tokens; none if the sizes do not show the rows, or for rows of a single token.
        """
        by_row = by_rows(x.detach(), *row_sizes(batch))
        if by_row is None:
            return []
        tokens = by_row.new_ones(by_row.shape[:2], dtype=torch.bool)
        if mask is not None and (found := by_rows(mask[..., None], *row_sizes(batch))) is not None:
            tokens = found[..., 0]
        held = {}
        for row, count in enumerate(tokens.sum(1).tolist()):
            if count < 2:
                continue
            slot = self._seen if self._seen < ROWS else self._random.randrange(self._seen + 1)
            self._seen += 1
            if slot < ROWS:  # reservoir sampling: every row is kept with the same probability
                chosen = self._random.sample(range(count), min(count, TOKENS))
                places = tokens[row].nonzero()[:, 0][chosen]
                held[slot] = HeldTokens(slot, row, places, by_row[row, places], count)
        return list(held.values())

    def add(self, held: Sequence[HeldTokens], gradient: Tensor, batch: Batch) -> None:
        """Store the tokens together with the gradients of the layer's outputs, shape `(..., out)`."""
        by_row = by_rows(gradient.detach(), *row_sizes(batch)) if held else None
        if by_row is None:
            return
        for one in held:
            self._kept[one.slot] = _Kept(one.x, by_row[one.row, one.places], one.count)

    def ratio(self, columns: Tensor, rows: Tensor) -> float | None:
        """Compute the mean square of the changes of rows, relative to that of independent tokens.

        Args:
            columns: moment of the inputs, shape `(in, in)` or its diagonal `(in,)`; its scale does not
                matter.
            rows: moment of the gradients, shape `(out, out)` or `(out,)`.

        Returns:
            None if no tokens were kept, or all of them are zero.
        """
        kept = [self._kept[slot] for slot in sorted(self._kept)]
        if not kept or not (bool(columns.any()) and bool(rows.any())):
            return None
        x = whitened(torch.cat([one.x for one in kept]), columns, COLUMN_DAMPING)
        gradient = whitened(torch.cat([one.gradient for one in kept]), rows, ROW_DAMPING)
        sizes = [len(one.x) for one in kept]
        joint = alone = 0.0
        for one, a, b in zip(kept, x.split(sizes), gradient.split(sizes), strict=True):
            pairs = (a @ a.mT).double() * (b @ b.mT).double()
            single, size = float(pairs.trace()), len(a)
            alone += single * one.count / size
            others = (float(pairs.sum()) - single) / (size * (size - 1))  # mean over different tokens
            joint += single * one.count / size + others * one.count * (one.count - 1)
        return max(joint / alone, _LEAST) if alone > 0 else None


def whitened(x: Tensor, moment: Tensor, damping: float) -> Tensor:
    """Transform vectors so that their moment becomes the identity, up to damping.

    Args:
        x: shape `(tokens, features)`.
        moment: nonzero moment, shape `(features, features)` or its diagonal `(features,)`.
        damping: fraction of the mean diagonal that is added to it.

    Returns:
        The vectors, in single precision if that is accurate enough, else in double precision.

    Example:
        >>> from tensornet.calibration.coherence import whitened
        >>> whitened(torch.tensor([[2.0, 0.0]]), torch.diag(torch.tensor([4.0, 1.0])), 0.0).tolist()
        [[1.0, 0.0]]
    """
    if moment.ndim == 1:
        return x.double() / damped(moment, damping).sqrt()
    lower = _root(moment, damping)
    if lower is None:  # rounding errors of the sums exceed the damping
        return x.double() @ root(damped(moment, damping))[1].mT
    found: Tensor = torch.linalg.solve_triangular(lower, x.to(lower.dtype).mT, upper=False)
    return found.mT


@remembered
def _root(moment: Tensor, damping: float) -> Tensor | None:
    """Compute the Cholesky factor of a damped moment, None if it is not positive definite."""
    shifted = moment.clone() if moment.dtype == torch.float64 else moment.to(torch.float32, copy=True)
    shifted.diagonal().add_(damping * shifted.diagonal().mean())
    lower, positive = cholesky(shifted)
    return lower if positive else None


def row_sizes(batch: Batch) -> tuple[int, frozenset[int]]:
    """Return the number of rows of a batch, and the possible numbers of tokens in a row.

    Example:
        >>> from tensornet.calibration.coherence import row_sizes
        >>> row_sizes({"input_ids": torch.ones(4, 7), "decoder_input_ids": torch.ones(4, 3)})
        (4, frozenset({3, 7}))
    """
    tensors = [x for x in batch.values() if isinstance(x, Tensor) and x.ndim > 0]
    rows = len(tensors[0]) if tensors else 1
    return rows, frozenset(x.shape[1] for x in tensors if x.ndim > 1 and len(x) == rows)


def by_rows(x: Tensor, rows: int, tokens: Collection[int]) -> Tensor | None:
    """Reshape the input of a layer to `(rows, tokens, features)`.

    Args:
        x: shape `(rows, ..., features)` or `(tokens, rows, ..., features)`; or rows and tokens, or rows and
            windows of an image, may be one dimension.
        rows: number of rows of the batch.
        tokens: possible numbers of tokens in a row.

    Returns:
        None if the sizes do not show the rows, as for tokens that a router selected.

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
