"""Functions on grids and their operators in closed form, as chains with small bonds (QTT).

A grid has `prod(dims)` points `x_k = start + k * step`. The digits of `k`, the most significant first, are
the sites, so `dims = [2] * 20` is a grid of a million points. A function is a state, an MPO with in-legs of
1. Functions without a closed form are found by cross approximation or, on small grids, by `MPO.from_vector`.
Nothing here is differentiable with respect to the parameters.
"""

import cmath
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tensornet._util import check_size, check_sizes
from tensornet.mpo import MPO

#: Number of interpolation points of `fourier`; the error is below 1e-15 in double precision.
_NODES = 24


def exponential(
    rate: complex,
    dims: Sequence[int],
    *,
    start: float = 0.0,
    step: float = 1.0,
    dtype: torch.dtype | None = None,
) -> MPO:
    """Build the function `exp(rate * x)`, real or complex, with bonds of 1.

    Args:
        rate: the rate; an imaginary rate gives a plane wave.
        dims: sizes of the sites.
        start: first grid point.
        step: distance of the grid points.
        dtype: dtype of the cores. If absent, torch's default, or its complex counterpart if `rate` is
            complex.

    Example:
        >>> tn.qtt.exponential(-1.0, [2, 2]).to_matrix().flatten()
        tensor([1.0000, 0.3679, 0.1353, 0.0498])
    """
    rate = complex(rate)
    factors = [torch.exp(rate * places) for places in _places(dims, step)]
    factors[0] = factors[0] * cmath.exp(rate * start)
    return _state([factor.reshape(1, -1, 1) for factor in factors], dtype, real=rate.imag == 0)


def sine(
    frequency: float,
    dims: Sequence[int],
    *,
    phase: float = 0.0,
    start: float = 0.0,
    step: float = 1.0,
    dtype: torch.dtype | None = None,
) -> MPO:
    """Build the function `sin(frequency * x + phase)` with bonds of 2; a cosine has the phase `pi / 2`.

    Args:
        frequency: the angular frequency, in radians per unit of `x`.
        dims: sizes of the sites.
        phase: angle at `x = 0`, in radians.
        start: first grid point.
        step: distance of the grid points.
        dtype: dtype of the cores, torch's default if absent.

    Example:
        >>> tn.qtt.sine(torch.pi / 4, [2, 2]).to_matrix().flatten()
        tensor([0.0000, 0.7071, 1.0000, 0.7071])
    """
    cores = []
    for angles in _places(dims, step):
        sines, cosines = torch.sin(frequency * angles), torch.cos(frequency * angles)
        rows = torch.stack([torch.stack([cosines, sines], 1), torch.stack([-sines, cosines], 1)])
        cores.append(rows)  # shape: (left, digit, right), a rotation of (cos, sin)
    angle = frequency * start + phase
    first = torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)
    cores[0] = torch.einsum("a,adb->db", first, cores[0])[None]
    cores[-1] = cores[-1][..., 1:]
    return _state(cores, dtype, real=True)


def polynomial(
    coefficients: Sequence[complex],
    dims: Sequence[int],
    *,
    start: float = 0.0,
    step: float = 1.0,
    dtype: torch.dtype | None = None,
) -> MPO:
    """Build the polynomial `c_0 + c_1 x + c_2 x^2 + ...` of degree `p` with bonds of `p + 1`.

    The bonds carry the powers of the sum of the digits so far. Choose `start` and `step` so that `x` is of
    order 1: the powers of large numbers lose digits.

    Args:
        coefficients: the coefficients, that of the constant first.
        dims: sizes of the sites.
        start: first grid point.
        step: distance of the grid points.
        dtype: dtype of the cores. If absent, torch's default, or its complex counterpart if a coefficient is
            complex.

    Example:
        >>> tn.qtt.polynomial([0, 0, 1], [2, 3]).to_matrix().flatten()
        tensor([ 0.,  1.,  4.,  9., 16., 25.])

    Reference:
        Khoromskij 2011, "O(d log N)-quantics approximation of N-d tensors in high-dimensional numerical
        modeling".
    """
    weights = torch.as_tensor(coefficients, dtype=torch.complex128)
    check_size("The number of coefficients", len(weights))
    degree = len(weights) - 1
    binomials = torch.tensor(
        [[math.comb(new, old) for new in range(degree + 1)] for old in range(degree + 1)]
    )
    powers = torch.arange(degree + 1)
    exponents = (powers[None, :] - powers[:, None]).clamp(min=0)  # shape: (old power, new power)
    cores = [
        torch.where(binomials[:, None] > 0, binomials[:, None] * places[:, None] ** exponents[:, None], 0)
        for places in _places(dims, step)
    ]  # (y + w)^new = sum over old of binomial(new, old) y^old w^(new - old)
    first = torch.tensor(start, dtype=torch.float64) ** powers
    cores[0] = torch.einsum("a,adb->db", first, cores[0])[None]
    cores[-1] = (cores[-1].to(weights.dtype) @ weights)[..., None]
    return _state(cores, dtype, real=not bool(weights.imag.any()))


