"""Factorisation of a feature dimension into leg sizes, with padding where it has no good factors."""

import math
from functools import lru_cache

from tensornet.errors import TopologyError

#: A padded size may exceed the true one by this share. More padding would cost more parameters than
#: a slightly less balanced factorisation does.
MAX_PADDING = 0.05
#: Padding at all costs a copy of the input and one of the output, so exact factors win unless they are
#: clearly less balanced.
_ANY_PADDING = 0.5


def balanced_factors(size: int, sites: int) -> tuple[int, ...]:
    """Split `size` into `sites` factors of similar magnitude, in ascending order.

    The product of the factors is `size` where it has balanced divisors, else the nearest larger number
    that has (50257 = 29 * 1733 becomes 36 * 37 * 38 - the excess rows are zero and are counted).
    Minimises `log(max/min) + 8 * log(product/size) + (0.5 where product > size)` over all products up to
    5 % above `size`.

    Args:
        size: the dimension to split, at least 1.
        sites: number of factors, at least 1.

    Returns:
        Factors in ascending order; their product is at least `size`.

    Raises:
        TopologyError: size or sites is below 1.

    Examples:
        >>> tn.topologies.balanced_factors(768, 3)
        (8, 8, 12)
    """
    if size < 1 or sites < 1:
        raise TopologyError(f"Cannot split size {size} into {sites} factors: both must be at least 1.")
    return _balanced_factors(size, sites)


@lru_cache(maxsize=4096)
def _balanced_factors(size: int, sites: int) -> tuple[int, ...]:
    if sites == 1:
        return (size,)
    # Small sizes need room for at least one balanced product, whatever the percentage says.
    ceiling = max(math.floor(size * (1 + MAX_PADDING)), size + 1)
    candidates = (_exact_factors(padded, sites) for padded in range(size, ceiling + 1))
    return min(candidates, key=lambda factors: _imbalance(factors, size))


def _imbalance(factors: tuple[int, ...], size: int) -> float:
    padding = math.log(math.prod(factors) / size)
    return math.log(factors[-1] / factors[0]) + 8 * padding + (_ANY_PADDING if padding > 0 else 0)


def _exact_factors(size: int, sites: int) -> tuple[int, ...]:
    """Factor `size` exactly, choosing at each step the divisor nearest to the remaining root."""
    factors, rest = [], size
    for left in range(sites, 1, -1):
        root = rest ** (1 / left)
        factor = min(divisors(rest), key=lambda d: abs(math.log(d / root)))
        factors.append(factor)
        rest //= factor
    return tuple(sorted([*factors, rest]))


@lru_cache(maxsize=65536)
def divisors(size: int) -> tuple[int, ...]:
    """List all divisors of a positive size, in ascending order."""
    small = [d for d in range(1, math.isqrt(size) + 1) if size % d == 0]
    return tuple(sorted({*small, *(size // d for d in small)}))
