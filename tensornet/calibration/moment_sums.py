"""Second moments: sums of `x x^T` over tokens, blended with those of the mixture for experts with few tokens.

The moment of an expert is estimated from `n` tokens. If these are few, the moment is blended with the mean
moment of the mixture, that is, of all experts in the same layer:

    C = (n C_own + m C_mixture) / (n + m)

This is the estimate of least expected error if the experts' moments vary around the mean of the mixture. In
coordinates in which the mean is the identity, let `s^2` be the mean square of the eigenvalues of a deviation.
A moment of `n` independent tokens has a squared error of `features^2 / n`, so `m = features / s^2`. For the
moment of the gradients, `m` does not depend on the number of features (`GRADIENT_PRIOR`).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: Largest number of features for which the full moment is stored. For more features only the diagonal is.
FULL_UP_TO = 8192
#: Number of tokens, for each feature, that the mean moment of a mixture's inputs counts as. It was measured
#: on a model of 32 experts (128 x 128 and 128 x 64) that were rounded to 3 bits or truncated, for 8 to 1,600
#: tokens an expert. With 0.5 to 2, the loss is at most 7 % larger; with 0 up to 110 %, without own tokens up
#: to 54 %.
PRIOR = 1.0
#: Number of tokens that the mean moment of a mixture's gradients counts as, in the same measurement. The
#: scale of the gradients varies among experts, and a diagonal has only one number for each feature.
GRADIENT_PRIOR = 32.0
#: Fraction of a mixture's tokens that is spread evenly over its experts, since other text is routed
#: differently. Between two kinds of manuals, 0.01 to 0.03 predicted the share of each expert best.
USAGE_SPREAD = 0.03
#: Number of columns in a block of a Gram matrix.
_BLOCK = 128


class MomentSum:
    """Sum of `x x^T` over vectors `x`, in float32.

    The vectors themselves are stored until they outnumber their features. So a sum needs at most
    `features^2` numbers, and for an expert that received few tokens only those of its tokens.

    Args:
        features: length of the vectors.
        diagonal: whether to sum only the diagonal, shape `(features,)`.
        device: device of the vectors.
    """

    def __init__(self, features: int, *, diagonal: bool = False, device: torch.device | None = None) -> None:
        self.features, self.device = features, device
        self.total = torch.zeros(features, device=device) if diagonal else None
        self.held: list[Tensor] = []
        self.count = 0

    def add(self, x: Tensor) -> None:
        """Add vectors, shape `(tokens, features)`; the tensor may be stored, so it must not change later."""
        self.count += len(x)
        if self.total is None and self.count <= self.features:
            self.held.append(x)
            return
        if self.total is None:
            self.total, self.held = self.upper(), []
        _add_products(self.total, x)

    def add_to(self, total: Tensor) -> Tensor:
        """Add this sum to another one of the same shape in place, and return that sum."""
        if self.total is not None:
            return total.add_(self.total)
        if self.held:
            _add_products(total, torch.cat(self.held))
        return total

    def upper(self) -> Tensor:
        """Return the sum, possibly the tensor `total` itself; elements below the diagonal are undefined."""
        if self.total is not None:
            return self.total
        return self.add_to(torch.zeros(self.features, self.features, device=self.device))

    def copy(self) -> "MomentSum":
        """Return an independent sum of the same vectors."""
        made = MomentSum(self.features, device=self.device)
        made.total = None if self.total is None else self.total.clone()
        made.held, made.count = list(self.held), self.count
        return made

    @property
    def num_bytes(self) -> int:
        """Bytes of the stored vectors and of the sum."""
        return sum(x.nbytes for x in self.held) + (0 if self.total is None else self.total.nbytes)


@dataclass(frozen=True)
class Mixture:
    """Means over all tokens that any expert of one mixture layer received.

    Without arguments, it stands for a layer outside of mixtures.

    Args:
        inputs: mean moment of the inputs, shape `(in, in)` or `(in,)`; None if no inputs were summed.
        gradients: mean moment of the gradients, shape `(out, out)` or `(out,)`, or None.
        tokens: number of these tokens; a token counts once for each of its experts.
        experts: number of experts.
    """

    inputs: Tensor | None = None
    gradients: Tensor | None = None
    tokens: int = 0
    experts: int = 1

    def expected_tokens(self, count: int) -> float:
        """Estimate how many tokens of another text would reach an expert that `count` tokens reached."""
        return (1 - USAGE_SPREAD) * count + USAGE_SPREAD * self.tokens / self.experts


def blended(own: MomentSum | None, mean: Tensor | None, prior: float) -> Tensor:
    """Blend the moment of one expert with the mean moment of its mixture: `(n C_own + m C_mean) / (n + m)`.

    `n` is the number of tokens of the expert.

    Args:
        own: sum over the tokens of the expert; None if it received no token.
        mean: mean over the tokens of the mixture; None for a layer outside of mixtures.
        prior: number `m` of tokens that the mean counts as.

    Returns:
        The moment, shape `(features, features)` or `(features,)`; `mean` itself if `own` has no tokens.
    """
    if own is None or not own.count:
        assert mean is not None
        return mean
    if mean is None:
        return mirrored(own.upper() / own.count)
    return mirrored(own.add_to(mean * prior).div_(own.count + prior))


def mean_moment(sums: Sequence[MomentSum]) -> Tensor:
    """Average moments over all tokens: the sum of all vectors' moments, divided by the number of vectors."""
    total = torch.zeros_like(sums[0].upper())
    for each in sums:
        each.add_to(total)
    return mirrored(total.div_(max(sum(each.count for each in sums), 1)))