def laplacian(
    dims: Sequence[int],
    *,
    step: float = 1.0,
    periodic: bool = False,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> MPO:
    """Build the negative second difference `(2 f_k - f_{k-1} - f_{k+1}) / step^2` with bonds of 3.

    The function is 0 outside the grid, or periodic. In more dimensions, add Kronecker products:
    `L.kron(I) + I.kron(L)`.

    Args:
        dims: sizes of the sites.
        step: distance of the grid points.
        periodic: whether the last point is a neighbour of the first one.
        dtype: dtype of the cores, torch's default if absent.
        device: device of the cores, torch's default if absent.

    Example:
        >>> tn.qtt.laplacian([2, 2]).to_matrix()
        tensor([[ 2., -1.,  0.,  0.],
                [-1.,  2., -1.,  0.],
                [ 0., -1.,  2., -1.],
                [ 0.,  0., -1.,  2.]])

    Reference:
        Kazeev and Khoromskij 2012, "Low-rank explicit QTT representation of the Laplace operator and its
        inverse".
    """
    cores = []
    for site, dim in enumerate(check_sizes("dims", dims)):
        eye = torch.eye(dim, dtype=torch.float64)
        up = torch.diag(torch.ones(dim - 1, dtype=torch.float64), 1)  # the digit of the column is one larger
        carry = torch.zeros(dim, dim, dtype=torch.float64)
        carry[-1, 0] = 1  # it is larger by one more than the digit can hold
        # States: all digits so far are equal, or the column is one larger or smaller if a carry follows.
        wrapped = carry if periodic and site == 0 else torch.zeros_like(carry)
        rows = [
            [eye, up + wrapped, (up + wrapped).T],
            [torch.zeros_like(eye), carry, torch.zeros_like(eye)],
            [torch.zeros_like(eye), torch.zeros_like(eye), carry.T],
        ]
        cores.append(torch.stack([torch.stack(row, dim=-1) for row in rows]))
    cores[0] = cores[0][:1]
    last = torch.tensor([2.0, -1.0, -1.0], dtype=torch.float64) / step**2
    ending = torch.stack([eye * last[0] + up * last[1] + up.T * last[2], carry * last[1], carry.T * last[2]])
    if len(cores) == 1:
        ending = (eye * last[0] + (up + wrapped) * last[1] + (up + wrapped).T * last[2])[None]
    cores[-1] = ending[..., None]
    return MPO([core.to(device=device, dtype=dtype or torch.get_default_dtype()) for core in cores])


def fourier(
    sites: int,
    base: int = 2,
    *,
    inverse: bool = False,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> MPO:
    """Build the unitary discrete Fourier transform `exp(-2 pi i j k / N) / sqrt(N)` with `N = base^sites`.

    The digits of the frequency `j` come out in reverse order, the least significant digit at the first site:
    in this order the bonds are small and do not grow with the number of sites. `MPO.reverse` restores the
    order. Bonds are truncated to a relative error of `eps^(3/4)`, as in `MPO.round`.

    Args:
        sites: number of sites.
        base: size of every site.
        inverse: whether to build the inverse, `exp(+2 pi i j k / N) / sqrt(N)`; `j` is again reversed.
        dtype: complex dtype of the cores; the complex counterpart of torch's default if absent.
        device: device of the cores, torch's default if absent.

    Example:
        >>> transform = tn.qtt.fourier(20, dtype=torch.complex128)
        >>> wave = tn.qtt.exponential(2j * torch.pi * 5 / 2**20, [2] * 20, dtype=torch.complex128)
        >>> spectrum = (transform @ wave).reverse()  # all of the weight is at frequency 5
        >>> round(abs(complex(spectrum[5, 0])), 6), max(transform.bond_dims) <= 12
        (1024.0, True)

    Reference:
        Chen and Lindsey 2024, "Direct interpolative construction of the discrete Fourier transform as a
        matrix product operator".
    """
    count, size = check_size("sites", sites), check_size("base", base, least=2)
    sign = 2j * math.pi if inverse else -2j * math.pi
    # After some sites, the frequency digits so far are a number `s` in [0, 1). What follows depends on `s`
    # only through exp(-2 pi i s t) with `t` in [0, 1), which is interpolated at Chebyshev points.
    nodes = (1 - torch.cos(math.pi * (torch.arange(_NODES, dtype=torch.float64) + 0.5) / _NODES)) / 2
    digits = torch.arange(size, dtype=torch.float64)
    after = (nodes[:, None] + digits) / size  # `s` after one more digit, shape: (left, out)
    phases = torch.exp(sign * after[:, :, None] * digits) / math.sqrt(size)
    # The barycentric formula for Chebyshev points of the first kind.
    order = torch.arange(_NODES, dtype=torch.float64)
    weights = (-1) ** order * torch.sin(math.pi * (order + 0.5) / _NODES)

    def interpolated(points: Tensor) -> Tensor:
        parts = weights / torch.where(points[..., None] == nodes, 1e-300, points[..., None] - nodes)
        return parts / parts.sum(dim=-1, keepdim=True)

    middle = phases[..., None] * interpolated(after)[:, :, None]
    first = torch.exp(sign * (digits / size)[:, None] * digits) / math.sqrt(size)
    first = (first[..., None] * interpolated(digits / size)[:, None])[None]
    last = phases[..., None]
    kind = torch.get_default_dtype().to_complex() if dtype is None else dtype
    single = [first.sum(dim=3, keepdim=True)]
    transform = MPO(single if count == 1 else [first, *[middle] * (count - 2), last])
    tolerance = torch.finfo(kind).eps ** 0.75
    return MPO(transform.round(rel_error=tolerance).to(device, kind).cores)


def _places(dims: Sequence[int], step: float) -> list[Tensor]:
    """Return, for each site, what each digit adds to `x`."""
    sizes = check_sizes("dims", dims)
    return [
        torch.arange(size, dtype=torch.float64) * (step * math.prod(sizes[k + 1 :]))
        for k, size in enumerate(sizes)
    ]


def _state(cores: Sequence[Tensor], dtype: torch.dtype | None, *, real: bool) -> MPO:
    """Make a state of cores without in-legs, `(left, out, right)`."""
    kind = torch.get_default_dtype() if dtype is None else dtype
    if not real and dtype is None:
        kind = kind.to_complex()
    return MPO([(core.real if real else core).to(kind).unsqueeze(2) for core in cores])
