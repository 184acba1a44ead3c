"""Estimate coherence: whether the first-order loss changes of different tokens add up or cancel.

In this module a row is a row of a batch: a text, an image. Token `t` of a row has the layer input `x_t` and
the output gradient `g_t`. To first order, an error `E` of a weight changes the loss of the row by `sum_t e_t`
with `e_t = g_t^T E x_t`. K-FAC treats the tokens as independent, and so replaces the mean of `(sum_t e_t)^2`
by the mean of `sum_t e_t^2`. The coherence is the ratio of these two means. Encoders of sentences and images
pool their tokens. All `g_t` of their last layers are therefore nearly equal, and the ratio is large.

Rounding and truncation take the moments `R = E[g g^T]` and `C = E[x x^T]` into account, so that their errors
are isotropic after whitening with `R` and `C`. The ratio is therefore computed from whitened tokens. Without
whitening, a few directions that all tokens share would dominate, although errors in them are small.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tensornet._util import remembered
from tensornet.calibration.batches import Batch, by_rows, row_sizes
from tensornet.damping import COLUMN_DAMPING, ROW_DAMPING
from tensornet.linalg.weighted_svd import cholesky, damped, root

#: Number of rows that are sampled for each layer, and number of tokens that are sampled from each row.
SAMPLED_ROWS, SAMPLED_TOKENS = 16, 32
#: Lower limit of the coherence. An estimate may be near zero if tokens have opposite effects, or if there are
#: few samples.
_LEAST = 0.1


@dataclass(frozen=True)
class HeldTokens:
    """Layer inputs at sampled tokens of one row, stored until the output gradients at these tokens are known.

    Args:
        slot: index of the row in the sample of rows.
        row: index of the row in the batch.
        places: positions of the sampled tokens in the row, shape `(tokens,)`.
        x: inputs of the layer for these tokens, shape `(tokens, in)`.
        count: number of tokens in the whole row.
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
    """Random sample of rows and of their tokens, from which the coherence of one layer is estimated.

    Args:
        name: name of the layer, from which the random choice is seeded.
    """

    def __init__(self, name: str) -> None:
        self._random = random.Random(name)
        self._seen = 0
        self._kept: dict[int, _Kept] = {}

    def hold(self, x: Tensor, mask: Tensor | None, batch: Batch) -> list[HeldTokens]:
        """Sample rows of a batch, and copy the layer's inputs for some of their tokens.

        Args:
            x: input of the layer, shape `(..., in)`.
            mask: True at tokens that are not padding, shape `(...)`; None if there is no padding.
            batch: the batch on which the model runs.

        Returns:
            The copied inputs of each sampled row; empty if the shape of `x` does not show which tokens belong
            to a row, or if all rows have a single token.
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
            slot = self._seen if self._seen < SAMPLED_ROWS else self._random.randrange(self._seen + 1)
            self._seen += 1
            if slot < SAMPLED_ROWS:  # reservoir sampling: every row of all batches has the same probability
                chosen = self._random.sample(range(count), min(count, SAMPLED_TOKENS))
                places = tokens[row].nonzero()[:, 0][chosen]
                held[slot] = HeldTokens(slot, row, places, by_row[row, places], count)
        return list(held.values())

    def add(self, held: Sequence[HeldTokens], gradient: Tensor, batch: Batch) -> None:
        """Store sampled tokens together with the output gradients at these tokens.

        Args:
            held: result of `hold`.
            gradient: gradient of the layer's output, shape `(..., out)`.
            batch: the batch on which the model ran.
        """
        by_row = by_rows(gradient.detach(), *row_sizes(batch)) if held else None
        if by_row is None:
            return
        for one in held:
            self._kept[one.slot] = _Kept(one.x, by_row[one.row, one.places], one.count)

    def ratio(self, columns: Tensor, rows: Tensor) -> float | None:
        """Estimate the coherence of the layer from the sample.

        Args:
            columns: moment of the inputs, shape `(in, in)` or its diagonal `(in,)`; the scale is irrelevant.
            rows: moment of the output gradients, shape `(out, out)` or its diagonal `(out,)`.

        Returns:
            The coherence; None if there are no samples, or all of them are zero.
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
            # The mean over all pairs of different tokens.
            others = (float(pairs.sum()) - single) / (size * (size - 1))
            joint += single * one.count / size + others * one.count * (one.count - 1)
        return max(joint / alone, _LEAST) if alone > 0 else None


def whitened(x: Tensor, moment: Tensor, damping: float) -> Tensor:
    """Whiten vectors: transform them so that their second moment is the identity, except for damping.

    Args:
        x: the vectors, shape `(tokens, features)`.
        moment: their nonzero moment, shape `(features, features)` or its diagonal `(features,)`.
        damping: fraction of the mean diagonal that is added to the diagonal of the moment.

    Returns:
        The transformed vectors, in single precision if this is accurate enough, else in double precision.
    """
    if moment.ndim == 1:
        return x / damped(moment, damping).sqrt()  # in double precision, as the moment is
    lower = _root(moment, damping)
    if lower is None:  # not positive definite, since rounding errors in the moment exceed the damping
        return x.double() @ root(damped(moment, damping))[1].mT
    found: Tensor = torch.linalg.solve_triangular(lower, x.to(lower.dtype).mT, upper=False)
    return found.mT


@remembered
def _root(moment: Tensor, damping: float) -> Tensor | None:
    """Compute the Cholesky factor of a damped moment; None if the moment is not positive definite."""
    shifted = moment.clone() if moment.dtype == torch.float64 else moment.to(torch.float32, copy=True)
    shifted.diagonal().add_(damping * shifted.diagonal().mean())
    lower, positive = cholesky(shifted)
    return lower if positive else None
