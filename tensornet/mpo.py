"""Matrix product operators as objects: what only chains can do.

The mathematics is in `tensornet.mpo_algebra`; nothing forms the matrix except `to_matrix`.
"""

import math
from collections.abc import Sequence
from numbers import Number
from typing import Any

from torch import Tensor

from tensornet import interop
from tensornet import mpo_algebra as algebra
from tensornet.budget import Budget
from tensornet.checks import check_dense, check_size
from tensornet.context import outside_autocast
from tensornet.errors import ShapeError
from tensornet.linalg.svd import Method
from tensornet.linalg.tt_svd import tt_svd, tt_svd_stack
from tensornet.network import TensorNetwork
from tensornet.topologies.factored import choose_dims
from tensornet.topologies.mpo import chain
from tensornet.topology import Topology


class MPO:
    """A matrix `(out_features, in_features)` as a chain of cores.

    Args:
        cores: tensors of shape `(d_{k-1}, o_k, i_k, d_k)` with `d_0 = d_n = 1`.
        out_features: rows before padding, the product of the `o_k` if absent.
        in_features: columns before padding, the product of the `i_k` if absent.
        error: certified relative Frobenius error against the matrix it was made from.

    Raises:
        ShapeError: neighbouring bonds differ, an end bond is not 1, a core is no 4-dimensional tensor or has
            another dtype or device than the first, or the features exceed the product of the legs.
    """

    def __init__(
        self,
        cores: Sequence[Tensor],
        *,
        out_features: int | None = None,
        in_features: int | None = None,
        error: float = 0.0,
    ) -> None:
        self.cores = _check_chain(cores)
        self.error = error
        self._features = (
            _features("out_features", out_features, self.out_dims),
            _features("in_features", in_features, self.in_dims),
        )

    @classmethod
    @outside_autocast
    def from_matrix(
        cls,
        w: Tensor,
        *,
        out_dims: Sequence[int] | None = None,
        in_dims: Sequence[int] | None = None,
        sites: int | None = None,
        max_bond: int | None = None,
        rel_error: float | None = None,
        param_ratio: float | None = None,
        method: Method = "auto",
    ) -> "MPO":
        """Decompose a matrix by TT-SVD. Without a budget the result is exact to rounding.

        Args:
            w: shape `(out, in)`, real or complex, any size (padded where the dims need it).
            out_dims: sizes of the out-legs; balanced factors if absent.
            in_dims: sizes of the in-legs; balanced factors if absent.
            sites: number of cores where dims are absent, 3 by default.
            max_bond: cap on every bond.
            rel_error: largest relative Frobenius error.
            param_ratio: largest share of the dense parameters.
            method: see `truncated_svd`.

        Returns:
            An MPO whose `error` is the certificate; canonical around one site, the others orthonormal
            (`canonicalize` moves that site). Bonds that nothing cuts have identities as cores.

        Raises:
            BudgetError: a cap is out of range or cannot be met.
            NonFiniteError: `w` holds NaN or infinity.
            ShapeError: `w` is no floating matrix.
            TopologyError: the dims do not fit.

        Reference:
            Oseledets 2011, "Tensor-Train Decomposition", algorithm 1.
        """
        check_dense(w, "MPO.from_matrix", "a matrix of shape (out, in)", 2)
        rows, columns = choose_dims((w.shape[0], w.shape[1]), out_dims, in_dims, sites)
        budget = Budget(max_bond=max_bond, rel_error=rel_error, param_ratio=param_ratio)
        result = tt_svd(w, rows, columns, budget, method=method)
        return cls(result.cores, out_features=w.shape[0], in_features=w.shape[1], error=result.error)

    @classmethod
    @outside_autocast
    def from_matrices(
        cls,
        batch: Tensor,
        *,
        out_dims: Sequence[int] | None = None,
        in_dims: Sequence[int] | None = None,
        sites: int | None = None,
        max_bond: int | None = None,
        rel_error: float | None = None,
        param_ratio: float | None = None,
        method: Method = "auto",
    ) -> "list[MPO]":
        """Decompose a stack of matrices in one batched call; all get the same bonds.

        Args:
            batch: shape `(items, out, in)`.
            out_dims, in_dims, sites, max_bond, param_ratio, method: as in `from_matrix`.
            rel_error: holds for every item; bonds are the largest that one of them needs.

        Returns:
            One MPO for each item, with its own certificate.

        Raises: as in `from_matrix`.
        """
        check_dense(batch, "MPO.from_matrices", "a stack of shape (items, out, in)", 3)
        shape = (batch.shape[1], batch.shape[2])
        rows, columns = choose_dims(shape, out_dims, in_dims, sites)
        budget = Budget(max_bond=max_bond, rel_error=rel_error, param_ratio=param_ratio)
        stack = tt_svd_stack(batch, rows, columns, budget, method=method)
        return [
            cls(
                [core[item] for core in stack.cores], out_features=shape[0], in_features=shape[1], error=error
            )
            for item, error in enumerate(stack.errors)
        ]

    def __repr__(self) -> str:
        return (
            f"MPO({self.shape}, out_dims={self.out_dims}, in_dims={self.in_dims}, "
            f"bond_dims={self.bond_dims}, {self.num_params:,} parameters)"
        )

    @property
    def out_dims(self) -> tuple[int, ...]:
        """Sizes of the out-legs."""
        return tuple(core.shape[1] for core in self.cores)

    @property
    def in_dims(self) -> tuple[int, ...]:
        """Sizes of the in-legs."""
        return tuple(core.shape[2] for core in self.cores)

    @property
    def bond_dims(self) -> tuple[int, ...]:
        """The `n - 1` inner bonds."""
        return tuple(core.shape[3] for core in self.cores[:-1])

    @property
    def shape(self) -> tuple[int, int]:
        """`(out_features, in_features)`."""
        return self._features

    @property
    def num_params(self) -> int:
        """Number of stored elements, padding included."""
        return sum(core.numel() for core in self.cores)

    @property
    def topology(self) -> Topology:
        """The chain as data."""
        return chain(self.out_dims, self.in_dims, self.bond_dims, self.shape)

    @property
    def network(self) -> TensorNetwork:
        """The same operator as a general network, sharing the cores."""
        return TensorNetwork(self.topology, self.cores)

    def to_matrix(self) -> Tensor:
        """Dense matrix, shape `(out_features, in_features)`."""
        return self.network.to_matrix()

    def apply(self, x: Tensor) -> Tensor:
        """Apply to `x: (..., in_features)`, giving `(..., out_features)`."""
        return self.network.apply(x)

    # --- algebra ---------------------------------------------------------------------------------

    def __add__(self, other: "MPO") -> "MPO":
        """Sum; bonds add up. The certificate of the result combines both."""
        if not isinstance(other, MPO):
            return NotImplemented
        self._check_same_dims(other, "added")
        total = self._like(algebra.add(self.cores, other.cores))
        if self.error or other.error:
            total.error = _relative(_absolute(self) + _absolute(other), total)
        return total

    def __sub__(self, other: "MPO") -> "MPO":
        """Difference; bonds add up."""
        if not isinstance(other, MPO):
            return NotImplemented
        return self + (-other)

    def __neg__(self) -> "MPO":
        return self * -1

    def __mul__(self, factor: complex | Tensor) -> "MPO":
        """Product with a number. For the product of two operators use `@`."""
        if not isinstance(factor, Number | Tensor):
            return NotImplemented
        if isinstance(factor, Tensor) and factor.numel() != 1:
            raise ShapeError(
                f"An MPO is multiplied by one number, got a tensor of shape {tuple(factor.shape)}."
            )
        factor = factor.reshape(()) if isinstance(factor, Tensor) else factor
        return self._like(algebra.scale(self.cores, factor), error=self.error)

    __rmul__ = __mul__

    def __truediv__(self, factor: complex | Tensor) -> "MPO":
        """Quotient by a number."""
        if not isinstance(factor, Number | Tensor):
            return NotImplemented
        return self * (1 / factor)

    def __matmul__(self, other: "MPO") -> "MPO":
        """Product of two operators; bonds multiply. Padding of the shared legs is cut out exactly.

        Raises:
            ShapeError: the in-dims of the left are not the out-dims of the right.
        """
        if not isinstance(other, MPO):
            return NotImplemented
        if self.in_dims != other.out_dims or self.shape[1] != other.shape[0]:
            raise ShapeError(
                f"Cannot multiply {self.shape} by {other.shape}: in_dims {self.in_dims} of the left must be "
                f"out_dims {other.out_dims} of the right."
            )
        left = self.cores
        keep = algebra.leading_projector(self.in_dims, self.shape[1], like=left[0])
        if keep is not None:
            left = algebra.multiply(left, keep)
        cores = algebra.multiply(left, other.cores)
        product = MPO(cores, out_features=self.shape[0], in_features=other.shape[1])
        if self.error or other.error:
            # |A0 B0 - A B| <= |A0 - A| |B0| + |A| |B0 - B|
            bound = _absolute(self) * (float(other.norm()) + _absolute(other))
            product.error = _relative(bound + float(self.norm()) * _absolute(other), product)
        return product

    def transpose(self) -> "MPO":
        """The transposed operator, shape `(in_features, out_features)`."""
        return MPO(
            algebra.transpose(self.cores),
            out_features=self.shape[1],
            in_features=self.shape[0],
            error=self.error,
        )

    def conj(self) -> "MPO":
        """The complex conjugate."""
        return self._like([core.conj() for core in self.cores], error=self.error)

    def adjoint(self) -> "MPO":
        """The conjugate transpose."""
        return self.transpose().conj()

    def canonicalize(self, *, center: int = -1) -> "MPO":
        """The same operator, orthonormal on both sides of `center`. See `mpo_algebra.canonicalize`."""
        return self._like(algebra.canonicalize(self.cores, center), error=self.error)

    @outside_autocast
    def round(self, *, max_bond: int | None = None, rel_error: float | None = None) -> "MPO":
        """Cut the bonds, at most `max_bond` and at most `rel_error` away from *this* operator.

        Returns:
            A left-canonical MPO. Its `error` counts from the matrix this one was made from: with `e` the
            certificate here and `d` of the cut, `e + d (1 + e)`.

        Raises:
            BudgetError: a cap is out of range.
        """
        Budget(max_bond=max_bond, rel_error=rel_error)
        cores, cut = algebra.round_chain(self._masked, max_bond=max_bond, rel_error=rel_error)
        return self._like(cores, error=self.error + (cut * (1 + self.error) if cut else 0.0))

    def norm(self) -> Tensor:
        """Frobenius norm, a 0-dimensional tensor without gradient (`inner` has one)."""
        return algebra.norm(self._masked)

    def inner(self, other: "MPO") -> Tensor:
        """Frobenius inner product `sum conj(self) * other`, a 0-dimensional tensor.

        Raises:
            ShapeError: dims or shapes differ.
        """
        self._check_same_dims(other, "compared")
        return algebra.inner(self._masked, other.cores)

    def bond_spectrum(self, k: int) -> Tensor:
        """Singular values across bond `k` (on the right of core `k`), descending."""
        return algebra.bond_spectrum(self._masked, k)

    def bond_entropy(self, k: int) -> Tensor:
        """Entanglement entropy across bond `k` in nats. See `mpo_algebra.bond_entropy`."""
        return algebra.bond_entropy(self._masked, k)

    # --- other libraries -------------------------------------------------------------------------

    def to_quimb(self) -> Any:
        """A quimb `MatrixProductOperator`. See `tensornet.interop`."""
        return interop.to_quimb(self.cores)

    @classmethod
    def from_quimb(cls, operator: Any) -> "MPO":
        """From a quimb `MatrixProductOperator`, rectangular sites included."""
        return cls(interop.from_quimb(operator))

    def to_tensorly(self) -> Any:
        """A TensorLy `TTMatrix`."""
        return interop.to_tensorly(self.cores)

    @classmethod
    def from_tensorly(cls, operator: Any) -> "MPO":
        """From a TensorLy `TTMatrix`."""
        return cls(interop.from_tensorly(operator))

    def to_torchtt(self) -> Any:
        """A `torchtt.TT` matrix."""
        return interop.to_torchtt(self.cores)

    @classmethod
    def from_torchtt(cls, operator: Any) -> "MPO":
        """From a `torchtt.TT` matrix."""
        return cls(interop.from_torchtt(operator))

    # --- inside ----------------------------------------------------------------------------------

    @property
    def _masked(self) -> tuple[Tensor, ...]:
        """Cores of the same operator with zeros in the padding, so that padding has no norm."""
        return algebra.mask_padding(self.cores, *self.shape)

    def _like(self, cores: Sequence[Tensor], *, error: float = 0.0) -> "MPO":
        return MPO(cores, out_features=self.shape[0], in_features=self.shape[1], error=error)

    def _check_same_dims(self, other: "MPO", what: str) -> None:
        if not isinstance(other, MPO):
            raise ShapeError(f"Only an MPO can be {what} with an MPO, got {type(other).__name__}.")
        mine = (self.shape, self.out_dims, self.in_dims)
        if mine != (theirs := (other.shape, other.out_dims, other.in_dims)):
            raise ShapeError(
                f"Only MPOs with equal shape, out_dims and in_dims can be {what}: {mine} and {theirs}."
            )