def find_siblings(shapes: Mapping[str, Sequence[int]]) -> dict[str, list[str]]:
    """Find layers of equal shape whose names differ only in the last number, as those of experts do.

    Such a number is an index of a module list, or the end of a key such as `expert_3`.

    Args:
        shapes: shape of each layer's matrix, by name.

    Returns:
        All siblings of each layer that has any, including the layer itself.
    """
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, shape in shapes.items():
        if places := numbered_parts(name):
            parts = name.split(".")
            parts[places[-1]] = parts[places[-1]].rstrip("0123456789")
            groups.setdefault((*parts, places[-1], tuple(shape)), []).append(name)
    return {name: group for group in groups.values() if len(group) > 1 for name in group}


def numbered_parts(name: str) -> list[int]:
    """List the places of the parts of a dotted name that end in a number, such as `3` or `expert_3`.

    The last part must be a number alone, since layers named `w_1` and `w_2` usually do different things.
    """
    parts = name.split(".")
    return [
        place
        for place, part in enumerate(parts)
        if part.isdecimal() or (_NUMBERED.fullmatch(part) and place < len(parts) - 1)
    ]


#: Matches a part of a dotted name that ends in a number.
_NUMBERED = re.compile(r"(.*_)?\d+")


def _add_products(total: Tensor, x: Tensor) -> None:
    """Add `X^T X`, or its diagonal, to the upper half of a sum.

    In 16 bits, moments with strongly correlated outliers would get negative eigenvalues. So even the products
    of bfloat16 vectors, which are exact in float32, are summed in float32.
    """
    if total.ndim == 1:
        total += x.to(torch.float32, copy=True).square_().sum(0)
        return
    with torch.autocast(x.device.type, enabled=False):
        add_gram(total, x.float())


def add_products(total: Tensor, x: Tensor, y: Tensor) -> None:
    """Add `X^T Y` to a sum.

    Args:
        total: the sum in float32, shape `(m, n)`.
        x, y: matrices of shapes `(tokens, m)` and `(tokens, n)`.
    """
    with torch.autocast(x.device.type, enabled=False):
        total.addmm_(x.float().T, y.float())


def has_bfloat16(device: torch.device) -> bool:
    """Return True if a device has bfloat16 arithmetic that is faster than that of float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    if device.type == "cpu":
        known: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.10 or newer
        return bool(known.get("amx_bf16") or known.get("avx512_bf16"))
    return False


def upper_gram(x: Tensor) -> Tensor:
    """Compute the blocks of `X^T X` on and above the diagonal; all other elements are undefined.

    Args:
        x: the matrix `X`, shape `(tokens, features)`.
    """
    found = x.new_empty(x.shape[1], x.shape[1])
    for rows, columns in _blocks(x.shape[1]):
        torch.mm(x[:, rows].T, x[:, columns], out=found[rows, columns])
    return found


def add_gram(total: Tensor, x: Tensor) -> None:
    """Add `X^T X` to the upper half of a sum, in blocks that fit into the processor's cache.

    Args:
        total: the sum, shape `(features, features)`; elements below the diagonal are undefined afterwards.
        x: the matrix `X`, shape `(tokens, features)`, in the dtype of the sum.
    """
    for rows, columns in _blocks(x.shape[1]):
        total[rows, columns].addmm_(x[:, rows].T, x[:, columns])


def _blocks(size: int) -> list[tuple[slice, slice]]:
    """List blocks that cover the upper half of a square matrix, as slices of rows and columns."""
    return [(slice(k, k + _BLOCK), slice(k, None)) for k in range(0, size, _BLOCK)]


def mirrored(moment: Tensor) -> Tensor:
    """Copy the upper triangle of a moment to the lower triangle in place; return a diagonal unchanged."""
    return moment if moment.ndim == 1 else moment.triu_().add_(moment.triu(1).T)
