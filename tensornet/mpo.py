"""Matrix product operators as objects: what only chains can do.

Every function here is exact linear algebra on cores `(left, out, in, right)`; nothing forms the matrix
except `to_matrix`.
"""

import math
from collections.abc import Sequence

from torch import Tensor

from tensornet.budget import Budget
from tensornet.errors import ShapeError
from tensornet.network import TensorNetwork
from tensornet.svd import Method
from tensornet.topologies.mpo import choose_dims, mpo
from tensornet.topology import Topology
from tensornet.tt_svd import tt_svd


class MPO:
    """A matrix `(out_features, in_features)` as a chain of cores.

    Args:
        cores: tensors of shape `(d_{k-1}, o_k, i_k, d_k)` with `d_0 = d_n = 1`.
        out_features: rows before padding, the product of the `o_k` if absent.
        in_features: columns before padding, the product of the `i_k` if absent.
        error: certified relative Frobenius error against the matrix it was made from.

    Raises:
        ShapeError: neighbouring bonds differ, an end bond is not 1, or a core is not 4-dimensional.
    """

    def __init__(
        self,
        cores: Sequence[Tensor],
        *,
        out_features: int | None = None,
        in_features: int | None = None,
        error: float = 0.0,
    ) -> None:
        _check_chain(cores)
        self.cores = tuple(cores)
        self.error = error
        self._features = (
            out_features or math.prod(core.shape[1] for core in cores),
            in_features or math.prod(core.shape[2] for core in cores),
        )

    @classmethod
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
            A left-canonical MPO whose `error` is the certificate.

        Raises:
            BudgetError: a cap is out of range or cannot be met.
            NonFiniteError: `w` holds NaN or infinity.
            TopologyError: the dims do not fit.

        Reference:
            Oseledets 2011, "Tensor-Train Decomposition", algorithm 1.
        """
        if w.ndim != 2:
            raise ShapeError(f"MPO.from_matrix needs a matrix of shape (out, in), got {tuple(w.shape)}.")
        rows, columns = choose_dims((w.shape[0], w.shape[1]), out_dims, in_dims, sites)
        budget = Budget(max_bond=max_bond, rel_error=rel_error, param_ratio=param_ratio)
        result = tt_svd(w, rows, columns, budget, method=method)
        return cls(result.cores, out_features=w.shape[0], in_features=w.shape[1], error=result.error)

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
        return mpo(
            out_dims=self.out_dims,
            in_dims=self.in_dims,
            bond_dims=self.bond_dims,
            out_features=self.shape[0],
            in_features=self.shape[1],
        )

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


def _check_chain(cores: Sequence[Tensor]) -> None:
    if not cores:
        raise ShapeError("An MPO needs at least one core.")
    bond = 1
    for k, core in enumerate(cores):
        if core.ndim != 4 or core.shape[0] != bond:
            raise ShapeError(
                f"Core {k} has shape {tuple(core.shape)}; expected (left, out, in, right) with left={bond}."
            )
        bond = core.shape[3]
    if bond != 1:
        raise ShapeError(f"The last core ends in a bond of {bond}; both ends of an MPO have bond 1.")
