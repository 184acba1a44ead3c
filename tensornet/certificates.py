"""Certified errors of sums and products of operators, in logarithms so that no norm overflows.

A certificate `e` says that an operator `W` approximates its origin `W0` with `|W0 - W| <= e |W0|`. The
absolute bound is `|W0 - W| <= e |W| / (1 - e)`, since `|W0| <= |W| / (1 - e)`. Absolute bounds of sums and
products follow from the triangle inequality and are always finite. Relative bounds are finite if the absolute
bound is smaller than the norm of the result, because only then the origin cannot be zero.
"""

import math


def log_add(*logarithms: float) -> float:
    """Compute `log(sum(exp(x)))`.

    Example:
        >>> round(math.exp(log_add(math.log(2), math.log(3), -math.inf)), 9)
        5.0
    """
    top = max(logarithms)
    if math.isinf(top):
        return top
    return top + math.log(math.fsum(math.exp(x - top) for x in logarithms))


def log_distance(error: float, log_norm: float) -> float:
    """Bound `log |W0 - W|` by a relative certificate and `log |W|`.

    Example:
        >>> round(math.exp(log_distance(0.5, math.log(3))), 9)
        3.0
    """
    if error == 0:
        return -math.inf
    return math.log(error) - math.log1p(-error) + log_norm if error < 1 else math.inf


def relative_error(log_distance: float, log_norm: float) -> float:
    """Bound `|W0 - W| / |W0|` by `log |W0 - W|` and `log |W|`; infinite if `W0` may be zero.

    Example:
        >>> round(relative_error(math.log(1), math.log(3)), 9)
        0.5
    """
    if log_distance == -math.inf:
        return 0.0
    if not log_distance < log_norm:
        return math.inf
    ratio = math.exp(log_distance - log_norm)
    return ratio / (1 - ratio) if ratio < 1 else math.inf


def log_product(norms: tuple[float, float], distances: tuple[float, float]) -> float:
    """Bound `log |A0 * B0 - A * B|` for a product with `|A * B| <= |A| |B|` in the Frobenius norm.

    `|A0 B0 - A B| <= |A0 - A| |B0| + |A| |B0 - B|` with `|B0| <= |B| + |B0 - B|`. Matrix, Hadamard and
    Kronecker products are such products.

    Example:
        >>> round(math.exp(log_product((math.log(2), math.log(3)), (0.0, 0.0))), 9)  # 1 * (3 + 1) + 2 * 1
        6.0
    """
    return log_add(distances[0] + log_add(norms[1], distances[1]), norms[0] + distances[1])