def _absolute(operator: MPO) -> float:
    """Bound of the Frobenius distance to the origin: `|W0 - W| <= e |W0|` and `|W0| <= |W| / (1 - e)`."""
    if operator.error == 0:
        return 0.0
    return operator.error * float(operator.norm()) / (1 - operator.error) if operator.error < 1 else math.inf


def _relative(distance: float, operator: MPO) -> float:
    """The same bound relative to the origin of `operator`, whose norm is at least `|W| - distance`."""
    size = float(operator.norm()) - distance
    return distance / size if size > 0 else math.inf


def _features(name: str, features: int | None, dims: tuple[int, ...]) -> int:
    if features is None:
        return math.prod(dims)
    if check_size(name, features, error=ShapeError) > math.prod(dims):
        raise ShapeError(f"{name}={features} is more than the legs {dims} of the cores hold.")
    return features


def _check_chain(cores: Sequence[Tensor]) -> tuple[Tensor, ...]:
    cores = tuple(cores)
    if not cores:
        raise ShapeError("An MPO needs at least one core.")
    bond = 1
    for k, core in enumerate(cores):
        if not isinstance(core, Tensor):
            raise ShapeError(f"Core {k} must be a torch.Tensor, got {type(core).__name__}.")
        if (core.dtype, core.device) != (cores[0].dtype, cores[0].device):
            raise ShapeError(
                f"Core {k} is {core.dtype} on {core.device}, the first core is {cores[0].dtype} on "
                f"{cores[0].device}; all cores must agree."
            )
        if core.ndim != 4 or core.shape[0] != bond or 0 in core.shape:
            raise ShapeError(
                f"Core {k} has shape {tuple(core.shape)}; expected (left, out, in, right) >= 1, left={bond}."
            )
        bond = core.shape[3]
    if bond != 1:
        raise ShapeError(f"The last core ends in a bond of {bond}; both ends of an MPO have bond 1.")
    return cores
