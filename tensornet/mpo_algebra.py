"""Linear algebra on matrices stored as chains of cores `(left, out, in, right)`; no matrix is built.

All functions are pure; `tensornet.MPO` wraps them in a class. A chain has `n` cores and end bonds of size 1;
bond `k` is on the right of core `k`.

Reference: Schollwoeck 2011, "The density-matrix renormalization group in the age of matrix product
states", sections 4 and 5; Oseledets 2011, "Tensor-Train Decomposition", section 3.
"""

import math
from collections.abc import Callable, Sequence
from numbers import Complex, Real
from operator import index
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tensornet._util import outside_autocast
from tensornet.budget import caps_of_bonds
from tensornet.errors import NonFiniteError, ShapeError
from tensornet.linalg.svd import check_finite, largest_element, leading_basis, result_dtype, working_dtype

Cores = tuple[Tensor, ...]

_OVERFLOW = (
    "an operation on operators may have left the range of their dtype: rescale the operators before it, or "
    "convert them with .to(torch.float64)"
)
#: Tensors are rescaled if the exponent of their largest element exceeds this fraction of the largest exponent
#: of their dtype; products of three tensors are then inside the range of the dtype.
_EVEN = 1 / 5


def add(left: Sequence[Tensor], right: Sequence[Tensor]) -> Cores:
    """Add two chains with equal dims; their bond sizes add up."""
    # Without this, a chain whose cores differ much in size could underflow when both chains are joined.
    left, right = (_evened(cores) for cores in _same_dtype(left, right))
    last = len(left) - 1
    if last == 0:
        return (left[0] + right[0],)
    total = []
    for k, (a, b) in enumerate(zip(left, right, strict=True)):
        if k == 0:
            total.append(torch.cat([a, b], dim=3))
        elif k == last:
            total.append(torch.cat([a, b], dim=0))
        else:
            upper = torch.cat([a, a.new_zeros(*a.shape[:3], b.shape[3])], dim=3)
            lower = torch.cat([b.new_zeros(*b.shape[:3], a.shape[3]), b], dim=3)
            total.append(torch.cat([upper, lower], dim=0))
    return tuple(total)


def scale(cores: Sequence[Tensor], factor: complex | Tensor) -> Cores:
    """Multiply a chain by a number by scaling its last core.

    If this core could overflow or underflow, a power of two is distributed over all cores.
    """
    (*first, last), exponent = _split_extremes(cores)
    if not isinstance(factor, Tensor | int | float | complex):  # a Fraction or a NumPy number
        plain = complex if isinstance(factor, Complex) and not isinstance(factor, Real) else float
        factor = plain(factor)
    if not isinstance(factor, Tensor) and (size := abs(factor)) > 0 and math.isfinite(size):
        power = math.frexp(size)[1]
        if abs(power) > _EVEN * math.log2(torch.finfo(last.dtype).max):  # e.g. 1e200 times float32 cores
            factor = factor * 2.0 ** (-power // 2) * 2.0 ** (-power - -power // 2)
            exponent = exponent + power
    if isinstance(factor, complex) or (isinstance(factor, Tensor) and factor.is_complex()):
        last = last.to(torch.promote_types(last.dtype, torch.complex64))  # torch cannot multiply complex32
    scaled = last * factor
    return _evened([*(core.to(scaled.dtype) for core in first), scaled], exponent)


@outside_autocast
def multiply(left: Sequence[Tensor], right: Sequence[Tensor]) -> Cores:
    """Multiply two chains as matrices; the in-dims of `left` must be the out-dims of `right`."""

    def product(a: Tensor, b: Tensor) -> Tensor:
        (w, o, m, v), (c, _, i, d) = a.shape, b.shape
        both = a.permute(0, 1, 3, 2).reshape(-1, m) @ b.transpose(0, 1).reshape(m, -1)
        return both.reshape(w, o, v, c, i, d).permute(0, 3, 1, 4, 2, 5)

    return _site_by_site(product, left, right)


@outside_autocast
def hadamard(left: Sequence[Tensor], right: Sequence[Tensor]) -> Cores:
    """Multiply two chains with equal dims element by element; their bond sizes multiply."""

    def product(a: Tensor, b: Tensor) -> Tensor:
        return a[:, None, :, :, :, None] * b[None, :, :, :, None, :]

    return _site_by_site(product, left, right)


def _site_by_site(
    product: Callable[[Tensor, Tensor], Tensor], left: Sequence[Tensor], right: Sequence[Tensor]
) -> Cores:
    """Multiply the two cores of each site, and fuse each pair of bonds to one bond.

    `product` returns the shape `(left bond of a, left bond of b, out, in, right bond of a, right bond of b)`.
    """
    left, right = _same_dtype(left, right)
    (left, of_left), (right, of_right) = _split_extremes(left), _split_extremes(right)
    products = (product(a, b) for a, b in zip(left, right, strict=True))
    return _distributed([core.flatten(4).flatten(0, 1) for core in products], of_left + of_right)


def kron(left: Sequence[Tensor], right: Sequence[Tensor]) -> Cores:
    """Compute the Kronecker product of two chains: the sites of `left`, then those of `right`."""
    left, right = _same_dtype(left, right)
    return (*left, *right)


def transpose(cores: Sequence[Tensor]) -> Cores:
    """Transpose the matrix of a chain."""
    return tuple(core.transpose(1, 2) for core in cores)


@outside_autocast
def inner(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """Compute the Frobenius inner product `sum conj(left) * right` as a differentiable 0-dimensional tensor.

    16-bit cores are contracted in single precision. Intermediate results cannot overflow. The result is
    infinite only if it is outside the range of the dtype.
    """
    left, right = _same_dtype(left, right)
    dtype = result_dtype(left[0].dtype)  # float32 for 16-bit cores: 256^2 overflows in float16
    transfer, exponent = _transfer([c.to(dtype) for c in left], [c.to(dtype) for c in right])
    return times_power_of_two(transfer[0, 0], exponent)


@outside_autocast
def log_inner(left: Sequence[Tensor], right: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Compute the sign, or phase, of an inner product and the logarithm of its size in double precision.

    The logarithm is `-inf` and the sign 0 for orthogonal chains.
    """
    left, right = _same_dtype(left, right)
    dtype = working_dtype(left[0].dtype)
    transfer, exponent = _transfer([c.to(dtype) for c in left], [c.to(dtype) for c in right])
    return torch.sgn(transfer[0, 0]), transfer[0, 0].abs().log() + exponent * math.log(2)


def _transfer(left: Sequence[Tensor], right: Sequence[Tensor]) -> tuple[Tensor, Tensor | float]:
    """Contract `conj(left)` and `right` over all legs; return a mantissa and a binary exponent.

    The mantissa has the shape `(last bond of left, last bond of right)`.
    """
    like = right[0]
    transfer = torch.ones(1, 1, dtype=like.dtype, device=like.device)
    exponent: Tensor | float = 0.0
    for a, b in zip(left, right, strict=True):
        (a, of_a), (b, of_b) = tamed(a), tamed(b)
        partial = (transfer @ b.flatten(1)).reshape(-1, b.shape[3])  # shape: (left bond * out * in, bond)
        transfer, more = tamed(a.flatten(0, 2).mH @ partial)
        exponent = exponent + of_a + of_b + more
    return transfer, exponent


def leading_projector(dims: Sequence[int], features: int, *, like: Tensor) -> Cores | None:
    """Build, as a chain, the diagonal projector onto the first `features` of `prod(dims)` indices.

    The chain compares the digits of an index with those of `features - 1`, the most significant digit first.
    Its bonds have size 2: value 0 means that all digits so far are equal, and value 1 that the index is
    already smaller.

    Returns:
        The chain, or None if `features` is `prod(dims)` and the projector is the identity.
    """
    if features == math.prod(dims):
        return None
    digits, rest = [], features - 1
    for dim in reversed(dims):
        digits.append(rest % dim)
        rest //= dim
    chain = []
    for dim, digit in zip(dims, reversed(digits), strict=True):
        core = like.new_zeros(2, dim, dim, 2)
        values = torch.arange(dim, device=like.device)
        core[0, values, values, 0] = (values == digit).to(like.dtype)
        core[0, values, values, 1] = (values < digit).to(like.dtype)
        core[1, values, values, 1] = 1
        chain.append(core)
    chain[0] = chain[0][:1]
    chain[-1] = chain[-1].sum(dim=3, keepdim=True)
    return tuple(chain)


def identity_chain(out_dims: Sequence[int], in_dims: Sequence[int], *, like: Tensor) -> Cores:
    """Build the identity matrix as a chain; bonds are 1 if out- and in-dims are equal.

    The digits of the first sites restrict the row index to an interval that starts at `r`, and the column
    index to an interval that starts at `c`. Each value of the next bond stands for one offset `r - c` for
    which the two intervals overlap. After the last site only offset 0 is left.

    Raises:
        ShapeError: `out_dims` and `in_dims` have different lengths.
    """
    if len(out_dims) != len(in_dims):
        raise ShapeError(
            f"Out-dims {tuple(out_dims)} and in-dims {tuple(in_dims)} must have the same number of sites."
        )
    offsets, chain = [0], []
    for k, (rows, columns) in enumerate(zip(out_dims, in_dims, strict=True)):
        row_step, column_step = math.prod(out_dims[k + 1 :]), math.prod(in_dims[k + 1 :])
        entries = [
            (place, row, column, offset + row * row_step - column * column_step)
            for place, offset in enumerate(offsets)
            for row in range(rows)
            for column in range(columns)
            if -row_step < offset + row * row_step - column * column_step < column_step
        ]
        after = sorted({entry[3] for entry in entries})
        core = like.new_zeros(len(offsets), rows, columns, len(after))
        for place, row, column, offset in entries:
            core[place, row, column, after.index(offset)] = 1
        chain.append(core)
        offsets = after
    return tuple(chain)


def mask_padding(cores: Sequence[Tensor], out_features: int, in_features: int) -> Cores:
    """Set the padded rows and columns of a chain to zero; each bond becomes at most four times as large."""
    rows = leading_projector([core.shape[1] for core in cores], out_features, like=cores[0])
    columns = leading_projector([core.shape[2] for core in cores], in_features, like=cores[0])
    masked = tuple(cores)
    if rows is not None:
        masked = multiply(rows, masked)
    if columns is not None:
        masked = multiply(masked, columns)
    return masked


@outside_autocast
def canonicalize(cores: Sequence[Tensor], center: int) -> Cores:
    """Make every core except `center` orthonormal by QR decompositions, differentiably.

    Cores before `center` become left-orthonormal and cores after it right-orthonormal, so that the norm of
    the center is the norm of the operator. QR may reduce the bonds. The diagonal of each triangular factor is
    made real and positive, so the result is unique. As for `torch.linalg.qr`, the gradient exists if the
    columns of each factorized matrix are linearly independent.

    If the norm is outside the range of the dtype, a power of two is distributed over all cores. They are then
    orthonormal up to a factor.

    Args:
        cores: the chain.
        center: site of the center; a negative value counts sites from the end.

    Raises:
        NonFiniteError: the operator contains NaN or infinity.
        ShapeError: the site `center` does not exist.
    """
    sites = len(cores)
    if not _is_place(center, -sites, sites):
        raise ShapeError(f"center={center} is not a site; the chain has {sites}, 0 to {sites - 1}.")
    center = index(center) % sites
    work, exponent = _canonical(cores, center, unique=True)
    return _with_exponent(work, exponent, center, result_dtype(cores[0].dtype))


def _canonical(
    cores: Sequence[Tensor], center: int, *, unique: bool = False
) -> tuple[list[Tensor], Tensor | float]:
    """Compute the canonical form in double precision: a chain and the exponent of a power of two.

    With `unique`, the diagonal of each triangular factor is real and positive.
    """
    qr = _positive_qr if unique else torch.linalg.qr
    refuse_vmap(cores)
    work: list[Tensor] = []
    total: Tensor | float = 0.0
    for core in cores:
        moderate, exponent = tamed(core.to(working_dtype(core.dtype)), finite=True)
        work.append(moderate)
        total = total + exponent
    for k in range(center):
        left, out, in_, right = work[k].shape
        Q, R = qr(work[k].reshape(-1, right))
        work[k] = Q.reshape(left, out, in_, -1)
        after = R @ work[k + 1].flatten(1)
        work[k + 1], exponent = tamed(after.reshape(-1, *work[k + 1].shape[1:]))
        total = total + exponent
    for k in range(len(work) - 1, center, -1):
        left, out, in_, right = work[k].shape
        Q, R = qr(work[k].reshape(left, -1).mH)
        work[k] = Q.mH.reshape(-1, out, in_, right)
        before = work[k - 1].flatten(0, 2) @ R.mH
        work[k - 1], exponent = tamed(before.reshape(*work[k - 1].shape[:3], -1))
        total = total + exponent
    return work, total


def _with_exponent(
    work: Sequence[Tensor], exponent: Tensor | float, center: int, dtype: torch.dtype
) -> Cores:
    """Multiply a canonical chain by `2^exponent`: the center if the norm fits `dtype`, else all cores."""
    norm = float(torch.log2(torch.linalg.vector_norm(work[center].detach())) + exponent)
    limits = torch.finfo(dtype)
    if norm == -math.inf or math.log2(limits.tiny) < norm < math.log2(limits.max):
        scaled = [times_power_of_two(c, exponent) if k == center else c for k, c in enumerate(work)]
    else:
        scaled = list(_distributed(work, exponent))
    result = tuple(core.to(dtype) for core in scaled)
    if not math.isfinite(norm) or scaled[center] is not work[center]:
        for core in result:
            check_finite(core, f"The result in {dtype}", _OVERFLOW)
    return result


def round_chain(
    cores: Sequence[Tensor],
    *,
    max_bond: int | Sequence[int] | None = None,
    rel_error: float | None = None,
) -> tuple[Cores, float]:
    """Truncate the bonds of a chain differentiably: canonicalize it, then truncate each bond by an SVD.

    Derivatives treat the chosen ranks as constants. The gradient exists if, at every bond, the smallest kept
    singular value is positive and differs from the largest discarded one. For functions of the individual
    cores, rather than of the operator, the kept singular values must also be distinct. Otherwise the gradient
    is finite but meaningless. Forward-mode derivatives work, too. There are no second derivatives.

    Args:
        cores: the chain; each core has the shape `(left, out, in, right)`.
        max_bond: limit for all bonds, or a sequence with a limit for each bond.
        rel_error: largest Frobenius error relative to the norm of the chain. The part of this error that one
            bond does not use is available to the next bonds. The error is larger if `max_bond` requires it.

    Returns:
        The left-canonical cores, and the certified relative error `sqrt(sum of discarded squares) / norm`. A
        norm outside the range of the dtype is distributed over the cores; see `canonicalize`.

    Raises:
        BudgetError: the length of `max_bond` is not the number of bonds.
        NonFiniteError: the operator contains NaN or infinity.

    Reference:
        Oseledets 2011, algorithm 2.
    """
    refuse_vmap(cores)
    caps = caps_of_bonds(max_bond, len(cores) - 1)
    live, dtype = needs_gradient(cores), result_dtype(cores[0].dtype)
    elements = math.prod(core.shape[1] * core.shape[2] for core in cores)
    if not live and elements <= max(core.numel() for core in cores):
        tensor, exponent = _contracted(_frozen(cores))
        return round_dense(tensor, exponent, max_bond=max_bond, rel_error=rel_error, dtype=dtype)
    with torch.no_grad():
        canonical, exponent = _canonical(_frozen(cores), 0)
        work, error = _truncated(canonical, caps, rel_error)
    if live:
        work = _with_values(work, _rounded_with_gradient(cores, canonical, work, exponent))
    return _with_exponent(work, exponent, len(work) - 1, dtype), error


def dense_matrix(cores: Sequence[Tensor]) -> tuple[Tensor, Tensor | float]:
    """Contract a chain in double precision to its matrix `(out, in)`, a mantissa and a binary exponent."""
    tensor, exponent = _contracted(cores)
    pairs = [axis for leg in (0, 1) for axis in range(leg, 2 * len(cores), 2)]
    return tensor.permute(pairs).reshape(math.prod(core.shape[1] for core in cores), -1), exponent


def _contracted(cores: Sequence[Tensor]) -> tuple[Tensor, Tensor | float]:
    """Contract a chain in double precision to a tensor `(out, in, out, in, ...)`: mantissa and exponent."""
    exponent: Tensor | float = 0.0
    found = torch.ones(1, 1, dtype=working_dtype(cores[0].dtype), device=cores[0].device)
    for core in _working(cores):
        factor, of_core = tamed(core, finite=True)
        found, more = tamed((found @ factor.flatten(1)).reshape(-1, core.shape[3]))
        exponent = exponent + of_core + more
    return found.reshape([size for core in cores for size in core.shape[1:3]]), exponent


def round_dense(
    tensor: Tensor,
    exponent: Tensor | float,
    *,
    max_bond: int | Sequence[int] | None,
    rel_error: float | None,
    dtype: torch.dtype,
) -> tuple[Cores, float]:
    """Decompose a tensor of shape `(out, in, out, in, ...)`, times `2^exponent`, as `round_chain` does.

    The tensor has double precision, and squares of its elements neither overflow nor underflow.
    """
    sites = tensor.ndim // 2
    caps = caps_of_bonds(max_bond, sites - 1)
    work, error = _truncated_dense(tensor.detach(), caps, rel_error)
    if needs_gradient([tensor]):
        live, rest = [], tensor.reshape(1, -1)
        for value in work[:-1]:
            block = rest.reshape(value.shape[0] * value.shape[1] * value.shape[2], -1)
            live.append(_leading_vectors(block, value))
            rest = live[-1].flatten(0, 2).mH @ block
        work = _with_values(work, [*live, rest.reshape(work[-1].shape)])
    return _with_exponent(work, exponent, sites - 1, dtype), error


@torch.no_grad()
def _truncated_dense(
    tensor: Tensor, caps: Sequence[int | None], rel_error: float | None
) -> tuple[list[Tensor], float]:
    """Truncate the bonds of a tensor `(out, in, out, in, ...)`, from the left to the right."""
    sites = tensor.ndim // 2
    total = float(torch.linalg.vector_norm(tensor)) ** 2
    spent, work, rest = 0.0, [], tensor.reshape(1, -1)
    for k in range(sites - 1):
        out, in_ = tensor.shape[2 * k : 2 * k + 2]
        block = rest.reshape(len(rest) * out * in_, -1)
        allowed = None if rel_error is None else max(rel_error**2 * total - spent, 0.0) / (sites - 1 - k)
        U, after, lost = leading_basis(block, max(total - spent, 0.0), caps[k], allowed)
        spent += lost
        work.append(U.reshape(len(rest), out, in_, -1))
        rest = after
    work.append(rest.reshape(len(rest), *tensor.shape[-2:], 1))
    return work, math.sqrt(spent / total) if total > 0 else 0.0


def _truncated(
    canonical: Sequence[Tensor], caps: Sequence[int | None], rel_error: float | None
) -> tuple[list[Tensor], float]:
    """Truncate the bonds of a chain whose center is its first core, from the left to the right."""
    total = float(torch.linalg.vector_norm(canonical[0])) ** 2
    spent, work, core = 0.0, [], canonical[0]
    for k, following in enumerate(canonical[1:]):
        block = core.flatten(0, 2)
        bonds_left = len(canonical) - 1 - k
        allowed = None if rel_error is None else max(rel_error**2 * total - spent, 0.0) / bonds_left
        U, rest, lost = leading_basis(block, max(total - spent, 0.0), caps[k], allowed)
        spent += lost
        work.append(U.reshape(*core.shape[:3], -1))
        core = (rest @ following.flatten(1)).reshape(-1, *following.shape[1:])
    return [*work, core], math.sqrt(spent / total) if total > 0 else 0.0


def _rounded_with_gradient(
    cores: Sequence[Tensor],
    canonical: Sequence[Tensor],
    rounded: Sequence[Tensor],
    exponent: Tensor | float,
) -> list[Tensor]:
    """Repeat the rounding of a chain with operations that autograd can differentiate.

    Let `M` be an unfolding of the chain and `Q` a constant orthonormal basis of its row space. `M Q` has the
    same left singular vectors as `M`, and their derivatives agree too. So `Q`, which is made of the
    right-canonical cores, is treated as a constant, and no QR is differentiated. (QR has no gradient if a
    bond is larger than its rank, as in sums.) `rounded` is the result that was computed without autograd; it
    fixes the ranks and the phases.
    """
    live = [tamed(core) for core in _working(cores)]
    ends = [torch.ones_like(live[0][0][:1, 0, 0, :1])]  # shape: (bond of the chain, bond of Q)
    for (core, _), frozen in zip(reversed(live[1:]), reversed(canonical[1:]), strict=True):
        end = (core.flatten(0, 2) @ ends[-1]).reshape(core.shape[0], -1) @ frozen.flatten(1).mH
        ends.append(tamed(end)[0])
    before = torch.ones_like(ends[0])  # shape: (bond of the result, bond of the chain)
    passed, result = -exponent, []
    for (core, of_core), value, end in zip(live[:-1], rounded[:-1], reversed(ends[1:]), strict=True):
        site = torch.tensordot(before, core, dims=1)
        result.append(_leading_vectors(torch.tensordot(site, end, dims=1).flatten(0, 2), value))
        before, more = tamed(result[-1].flatten(0, 2).mH @ site.flatten(0, 2))
        passed = passed + of_core + more
    last, of_last = live[-1]
    result.append(times_power_of_two(torch.tensordot(before, last, dims=1), passed + of_last))
    return result


def _leading_vectors(block: Tensor, value: Tensor) -> Tensor:
    """Compute leading left singular vectors differentiably, with the shape and phases of `value`."""
    U, *_ = _LeadingVectors.apply(block, value.shape[3])
    pivot = value.flatten(0, 2).abs().argmax(dim=0, keepdim=True)
    phase = torch.sgn(U.gather(0, pivot)) * torch.sgn(value.flatten(0, 2).gather(0, pivot)).conj()
    return (U * phase.conj()).reshape(value.shape)


def _with_values(values: Sequence[Tensor], live: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors with the given values and the derivatives of `live`: the added difference is zero."""
    return [value + (same - same.detach()) for value, same in zip(values, live, strict=True)]


_NO_SECOND_DERIVATIVES = (
    "from_matrix, round, norm, log_norm, bond_spectrum and bond_entropy have no second derivatives: use "
    "torch.func.grad, vjp, jacrev, jvp or jacfwd once; inner(self, self).real.sqrt() is a norm with all "
    "derivatives."
)


class _LeadingVectors(torch.autograd.Function):
    """Autograd function that returns the first `rank` left singular vectors of a matrix, shape `(m, rank)`.

    It also returns the factors of the whole SVD, as constants for `backward`.

    Let `M = U S V^H`. The derivative of the vector `u_i` has the component `u_j^H du_i = (s_i u_j^H dM v_i +
    s_j conj(u_i^H dM v_j)) / (s_i^2 - s_j^2)` along another singular vector `u_j`, and the component
    `(1 - U U^H) dM v_i / s_i` orthogonal to all of them. The component along `u_i` is set to zero, since the
    caller fixes the phase. Components between vectors with equal singular values are set to zero, too. This
    is correct for functions that do not depend on the basis of the space that these vectors span.
    """

    generate_vmap_rule = True  # for `torch.func.jacrev`

    @staticmethod
    def forward(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
        return U[:, :rank].clone(), U, S, Vh

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: tuple[Tensor, ...]) -> None:
        matrix, ctx.rank = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(matrix, *output[1:])
        ctx.save_for_forward(matrix, *output[1:])

    @staticmethod
    def _factors(S: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """Compute `1 / (s_i^2 - s_j^2)`, shape `(k, rank)`, and `1 / s_i`; 0 where the denominator is."""
        kept, floor = S[:rank], 10 * torch.finfo(S.dtype).eps * S[0]
        gaps = kept.square() - S.square()[:, None]
        return torch.where(gaps.abs() > floor * S[0], 1 / gaps, 0), torch.where(kept > floor, 1 / kept, 0)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> tuple[Tensor | None, ...]:
        matrix, U, S, Vh = ctx.saved_tensors
        factors, inverse = _LeadingVectors._factors(S, ctx.rank)
        moved = tangent @ Vh.mH  # shape: (m, k)
        along = U.mH @ moved
        pairs = along * S + (along * S).mH
        outside = (moved - U @ along)[:, : ctx.rank] * inverse
        found = U @ (pairs[:, : ctx.rank] * factors) + outside
        return _NoSecondDerivative.apply(matrix, found), None, None, None

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        matrix, U, S, Vh = ctx.saved_tensors
        gradient, rank = gradients[0], ctx.rank
        factors, inverse = _LeadingVectors._factors(S, rank)
        along = U.mH @ gradient  # shape: (k, rank)
        pairs = torch.nn.functional.pad(factors * along, (0, len(S) - rank))
        inner = pairs * S + (pairs * S[:, None]).mH
        outside = (gradient - U @ along) * inverse
        found = U @ inner @ Vh + outside @ Vh[:rank]
        if torch.is_grad_enabled():  # only with create_graph=True
            found = _NoSecondDerivative.apply(matrix, found)
        return found, None


@outside_autocast
def norm(cores: Sequence[Tensor]) -> Tensor:
    """Compute the Frobenius norm of a chain differentiably, and accurately even if terms of a sum cancel.

    The result is infinite or 0 if the norm is outside the range of the dtype; use `log_norm` then. The
    gradient is 0 if the norm is 0. There are no second derivatives; use `inner` if you need them.
    """
    size, exponent = _norm(cores)
    return times_power_of_two(size, exponent).to(result_dtype(cores[0].dtype).to_real())


@outside_autocast
def log_norm(cores: Sequence[Tensor]) -> Tensor:
    """Compute the natural logarithm of the Frobenius norm of a chain, differentiably, in double precision.

    The result is `-inf` for the zero operator.
    """
    size, exponent = _norm(cores)
    return size.log() + exponent * math.log(2)


def _norm(cores: Sequence[Tensor]) -> tuple[Tensor, Tensor | float]:
    """Compute the Frobenius norm in double precision: a mantissa and the exponent of a power of two."""
    last = len(cores) - 1
    with torch.no_grad():
        frozen, exponent = _canonical(_frozen(cores), last)
        size = torch.linalg.vector_norm(frozen[last])
    if not needs_gradient(cores):
        return size, exponent
    frozen[last] = frozen[last] / size if float(size) > 0 else frozen[last]

    def project(live: Sequence[Tensor]) -> Tensor:
        """Compute `Re <W / |W|, L>` for `L = live`; its gradient at `L = W` is the gradient of the norm."""
        product, of_product = _transfer(frozen, _working(live))
        return times_power_of_two(product[0, 0].real, of_product - exponent)

    return _Projected.apply(project, size, *cores), exponent


@outside_autocast
def bond_spectrum(cores: Sequence[Tensor], bond: int) -> Tensor:
    """Compute the singular values at a bond of a chain, in descending order, differentiably.

    They are the singular values of the operator reshaped to `(legs up to the bond, legs after the bond)`. As
    for `torch.linalg.svdvals`, the gradient is defined if the values are distinct, or for functions that are
    symmetric in equal values. There are no second derivatives.

    Args:
        cores: the chain.
        bond: position of the bond, `0 ... n - 2`.

    Raises:
        NonFiniteError: the operator contains NaN or infinity, or its singular values are outside the range
            of the dtype.
        ShapeError: the bond does not exist.
    """
    values, exponent = _spectrum(cores, bond)
    single = result_dtype(cores[0].dtype) in (torch.float32, torch.complex64)
    scaled = times_power_of_two(values, exponent).to(torch.float32 if single else torch.float64)
    largest = float(scaled.detach()[0])
    if not math.isfinite(largest) or (largest == 0 and float(values.detach()[0]) > 0):
        raise NonFiniteError(
            f"The largest singular value, about 2^{int(exponent)}, is outside the range of {scaled.dtype}; "
            "rescale the operator first, or use bond_entropy and log_norm, which cannot overflow."
        )
    return scaled


@outside_autocast
def bond_entropy(cores: Sequence[Tensor], bond: int) -> Tensor:
    """Compute the von Neumann entropy at a bond in nats, `-sum p log p` with `p = S^2 / sum S^2`.

    `S` are the singular values at the bond. The entropy is 0 for a Kronecker product and `log(d)` for `d`
    equal singular values, so `exp(entropy)` is an effective bond dimension. The gradient exists under the
    conditions of `bond_spectrum`.
    """
    energies = _spectrum(cores, bond)[0].square()
    p = energies / energies.sum() if float(energies.detach().sum()) > 0 else energies
    return torch.special.entr(p[p > 0]).sum().abs()  # `abs` turns -0 into 0


def _spectrum(cores: Sequence[Tensor], bond: int) -> tuple[Tensor, Tensor | float]:
    """Compute the singular values at a bond: mantissas and the exponent of one common power of two."""
    if not _is_place(bond, 0, len(cores) - 1):
        there = (
            f"{len(cores)} cores have bonds 0 to {len(cores) - 2}" if len(cores) > 1 else "one core has none"
        )
        raise ShapeError(f"Bond {bond} does not exist; {there}.")
    bond = index(bond)
    with torch.no_grad():
        frozen, exponent = _canonical(_frozen(cores), bond)
        left, out, in_, right = frozen[bond].shape
        U, S, Vh = torch.linalg.svd(frozen[bond].reshape(-1, right), full_matrices=False)
    if not needs_gradient(cores):
        return S, exponent
    frozen[bond] = U.reshape(left, out, in_, -1)
    frozen[bond + 1] = torch.tensordot(Vh, frozen[bond + 1], dims=1)

    def project(live: Sequence[Tensor]) -> Tensor:
        """Compute `Re <u_j v_j, L>` for `L = live`, which has the same gradient as the singular values."""
        live = _working(live)
        before, of_before = _transfer(frozen[: bond + 1], live[: bond + 1])
        after, of_after = _transfer(_reversed(frozen[bond + 1 :]), _reversed(live[bond + 1 :]))
        values = (before * after).sum(dim=1).real
        return times_power_of_two(values, of_before + of_after - exponent)

    return _Projected.apply(project, S, *cores), exponent


class _Projected(torch.autograd.Function):
    """Autograd function that returns `value` and whose gradient is that of the function `project`.

    Second derivatives raise an error (see `_NoSecondDerivative`). torch's `once_differentiable` would
    silently make them zero if the incoming gradient is a constant.
    """

    generate_vmap_rule = True  # for `torch.func.jacrev`

    @staticmethod
    def forward(project: Callable[[Sequence[Tensor]], Tensor], value: Tensor, *cores: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.project, value, *cores = inputs
        ctx.save_for_backward(*cores)
        ctx.save_for_forward(value, *cores)

    @staticmethod
    def jvp(ctx: Any, _: None, __: Tensor | None, *tangents: Tensor | None) -> Tensor:
        value, *cores = ctx.saved_tensors
        known = [(core.detach(), tangent) for core, tangent in zip(cores, tangents, strict=True)]
        with torch.enable_grad():
            pull = torch.func.vjp(lambda *live: ctx.project(live), *(core for core, _ in known))[1]

            # The gradient of a linear function of the cotangent: forward-mode derivatives cannot be nested.
            def pairing(cotangent: Tensor) -> Tensor:
                pairs = zip(pull(cotangent), tangents, strict=True)
                return sum((x.conj() * y).real.sum() for x, y in pairs if y is not None)

            found = torch.func.grad(pairing)(torch.zeros_like(value))
        for core in cores:
            found = _NoSecondDerivative.apply(core, found)
        return found

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        cores = [core.detach() for core in ctx.saved_tensors]
        with torch.enable_grad():
            pull = torch.func.vjp(lambda *live: ctx.project(live), *cores)[1]
            gradients = pull(gradient)
        if torch.is_grad_enabled():  # only with create_graph=True
            gradients = tuple(map(_NoSecondDerivative.apply, ctx.saved_tensors, gradients))
        return None, None, *gradients


class _NoSecondDerivative(torch.autograd.Function):
    """Autograd function that returns a gradient and raises an error if it is differentiated again."""

    generate_vmap_rule = True  # for `torch.func.jacrev`

    @staticmethod
    def forward(core: Tensor, gradient: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> None:
        raise RuntimeError(_NO_SECOND_DERIVATIVES)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        raise RuntimeError(_NO_SECOND_DERIVATIVES)


def _frozen(cores: Sequence[Tensor]) -> list[Tensor]:
    """Detach cores; unlike `torch.no_grad`, this also removes the tangents of forward-mode derivatives."""
    return [core.detach() for core in cores]


def refuse_vmap(cores: Sequence[Tensor]) -> None:
    """Raise RuntimeError if `torch.func.vmap` batches one of the tensors."""
    if any(map(_is_batched, cores)):
        raise RuntimeError(
            "from_matrix, canonicalize, round, apply with limits, norm, log_norm, bond_spectrum and "
            "bond_entropy do not support torch.func.vmap: they check values and choose ranks. Loop over the "
            "operators; `inner`, sums, products and `apply` can be vectorized, and "
            "inner(self, self).real.sqrt() is the norm."
        )


def _is_batched(tensor: Tensor) -> bool:
    """Return True for a tensor that `torch.func.vmap` batches; PyTorch has no public function for this."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False


def needs_gradient(cores: Sequence[Tensor]) -> bool:
    """Return True if derivatives with respect to one of the tensors may be computed."""
    if forward_ad._current_level >= 0:  # public only as the context manager `dual_level`
        return True
    return torch.is_grad_enabled() and any(core.requires_grad for core in cores)


def _working(cores: Sequence[Tensor]) -> list[Tensor]:
    return [core.to(working_dtype(core.dtype)) for core in cores]


def _reversed(cores: Sequence[Tensor]) -> list[Tensor]:
    """Reverse the order of the cores of a chain, and swap the two bonds of each core."""
    return [core.permute(3, 1, 2, 0) for core in reversed(cores)]


def _is_place(value: int, first: int, end: int) -> bool:
    try:
        return first <= index(value) < end
    except TypeError:
        return False


def _same_dtype(left: Sequence[Tensor], right: Sequence[Tensor]) -> tuple[Cores, Cores]:
    if left[0].device != right[0].device:
        raise ShapeError(
            f"One operator is on {left[0].device}, the other on {right[0].device}; move one with .to()."
        )
    dtype = torch.promote_types(left[0].dtype, right[0].dtype)
    return tuple(core.to(dtype) for core in left), tuple(core.to(dtype) for core in right)


def _positive_qr(matrix: Tensor) -> tuple[Tensor, Tensor]:
    Q, R = torch.linalg.qr(matrix)
    diagonal = R.diagonal()
    phase = torch.sgn(torch.where(diagonal == 0, torch.ones_like(diagonal), diagonal))
    return Q * phase, R * phase.conj()[:, None]


# --- tensors as `mantissa * 2^exponent`, so that long products neither overflow nor underflow ---------
# Exponents are numbers, or 0-dimensional float64 tensors that are constant for autograd. Multiplying by
# powers of two is exact.


def tamed(tensor: Tensor, *, finite: bool = False) -> tuple[Tensor, Tensor | float]:
    """Split off a power of two, but only if products of such tensors could leave the range of the dtype.

    `torch.func.vmap` and `torch.compile` allow no branch that depends on values, and meta tensors have none;
    the power is then always split off.

    Raises:
        NonFiniteError: the tensor contains NaN or infinity, and `finite` is true.
    """
    if tensor.is_meta or torch.compiler.is_compiling() or _is_batched(tensor):
        return split_exponent(tensor)
    size, limit = largest_element(tensor), torch.finfo(tensor.dtype).max ** _EVEN
    if size == 0 or 1 / limit < size < limit:
        return tensor, 0.0
    if finite:
        check_finite(tensor, "The operator", _OVERFLOW)
    return split_exponent(tensor)


def split_exponent(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Split a tensor into `mantissa * 2^exponent`; the largest absolute mantissa element is in `[1/2, 1)`.

    The exponent is 0 if the tensor is zero or contains NaN or infinity. Autograd treats the exponent as a
    constant.
    """
    exponent = _exponent(tensor)
    return times_power_of_two(tensor, -exponent), exponent


def _exponent(tensor: Tensor) -> Tensor:
    size = tensor.detach().abs().amax().double()
    exponent = torch.frexp(size).exponent.double()
    return torch.where(torch.isfinite(size) & (size > 0), exponent, torch.zeros_like(exponent))


def _split_extremes(cores: Sequence[Tensor]) -> tuple[list[Tensor], Tensor | float]:
    """Split a power of two off each core with a very large or very small largest element.

    Returns:
        The cores, all of moderate size, and the sum of the exponents, usually 0.
    """
    parts = [tamed(core) for core in cores]
    return [core for core, _ in parts], sum((exponent for _, exponent in parts), 0.0)


def _distributed(cores: Sequence[Tensor], exponent: Tensor | float) -> Cores:
    """Multiply a chain by `2^exponent`, an integer power, by scaling all cores about equally."""
    each = exponent // len(cores)
    rest = exponent - each * len(cores)
    return tuple(times_power_of_two(core, each + 1.0 * (k < rest)) for k, core in enumerate(cores))


def _evened(cores: Sequence[Tensor], exponent: Tensor | float = 0.0) -> Cores:
    """Multiply a chain by `2^exponent`, and distribute the size of very large or small cores over all."""
    moderate, extreme = _split_extremes(cores)
    return _distributed(moderate, extreme + exponent)


def times_power_of_two(tensor: Tensor, exponent: Tensor | float) -> Tensor:
    """Compute `tensor * 2^exponent`; intermediate results neither overflow nor underflow."""
    if not isinstance(exponent, Tensor):
        if exponent == 0:
            return tensor
        exponent = torch.tensor(exponent, dtype=torch.float64, device=tensor.device)
    limit = int(math.log2(torch.finfo(tensor.dtype).max)) - 2  # `2^-limit` must not be subnormal either
    first = exponent.clamp(-limit, limit)
    second = (exponent - first).clamp(-limit, limit)  # outside these limits the result is 0 or infinite
    dtype = tensor.real.dtype
    return tensor * torch.exp2(first).to(dtype) * torch.exp2(second).to(dtype)
