"""The class `MPO`: matrix product operators and states with their arithmetic, rounding and certificates.

The functions on cores are in `tensornet.mpo_algebra` and `tensornet.mpo_states`. Only `to_matrix` and
`np.asarray` build the dense matrix.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from numbers import Number
from operator import index
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tensornet import cross, interop
from tensornet import mpo_algebra as algebra
from tensornet import mpo_states as states
from tensornet._util import check_dense, check_size, check_sizes, outside_autocast, refuse_transforms
from tensornet.budget import Budget
from tensornet.errors import BudgetError, ShapeError
from tensornet.linalg.svd import (
    Method,
    check_finite,
    check_rel_error,
    default_tolerance,
    frobenius,
    rounding_error,
    safe_scale,
    working_dtype,
)
from tensornet.linalg.tt_svd import has_full_bonds, pad_matrix, tt_svd_stack
from tensornet.mpo_product import SMALLEST_ERROR, compressed_product
from tensornet.mpo_terms import Term, cores_of_terms
from tensornet.network import TensorNetwork, random_cores
from tensornet.topologies.factored import choose_dims
from tensornet.topologies.mpo import chain, mpo
from tensornet.topology import Topology

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = NDArray[Any]


class MPO:
    """Matrix product operator: a matrix `(out_features, in_features)` stored as a chain of cores.

    A matrix product state (MPS) is an MPO whose in-legs have size 1: a matrix with one column. `len(H)` is
    the number of sites, `H.cores[k]` is core `k`, and `H[i, j]` is an entry of the matrix. `H @ x` multiplies
    by a vector, a matrix, a state or another operator, `H ** n` is a power, and `np.asarray(H)` is the dense
    matrix. Methods that return an MPO or a tensor are differentiable unless their first line says otherwise.

    Args:
        cores: tensors or NumPy arrays; core `k` has the shape `(d_{k-1}, o_k, i_k, d_k)`, with
            `d_0 = d_n = 1`.
        out_features: number of rows without padding; the product of the `o_k` if absent.
        in_features: number of columns without padding; the product of the `i_k` if absent.
        error: certified relative Frobenius error with respect to the matrix that the operator approximates.

    Raises:
        ShapeError: neighbouring bonds differ, an end bond is not 1, a core is not a 4-dimensional tensor,
            cores differ in dtype or device, or there are more features than the product of the leg sizes.

    Example:
        >>> operator = tn.MPO([torch.ones(1, 2, 2, 3), torch.ones(3, 4, 2, 1)])
        >>> operator.shape, operator.bond_dims, len(operator)
        ((8, 4), (3,), 2)
    """

    #: Makes `array @ mpo` call `__rmatmul__` once; otherwise NumPy would multiply every element by the MPO.
    __array_ufunc__ = None

    def __init__(
        self,
        cores: Sequence[Tensor | Array],
        *,
        out_features: int | None = None,
        in_features: int | None = None,
        error: float = 0.0,
    ) -> None:
        self.cores = _check_chain([_from_numpy(core) for core in cores])
        self.error = error
        #: Relative Frobenius error of the truncation that made this operator, by `from_matrix` or `round`,
        #: with respect to what was truncated; 0 if nothing was truncated.
        self.truncation_error = 0.0
        #: Logarithm of a bound on the absolute error; None if `error` gives the tightest known bound.
        self._log_distance: float | None = None
        self._features = (
            _features("out_features", out_features, self.out_dims),
            _features("in_features", in_features, self.in_dims),
        )

    @classmethod
    @outside_autocast
    def from_matrix(
        cls,
        w: Tensor | Array,
        *,
        out_dims: Sequence[int] | None = None,
        in_dims: Sequence[int] | None = None,
        sites: int | None = None,
        max_bond: int | Sequence[int] | None = None,
        rel_error: float | None = None,
        param_ratio: float | None = None,
        method: Method = "auto",
    ) -> "MPO":
        """Decompose a matrix into an MPO by TT-SVD.

        The cores are differentiable functions of the matrix, under the conditions of `round`. Detach the
        matrix if you need no derivatives, since the SVDs of large matrices are then much faster.

        If no limit is given, or none that truncates anything, the relative error is at most `eps^(3/4)`:
        1.8e-12 in double and 6.4e-6 in single precision. The bonds are then the numerical ranks; an
        exponential, for example, has bond 1. A limit that truncates a bond keeps no numerical zeros there.
        (In every precision, quimb's `from_dense` truncates at 1e-10 of the largest singular value of each
        bond, and torchTT's `TT` at a relative error of 1e-10.) If no bond can be truncated, the result is
        exact and some cores are identities.

        Args:
            w: the matrix, shape `(out, in)`, real or complex, of any size; padded if the dims require it.
            out_dims: sizes of the out-legs; balanced factors of `out` if absent.
            in_dims: sizes of the in-legs; balanced factors of `in` if absent.
            sites: number of cores if both dims are absent, 3 by default.
            max_bond: limit for all bonds, or a sequence with a limit for each bond.
            rel_error: largest relative Frobenius error.
            param_ratio: largest number of parameters, as a fraction of `out * in`.
            method: algorithm of each SVD; see `truncated_svd`.

        Returns:
            An MPO whose `error` is the certificate. The chain is canonical: all cores but one are orthonormal
            (`canonicalize` chooses which core is not).

        Raises:
            BudgetError: a limit is out of range or cannot be met.
            NonFiniteError: `w` contains NaN or infinity.
            ShapeError: `w` is not a matrix of floating-point or complex numbers.
            TopologyError: the dims do not fit the shape of the matrix.

        Example:
            >>> x = torch.arange(64, dtype=torch.float64) / 64
            >>> tn.MPO.from_matrix(torch.exp(x)[:, None] * torch.exp(-x), sites=3).bond_dims
            (1, 1)

        Reference:
            Oseledets 2011, "Tensor-Train Decomposition", algorithm 1.
        """
        matrix: Tensor = _from_numpy(w)
        check_dense(matrix, "MPO.from_matrix", "a matrix of shape (out, in)", 2)
        algebra.refuse_vmap([matrix])
        live = algebra.needs_gradient([matrix])
        (operator,) = cls._from_matrices(
            matrix[None].detach() if live else matrix[None],
            out_dims=out_dims,
            in_dims=in_dims,
            sites=sites,
            max_bond=max_bond,
            rel_error=rel_error,
            param_ratio=param_ratio,
            method=method,
        )
        return operator._decomposed_again(matrix, max_bond, rel_error, param_ratio) if live else operator

    @classmethod
    @outside_autocast
    def from_matrices(
        cls,
        batch: Tensor | Array,
        *,
        out_dims: Sequence[int] | None = None,
        in_dims: Sequence[int] | None = None,
        sites: int | None = None,
        max_bond: int | Sequence[int] | None = None,
        rel_error: float | None = None,
        param_ratio: float | None = None,
        method: Method = "auto",
    ) -> "list[MPO]":
        """Decompose each matrix of a stack into an MPO; all MPOs have the same bonds (not differentiable).

        Args:
            batch: the matrices, shape `(items, out, in)`.
            out_dims, in_dims, sites, max_bond, param_ratio, method: as in `from_matrix`.
            rel_error: largest relative Frobenius error of each item. Each bond is as large as the most
                demanding item requires.

        Returns:
            One MPO for each item, each with its own certificate.

        Raises: as in `from_matrix`.

        Example:
            >>> [mpo.bond_dims for mpo in tn.MPO.from_matrices(torch.ones(2, 8, 8), sites=3)]
            [(1, 1), (1, 1)]
        """
        stacked: Tensor = _from_numpy(batch)
        check_dense(stacked, "MPO.from_matrices", "a stack of shape (items, out, in)", 3)
        refuse_transforms(stacked, "MPO.from_matrices")
        return cls._from_matrices(
            stacked,
            out_dims=out_dims,
            in_dims=in_dims,
            sites=sites,
            max_bond=max_bond,
            rel_error=rel_error,
            param_ratio=param_ratio,
            method=method,
        )

    @classmethod
    def _from_matrices(
        cls,
        stacked: Tensor,
        *,
        out_dims: Sequence[int] | None,
        in_dims: Sequence[int] | None,
        sites: int | None,
        max_bond: int | Sequence[int] | None,
        rel_error: float | None,
        param_ratio: float | None,
        method: Method,
    ) -> "list[MPO]":
        shape = (stacked.shape[1], stacked.shape[2])
        rows, columns = choose_dims(shape, out_dims, in_dims, sites)
        budget = Budget(max_bond=max_bond, rel_error=rel_error, param_ratio=param_ratio)
        check_finite(stacked, "The matrix")
        cores, errors, bound_by = tt_svd_stack(stacked, rows, columns, budget, method=method)
        tolerance = default_tolerance(stacked.dtype)
        if (
            rel_error is None
            and bound_by == "exact"
            and not has_full_bonds(stacked, rows, columns, tolerance)
        ):
            budget = replace(budget, rel_error=tolerance)
            cores, errors, _ = tt_svd_stack(stacked, rows, columns, budget, method=method)
        found = []
        for item, error in enumerate(errors):
            limits = {"max_bond": max_bond, "param_ratio": param_ratio}
            check_rel_error(error, rel_error, limits, stacked.dtype)
            chosen = [core[item] for core in cores]
            found.append(cls(chosen, out_features=shape[0], in_features=shape[1], error=error))
            found[-1].truncation_error = error
            if error > 0:
                found[-1]._log_distance = math.log(error) + math.log(frobenius(stacked[item]))
        return found

    @classmethod
    def from_function(
        cls,
        function: Callable[..., Tensor],
        shape: tuple[int, int] | None = None,
        *,
        out_dims: Sequence[int] | None = None,
        in_dims: Sequence[int] | None = None,
        sites: int | None = None,
        max_bond: int | Sequence[int] | None = None,
        rel_error: float | None = None,
        sweeps: int = 40,
        start: Tensor | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> "tuple[MPO, cross.CrossReport]":
        """Approximate a function of indices, or a matrix that is never built, by cross approximation.

        With `shape`, `function(rows, columns)` returns elements of the matrix. Without it, the result is a
        state over `out_dims`, an MPO with in-legs of size 1, and `function(indices)` returns its elements for
        indices of shape `(points, sites)`. All indices are int64 tensors, and the values have the shape
        `(points,)`. They determine the dtype and the device of the cores.

        The cores are differentiable functions of the values at the chosen indices, so parameters of
        `function` have gradients. Derivatives treat the choice of indices as constant.

        Args:
            function: vectorized function with real or complex values.
            shape: shape `(out_features, in_features)` of the matrix. Padding is set to zero.
            out_dims, in_dims, sites: as in `from_matrix`. Cost and memory grow with the leg sizes
                `out * in`, so use many sites with small legs.
            max_bond: limit for all bonds, or a sequence with a limit for each bond.
            rel_error: estimated error at which the sweeps end, `eps^(3/4)` by default.
            sweeps: largest number of sweeps over all bonds, in turn backward and forward.
            start: indices that are evaluated first, shape `(points, sites)`, or `(points, 2)` with `shape`.
                Use it if the function is small almost everywhere.
            generator: generator of the random indices, on the CPU; by default, seeded with 0.
            device: device of the indices, torch's default if absent.

        Returns:
            The MPO, and a report with the number of evaluations and an estimate of the error. The `error` of
            the MPO is infinite: no bound is known, because the function is not evaluated everywhere.

        Raises:
            BudgetError: a limit is out of range, or the estimated error exceeds `rel_error` after the last
                sweep.
            MemoryLimitError: the values of one bond do not fit in memory.
            NonFiniteError: the function is NaN or infinite at an index; the message names it.
            ShapeError: the function returns another shape, or the arguments contradict each other.
            TopologyError: the dims do not fit the shape of the matrix.

        Example:
            >>> hilbert, report = tn.MPO.from_function(
            ...     lambda i, j: 1 / (i + j + 1).double(), (2**20, 2**20), sites=20, rel_error=1e-8
            ... )
            >>> hilbert.shape, report.estimated_error < 1e-8
            ((1048576, 1048576), True)

        Reference:
            Oseledets and Tyrtyshnikov 2010, "TT-cross approximation for multidimensional arrays"; Nunez
            Fernandez et al. 2024, "Learning tensor networks with tensor cross interpolation".
        """
        budget = Budget(max_bond=max_bond, rel_error=rel_error)
        check_size("sweeps", sweeps)
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        device = torch.get_default_device() if device is None else torch.device(device)
        limits: tuple[int, ...]
        if shape is not None:
            rows, columns = choose_dims(shape, out_dims, in_dims, sites)
            of_indices, limits = cross.matrix_elements(function, shape, rows, columns), shape
        elif out_dims is None or in_dims is not None or sites not in (None, len(out_dims)):
            raise ShapeError(
                "from_function without shape= makes a state: give out_dims=, and neither in_dims= nor "
                "another number of sites. For a matrix give shape=(out_features, in_features)."
            )
        else:
            rows = limits = check_sizes("out_dims", out_dims)
            columns, of_indices = (1,) * len(rows), function

        def to_digits(indices: Tensor) -> Tensor:
            return indices if shape is None else cross.leg_indices(indices, rows, columns)

        def draw(count: int) -> Tensor:
            drawn = [torch.randint(limit, (count,), generator=generator, device="cpu") for limit in limits]
            return to_digits(torch.stack(drawn, dim=1).to(device))

        def describe(digits: Tensor) -> str:
            if shape is None:
                return f"index {tuple(digits.tolist())}"
            row, column = cross.matrix_indices(digits[None], rows, columns)
            return f"row {int(row)}, column {int(column)}"

        cores, report = cross.cross(
            cross.Values(of_indices, describe),
            [out * in_ for out, in_ in zip(rows, columns, strict=True)],
            draw=draw,
            start=to_digits(_check_start(start, limits).to(device)),
            generator=generator,
            caps=budget.caps_of_bonds(len(rows) - 1),
            rel_error=budget.rel_error,
            sweeps=sweeps,
        )
        if budget.rel_error is not None and report.estimated_error > budget.rel_error:
            raise BudgetError(
                f"The estimated error {report.estimated_error:.3g} exceeds rel_error={rel_error} after "
                f"{report.sweeps} sweeps with bonds {tuple(core.shape[2] for core in cores[:-1])}: raise "
                "max_bond, sweeps or rel_error, or name important indices by start=."
            )
        legs = zip(cores, rows, columns, strict=True)
        chain = [core.reshape(len(core), out, in_, -1) for core, out, in_ in legs]
        found = cls(
            chain,
            out_features=None if shape is None else shape[0],
            in_features=None if shape is None else shape[1],
            error=math.inf,
        )
        return found, report

    @classmethod
    def identity(
        cls,
        out_dims: Sequence[int],
        in_dims: Sequence[int] | int | None = None,
        *,
        features: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> "MPO":
        """Build the identity matrix as an MPO; its bonds are 1 if in- and out-dims are equal.

        Args:
            out_dims: sizes of the out-legs.
            in_dims: sizes of the in-legs, `out_dims` if absent. Different dims with the same product give
                the same matrix with larger bonds.
            features: number of rows and of columns without padding; if absent, the smaller of the products of
                `out_dims` and of `in_dims`.
            dtype: dtype of the cores, torch's default if absent.
            device: device of the cores, torch's default if absent.

        Raises:
            ShapeError: `out_dims` and `in_dims` have different lengths, or `features` exceeds the product of
                either.

        Example:
            >>> tn.MPO.identity((2, 3)).to_matrix().equal(torch.eye(6))
            True
        """
        rows, columns = _both_dims(out_dims, in_dims)
        size = min(math.prod(rows), math.prod(columns)) if features is None else features
        cores = algebra.identity_chain(rows, columns, like=torch.zeros((), dtype=dtype, device=device))
        return cls(cores, out_features=size, in_features=size)

    @classmethod
    def zeros(
        cls,
        out_dims: Sequence[int],
        in_dims: Sequence[int] | int | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> "MPO":
        """Build the zero operator, or the zero state if `in_dims` is 1; its bonds are 1.

        Args:
            out_dims: sizes of the out-legs.
            in_dims: sizes of the in-legs, `out_dims` if absent; 1 stands for a 1 at every site.
            dtype: dtype of the cores, torch's default if absent.
            device: device of the cores, torch's default if absent.

        Example:
            >>> tn.MPO.zeros((2, 3)).shape, tn.MPO.zeros((2, 3), 1).shape
            ((6, 6), (6, 1))
        """
        legs = zip(*_both_dims(out_dims, in_dims), strict=True)
        return cls([torch.zeros(1, rows, columns, 1, dtype=dtype, device=device) for rows, columns in legs])

    @classmethod
    def random(
        cls,
        out_dims: Sequence[int],
        in_dims: Sequence[int] | int | None = None,
        *,
        max_bond: int | Sequence[int],
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> "MPO":
        """Draw a random operator, or a random state if `in_dims` is 1, with Gaussian cores and norm 1.

        Args:
            out_dims: sizes of the out-legs.
            in_dims: sizes of the in-legs, `out_dims` if absent; 1 stands for a 1 at every site.
            max_bond: size of all bonds, or a sequence with a size for each bond; bonds near the ends are
                smaller if their legs cannot fill them.
            generator: random number generator; torch's global generator if absent.
            dtype: dtype of the cores, real or complex, torch's default if absent.
            device: device of the cores. If absent, it is the device of the generator, or torch's default
                device.

        Example:
            >>> state = tn.MPO.random([2] * 8, 1, max_bond=4, generator=torch.Generator().manual_seed(0))
            >>> state.bond_dims, round(float(state.norm()), 4)
            ((2, 4, 4, 4, 4, 4, 2), 1.0)
        """
        rows, columns = _both_dims(out_dims, in_dims)
        topology = mpo(out_dims=rows, in_dims=columns, max_bond=max_bond)
        return cls(random_cores(topology, generator=generator, dtype=dtype, device=device)).normalize()

    @classmethod
    def product_state(cls, vectors: Sequence[Tensor | Array] | str) -> "MPO":
        """Build the Kronecker product of one vector for each site, a state with bonds of 1.

        Args:
            vectors: the vectors, or a string of bits for a basis state of sites of size 2, in torch's default
                dtype.

        Raises:
            ShapeError: an item is not a vector, a character is not a bit, or the vectors differ in dtype or
                device.

        Example:
            >>> tn.MPO.product_state("010").to_matrix().flatten()
            tensor([0., 0., 1., 0., 0., 0., 0., 0.])
            >>> up, down = torch.eye(2)
            >>> tn.MPO.product_state([up, down, up]).to_matrix().flatten()
            tensor([0., 0., 1., 0., 0., 0., 0., 0.])
        """
        if isinstance(vectors, str):
            if not vectors or set(vectors) - {"0", "1"}:
                raise ShapeError(
                    f"A basis state is a string of the bits 0 and 1, one for each site, got {vectors!r}; for "
                    "sites of another size, give one vector for each site."
                )
            return cls.product_state([torch.eye(2)[int(bit)] for bit in vectors])
        cores = [_from_numpy(vector) for vector in vectors]
        for site, vector in enumerate(cores):
            check_dense(vector, "MPO.product_state", f"a vector at site {site}", 1)
        return cls([vector.reshape(1, -1, 1, 1) for vector in cores])

    @classmethod
    def from_vector(
        cls,
        vector: Tensor | Array,
        *,
        dims: Sequence[int] | None = None,
        max_bond: int | Sequence[int] | None = None,
        rel_error: float | None = None,
    ) -> "MPO":
        """Decompose a vector into a state, an MPO with in-legs of 1, by TT-SVD, as `from_matrix` does.

        Args:
            vector: the amplitudes, real or complex.
            dims: sizes of the sites, the first one most significant; sites of size 2 if absent, which
                requires a power of two.
            max_bond, rel_error: as in `from_matrix`.

        Raises: as in `from_matrix`.

        Example:
            >>> state = tn.MPO.from_vector(torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 1]) / 2**0.5)
            >>> state.out_dims, state.bond_dims, round(float(state.bond_entropy(0)), 4)
            ((2, 2, 2), (2, 2), 0.6931)
        """
        amplitudes: Tensor = _from_numpy(vector)
        check_dense(amplitudes, "MPO.from_vector", "a vector of amplitudes", 1)
        if dims is None:
            sites = max(len(amplitudes).bit_length() - 1, 1)
            if 2**sites != len(amplitudes):
                raise ShapeError(
                    f"A vector of {len(amplitudes)} amplitudes is no state of sites of size 2; give `dims`."
                )
            dims = (2,) * sites
        return cls.from_matrix(
            amplitudes[:, None],
            out_dims=dims,
            in_dims=(1,) * len(dims),
            max_bond=max_bond,
            rel_error=rel_error,
        )

    @classmethod
    def from_terms(
        cls,
        terms: Iterable[Term],
        dims: Sequence[int],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> "MPO":
        """Build a sum of local terms, such as a Hamiltonian, with the smallest bonds (not differentiable).

        Args:
            terms: pairs `(coefficient, {site: operator})`. An operator is a square matrix, or one of the
                names `I`, `X`, `Y`, `Z` (Pauli matrices), `+` (|1><0|), `-` (|0><1|) and `n` (|1><1|) on a
                site of size 2. Other sites get the identity.
            dims: sizes of the sites, for example `[2] * 20`.
            dtype: dtype of the cores. If absent, torch's default, or its complex counterpart if a term is
                complex.
            device: device of the cores, torch's default if absent.

        Raises:
            ShapeError: a term is malformed, or complex where `dtype` is real.

        Example:
            >>> bonds, sites = range(7), range(8)
            >>> ising = [(-1, {k: "Z", k + 1: "Z"}) for k in bonds] + [(-0.5, {k: "X"}) for k in sites]
            >>> tn.MPO.from_terms(ising, [2] * 8).bond_dims
            (3, 3, 3, 3, 3, 3, 3)

        Reference:
            Ren, Li, Jiang and Shuai 2020, "A general automatic method for optimal construction of matrix
            product operators using bipartite graph theory".
        """
        sizes, _ = _both_dims(dims, None)
        return cls(cores_of_terms(list(terms), sizes, dtype=dtype, device=device))

    def __repr__(self) -> str:
        return (
            f"MPO({self.shape}, out_dims={self.out_dims}, in_dims={self.in_dims}, "
            f"bond_dims={self.bond_dims}, {self.num_params:,} parameters)"
        )

    # --- cores and entries -----------------------------------------------------------------------

    def __len__(self) -> int:
        """Return the number of sites."""
        return len(self.cores)

    def __getitem__(self, entry: tuple[Any, Any]) -> Tensor:
        """Return the entry `H[row, column]` as a tensor without building the matrix.

        Indices are integers of any size, or tensors of integers that are broadcast as in NumPy. The amplitude
        of a basis state is `state[row, 0]`.

        Raises:
            IndexError: an index is out of range.
            ShapeError: there are not two indices, or one is not an integer.

        Example:
            >>> eye = tn.MPO.identity([2] * 100)
            >>> eye[2**99, 2**99], eye[torch.tensor([1, 2]), 2]
            (tensor(1.), tensor([0., 1.]))
        """
        if not isinstance(entry, tuple) or len(entry) != 2:
            raise ShapeError(
                f"An entry of an MPO has a row and a column, H[row, column], got {entry!r}; core k is "
                "H.cores[k], and an amplitude of a state is state[row, 0]."
            )
        rows, columns = (
            [digit.to(self.device) for digit in states.digits_of(value, size, dims, name)]
            for value, size, dims, name in zip(
                entry, self.shape, (self.out_dims, self.in_dims), ("row", "column"), strict=True
            )
        )
        return states.entries(self.cores, rows, columns)

    # A class with `__getitem__` and `__len__` would otherwise be iterated over, with one index for each site.
    __iter__ = None

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of all cores."""
        return self.cores[0].dtype

    @property
    def device(self) -> torch.device:
        """Device of all cores."""
        return self.cores[0].device

    def to(self, *args: Any, **options: Any) -> "MPO":
        """Move every core to a device or cast it to a dtype, with the arguments of `torch.Tensor.to`.

        The certificate is unchanged: it does not include the error of rounding to a narrower dtype.

        Example:
            >>> tn.MPO.identity((2, 2)).to(torch.float64).dtype
            torch.float64
        """
        return self._copy([core.to(*args, **options) for core in self.cores])

    def clone(self) -> "MPO":
        """Copy the operator and its cores differentiably; `copy.copy` would share the cores."""
        return self._copy([core.clone() for core in self.cores])

    def detach(self) -> "MPO":
        """Return an MPO with the same cores, detached from the autograd graph."""
        return self._copy([core.detach() for core in self.cores])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        """Build the dense matrix for `np.asarray(mpo)`; bfloat16 is converted to float32."""
        if copy is False:
            raise ValueError("The dense matrix of an MPO must be computed, so copy=False is not possible.")
        dense = _to_numpy(self.to_matrix())
        return dense if dtype is None else dense.astype(dtype, copy=False)

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
        """Sizes of the `n - 1` inner bonds."""
        return tuple(core.shape[3] for core in self.cores[:-1])

    @property
    def shape(self) -> tuple[int, int]:
        """Shape `(out_features, in_features)`."""
        return self._features

    @property
    def num_params(self) -> int:
        """Number of stored elements, padding included."""
        return sum(core.numel() for core in self.cores)

    @property
    def topology(self) -> Topology:
        """Topology of the chain."""
        return chain(self.out_dims, self.in_dims, self.bond_dims, self.shape)

    @property
    def network(self) -> TensorNetwork:
        """The operator as a general `TensorNetwork` with the same core tensors."""
        return TensorNetwork(self.topology, self.cores)

    def to_matrix(self) -> Tensor:
        """Contract the chain to the dense matrix, shape `(out_features, in_features)`.

        Raises:
            MemoryLimitError: the matrix does not fit in memory.
        """
        return self.network.to_matrix()

    @overload
    def apply(self, x: Tensor) -> Tensor: ...

    @overload
    def apply(self, x: Array) -> Array: ...

    @overload
    def apply(
        self, x: "MPO", *, max_bond: int | Sequence[int] | None = None, rel_error: float | None = None
    ) -> "MPO": ...

    def apply(
        self,
        x: "Tensor | Array | MPO",
        *,
        max_bond: int | Sequence[int] | None = None,
        rel_error: float | None = None,
    ) -> "Tensor | Array | MPO":
        """Apply the operator to vectors `x: (..., in_features)`, or to a state or operator with rounding.

        `x` and the result are tensors, or both are NumPy arrays, and the result has the shape
        `(..., out_features)`. If the dtypes of the operator and `x` differ, the result has the dtype to which
        torch promotes both.

        If `x` is an MPO, the result is `self @ x`, rounded as by `round`. For errors of at least 1e-6 the
        bonds are truncated on the way, so the exact product is not built unless derivatives are needed.

        Args:
            x: vectors, a state, or an operator.
            max_bond: for an MPO, the limit for all bonds, or a sequence with a limit for each bond.
            rel_error: for an MPO, the largest relative error. If absent, it is 1e-6 with `max_bond`, and else
                that of `round`.

        Example:
            >>> tn.MPO.identity((2, 2)).apply(torch.ones(5, 4)).shape
            torch.Size([5, 4])
            >>> random = tn.MPO.random([2] * 8, max_bond=5, dtype=torch.float64)
            >>> random.apply(tn.MPO.random([2] * 8, 1, max_bond=5, dtype=torch.float64), max_bond=6).bond_dims
            (2, 4, 6, 6, 6, 4, 2)

        Reference:
            McCulloch 2007, "From density-matrix renormalization group to matrix product states".
        """
        if isinstance(x, MPO):
            return self._rounded_product(x, max_bond, rel_error)
        if max_bond is not None or rel_error is not None:
            raise ShapeError(
                "max_bond and rel_error are limits for the product with an MPO, not with vectors."
            )
        if isinstance(x, np.ndarray):
            return _to_numpy(self.apply(_from_numpy(x).to(self.device)))
        if not isinstance(x, Tensor) or torch.is_autocast_enabled(x.device.type):
            return self.network.apply(x)
        dtype = torch.promote_types(self.dtype, x.dtype)
        return self.to(dtype).network.apply(x.to(dtype))

    # --- algebra ---------------------------------------------------------------------------------

    def __add__(self, other: "MPO") -> "MPO":
        """Add two operators; their bond sizes add up. The certificate combines their errors."""
        if not isinstance(other, MPO):
            return NotImplemented
        self._check_same_dims(other, "added")
        total = self._like(algebra.add(self.cores, other.cores))
        if self.error or other.error:
            total._certify(_log_add(self._log_bound(), other._log_bound()))
        return total

    def __radd__(self, other: int) -> "MPO":
        """Return the operator itself for `0 + self`, so that `sum` adds operators."""
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def __sub__(self, other: "MPO") -> "MPO":
        """Subtract two operators; their bond sizes add up."""
        if not isinstance(other, MPO):
            return NotImplemented
        return self + (-other)

    def __neg__(self) -> "MPO":
        return self * -1

    def __mul__(self, factor: complex | Tensor) -> "MPO":
        """Multiply the operator by a number; `@` multiplies two operators."""
        if not isinstance(factor, Number | Tensor):
            return NotImplemented
        if isinstance(factor, Tensor) and factor.numel() != 1:
            raise ShapeError(
                f"`*` multiplies an MPO by one number, got a tensor of shape {tuple(factor.shape)}; use `@` "
                "for matrix products."
            )
        factor = factor.reshape(()) if isinstance(factor, Tensor) else factor
        scaled = self._like(algebra.scale(self.cores, factor), error=self.error)
        scaled.truncation_error = self.truncation_error
        if self._log_distance is not None:
            size = abs(complex(factor.detach() if isinstance(factor, Tensor) else factor))
            scaled._log_distance = self._log_distance + math.log(size) if size > 0 else -math.inf
        return scaled

    __rmul__ = __mul__

    def __truediv__(self, factor: complex | Tensor) -> "MPO":
        """Divide the operator by a number."""
        if not isinstance(factor, Number | Tensor):
            return NotImplemented
        return self * (1 / factor)

    @overload
    def __matmul__(self, other: "MPO") -> "MPO": ...

    @overload
    def __matmul__(self, other: Tensor) -> Tensor: ...

    @overload
    def __matmul__(self, other: Array) -> Array: ...

    def __matmul__(self, other: "MPO | Tensor | Array") -> "MPO | Tensor | Array":
        """Multiply by another MPO, a vector `(in,)` or matrices `(..., in, columns)`.

        In a product of two MPOs, their bond sizes multiply. The padding of the contracted legs is set to zero
        first. If the in-dims of the left MPO differ from the out-dims of the right MPO, an identity is
        inserted that converts one into the other. The bonds are then larger.

        Raises:
            ShapeError: the shapes do not fit, or the two MPOs have different numbers of sites.

        Example:
            >>> flip = tn.MPO([torch.eye(2).flip(0).reshape(1, 2, 2, 1)] * 2)
            >>> flip @ torch.arange(4.0)
            tensor([3., 2., 1., 0.])
            >>> (flip @ flip).to_matrix().equal(torch.eye(4))
            True
        """
        if isinstance(other, Tensor | np.ndarray):
            self._check_product(other, -1 if other.ndim == 1 else -2, self.shape[1], "by")
            return self.apply(other) if other.ndim == 1 else _swapped(self.apply(_swapped(other)))
        if not isinstance(other, MPO):
            return NotImplemented
        cores = algebra.multiply(self._left_of(other), other.cores)
        product = MPO(cores, out_features=self.shape[0], in_features=other.shape[1])
        product._certify_product(self, other)
        return product

    def _left_of(self, other: "MPO") -> Sequence[Tensor]:
        """Return cores whose in-dims are the out-dims of `other`, and whose padding there is zero."""
        if self.shape[1] != other.shape[0] or len(self) != len(other):
            raise ShapeError(
                f"Cannot multiply MPOs of shapes {self.shape} and {other.shape}: the columns of the left MPO "
                "must match the rows of the right MPO, and both need the same number of sites; got in_dims "
                f"{self.in_dims} and out_dims {other.out_dims}."
            )
        left = self.cores
        keep = algebra.leading_projector(self.in_dims, self.shape[1], like=left[0])
        if keep is not None:
            left = algebra.multiply(left, keep)
        if self.in_dims != other.out_dims:
            left = algebra.multiply(left, algebra.identity_chain(self.in_dims, other.out_dims, like=left[0]))
        return left

    def _rounded_product(
        self, other: "MPO", max_bond: int | Sequence[int] | None, rel_error: float | None
    ) -> "MPO":
        budget = Budget(max_bond=max_bond, rel_error=rel_error)
        promised = SMALLEST_ERROR if rel_error is None and max_bond is not None else rel_error
        derived = algebra.needs_gradient([*self.cores, *other.cores])
        if derived or promised is None or promised < SMALLEST_ERROR:
            return (self @ other).round(max_bond=max_bond, rel_error=rel_error)
        left = MPO(self._left_of(other), out_features=self.shape[0])._masked
        right = MPO(other.cores, in_features=other.shape[1])._masked
        cores, cut = compressed_product(left, right, max_bond=budget.max_bond, rel_error=promised)
        check_rel_error(cut, budget.rel_error, {"max_bond": max_bond}, self.dtype)
        product = MPO(cores, out_features=self.shape[0], in_features=other.shape[1], error=cut)
        product.truncation_error = cut
        if self.error or other.error:
            product._certify(_log_add(self._log_bound_of_product(other), _log_cut(cores, cut)))
        return product

    @overload
    def __rmatmul__(self, other: Tensor) -> Tensor: ...

    @overload
    def __rmatmul__(self, other: Array) -> Array: ...

    def __rmatmul__(self, other: Tensor | Array) -> Tensor | Array:
        """Compute `other @ self` for a vector `(out,)` or matrices `(..., rows, out)`."""
        if not isinstance(other, Tensor | np.ndarray):
            return NotImplemented
        self._check_product(other, -1, self.shape[0], "from the left by")
        return self.transpose().apply(other)

    def __pow__(self, exponent: int) -> "MPO":
        """Raise a square operator to a power; without rounding, its bonds have size `bond ** exponent`.

        Raises:
            ShapeError: the operator is not square.
            ValueError: the exponent is negative.

        Example:
            >>> flip = tn.MPO([torch.eye(2).flip(0).reshape(1, 2, 2, 1)] * 2)
            >>> (flip**2).to_matrix().equal(torch.eye(4))
            True
        """
        try:
            power = index(exponent)
        except TypeError:
            return NotImplemented
        self._check_square("has powers")
        if power < 0:
            raise ValueError(f"The exponent must be at least 0, got {power}: inverses are not supported.")
        result: MPO | None = None
        square = self
        while power:
            if power % 2:
                result = square if result is None else result @ square
            power //= 2
            square = square @ square if power else square
        if result is None:
            return self._like(algebra.identity_chain(self.out_dims, self.in_dims, like=self.cores[0]))
        return result

    def hadamard(self, other: "MPO") -> "MPO":
        """Multiply two operators element by element; their bond sizes multiply.

        Raises:
            ShapeError: the dims or shapes of the operators differ.

        Example:
            >>> eye = tn.MPO.identity((2, 2))
            >>> eye.hadamard(eye).to_matrix().equal(torch.eye(4))
            True
        """
        self._check_same_dims(other, "multiplied element by element")
        product = self._like(algebra.hadamard(self.cores, other.cores))
        product._certify_product(self, other)
        return product

    def kron(self, other: "MPO") -> "MPO":
        """Compute the Kronecker product: the cores of `self`, then those of `other`, joined by a bond of 1.

        Raises:
            ShapeError: `other` has padding, which would not be at the end of the product.

        Example:
            >>> tn.MPO.identity((2,)).kron(tn.MPO.identity((3,))).to_matrix().equal(torch.eye(6))
            True
        """
        if not isinstance(other, MPO):
            raise ShapeError(f"The right operand of kron must be an MPO, got {type(other).__name__}.")
        other._check_no_padding("The right operand of kron")
        product = MPO(
            algebra.kron(self.cores, other.cores),
            out_features=self.shape[0] * other.shape[0],
            in_features=self.shape[1] * other.shape[1],
            # |A0 x B0 - A x B| <= |A0 - A| |B0| + |A| |B0 - B| with |A| <= (1 + e) |A0| and |A x B| = |A| |B|
            error=_plus(self.error, other.error, self.error * other.error),
        )
        if product.error:
            product._log_distance = self._log_bound_of_product(other)
        return product

    def trace(self) -> Tensor:
        """Compute the trace of a square operator as a 0-dimensional tensor.

        Out-dims and in-dims may differ.

        Raises:
            ShapeError: the operator is not square.

        Example:
            >>> tn.MPO.identity((2, 3)).trace()
            tensor(6.)
        """
        self._check_square("has a trace")
        like = self.cores[0].real
        return algebra.inner(algebra.identity_chain(self.out_dims, self.in_dims, like=like), self._masked)

    def transpose(self) -> "MPO":
        """Transpose the operator; the result has the shape `(in_features, out_features)`."""
        transposed = MPO(
            algebra.transpose(self.cores),
            out_features=self.shape[1],
            in_features=self.shape[0],
            error=self.error,
        )
        transposed._log_distance, transposed.truncation_error = self._log_distance, self.truncation_error
        return transposed

    def conj(self) -> "MPO":
        """Conjugate every element of the operator."""
        return self._copy([core.conj() for core in self.cores])

    def adjoint(self) -> "MPO":
        """Conjugate and transpose the operator."""
        return self.transpose().conj()

    @property
    def T(self) -> "MPO":
        """The transpose, as for tensors."""
        return self.transpose()

    @property
    def H(self) -> "MPO":
        """The conjugate transpose, as for tensors."""
        return self.adjoint()

    def reverse(self) -> "MPO":
        """Reverse the order of the sites, without changing them: the last digit of every index comes first.

        Raises:
            ShapeError: the operator has padding, which would not be at the end.

        Example:
            >>> up, down = torch.eye(2)
            >>> tn.MPO.product_state([up, up, down]).reverse()[4, 0]
            tensor(1.)
        """
        self._check_no_padding("A reversed MPO")
        backwards = MPO([core.permute(3, 1, 2, 0) for core in reversed(self.cores)], error=self.error)
        backwards._log_distance, backwards.truncation_error = self._log_distance, self.truncation_error
        return backwards

    def canonicalize(self, *, center: int = -1) -> "MPO":
        """Make all cores except `center` orthonormal by QR, differentiably. See `mpo_algebra.canonicalize`.

        Example:
            >>> operator = tn.MPO([torch.ones(1, 2, 2, 3), torch.ones(3, 4, 2, 1)]).canonicalize(center=1)
            >>> float(operator.cores[1].norm()) == float(operator.norm())
            True
        """
        return self._copy(algebra.canonicalize(self.cores, center))

    @outside_autocast
    def round(self, *, max_bond: int | Sequence[int] | None = None, rel_error: float | None = None) -> "MPO":
        """Truncate the bonds differentiably, to a relative error of at most `rel_error`.

        Derivatives treat the chosen ranks as constants. The gradient exists if, at every bond, the smallest
        kept singular value differs from the largest discarded one; see `mpo_algebra.round_chain`.

        Args:
            max_bond: limit for all bonds, or a sequence with a limit for each bond.
            rel_error: largest relative Frobenius error of the truncation. The default `eps^(3/4)`, 1.8e-12 in
                double and 6.4e-6 in single precision, removes the redundant bonds of sums and products. 0
                removes exact zeros only. (quimb's `compress` truncates at 1e-10 of the largest singular value
                of each bond, torchTT's `round` at a relative error of 1e-12.)

        Returns:
            A left-canonical MPO. Its `truncation_error` is the error `d` of this truncation alone, relative
            to this MPO; other libraries report this number. Its `error` is `e + d (1 + e)`, where `e` is the
            `error` of this MPO: a bound relative to the matrix that this MPO approximates. The bound is
            infinite if `e` is, for example for a product of two inaccurate operators.

        Raises:
            BudgetError: a limit is out of range, or `max_bond` does not allow an error of `rel_error`.
            NonFiniteError: the operator contains NaN or infinity.

        Example:
            >>> eye = tn.MPO.identity((2, 2, 2))
            >>> (eye + eye).round().bond_dims
            (1, 1)
        """
        budget = Budget(max_bond=max_bond, rel_error=rel_error)
        if rel_error is None:
            rel_error = default_tolerance(self.dtype)
        cores, cut = algebra.round_chain(self._masked, max_bond=budget.max_bond, rel_error=rel_error)
        check_rel_error(cut, budget.rel_error, {"max_bond": max_bond}, self.dtype)
        rounded = self._like(cores, error=_plus(self.error, cut, self.error * cut if cut else 0.0))
        rounded.truncation_error = cut
        if rounded.error:
            rounded._log_distance = _log_add(self._log_bound(), _log_cut(cores, cut))
        return rounded

    @property
    def absolute_error(self) -> float:
        """Certified Frobenius distance `|W0 - W|` of this operator `W` to the matrix `W0` it approximates.

        The distance is finite for sums and products of certified operators. The relative `error` is infinite
        if `W0` may be zero according to this bound.
        """
        return math.exp(bound) if (bound := self._log_bound()) < 709 else math.inf

    def norm(self) -> Tensor:
        """Compute the Frobenius norm as a differentiable 0-dimensional tensor. See `mpo_algebra.norm`."""
        return algebra.norm(self._masked)

    def log_norm(self) -> Tensor:
        """Compute the logarithm of the Frobenius norm, even if the norm itself overflows or underflows.

        Example:
            >>> tn.MPO([torch.ones(1, 2, 2, 1)] * 2000).log_norm()
            tensor(1386.2944, dtype=torch.float64)
        """
        return algebra.log_norm(self._masked)

    def inner(self, other: "MPO") -> Tensor:
        """Compute the Frobenius inner product `sum conj(self) * other`, a 0-dimensional tensor.

        It overflows only if the value itself does; `log_inner` does not.

        Raises:
            ShapeError: the dims or shapes of the operators differ.
        """
        self._check_same_dims(other, "compared")
        return algebra.inner(self._masked, other.cores)

    def log_inner(self, other: "MPO") -> tuple[Tensor, Tensor]:
        """Compute the sign, or phase, and the logarithm of the size of `inner`, which may itself overflow.

        The order is that of `torch.linalg.slogdet`.

        Example:
            >>> state = tn.MPO.product_state([torch.full((2,), 1e100, dtype=torch.float64)] * 4)
            >>> sign, log = state.log_inner(-state)
            >>> float(sign), round(float(log), 4)
            (-1.0, 1844.8407)
        """
        self._check_same_dims(other, "compared")
        return algebra.log_inner(self._masked, other.cores)

    def normalize(self) -> "MPO":
        """Divide by the Frobenius norm, which may itself be outside the range of the dtype.

        Raises:
            ValueError: the norm is 0.

        Example:
            >>> state = tn.MPO.product_state([torch.ones(2, dtype=torch.float64)] * 3000)
            >>> round(float(state.normalize().norm()), 6)
            1.0
        """
        log_norm = self.log_norm()
        if float(log_norm.detach()) == -math.inf:
            raise ValueError("The zero operator cannot be normalized.")
        each = (-log_norm / len(self)).exp()
        unit = self._copy([core * each.to(core.real.dtype) for core in self.cores])
        if unit._log_distance is not None:
            unit._log_distance -= float(log_norm.detach())
        return unit

    def bond_spectrum(self, k: int) -> Tensor:
        """Compute the singular values at bond `k` (to the right of core `k`), differentiably."""
        return algebra.bond_spectrum(self._masked, k)

    def bond_entropy(self, k: int) -> Tensor:
        """Compute the entanglement entropy at bond `k` in nats, differentiably."""
        return algebra.bond_entropy(self._masked, k)

    def entropies(self) -> Tensor:
        """Compute the entanglement entropy at every bond in nats, differentiably.

        Without derivatives, one sweep computes all of them.

        Example:
            >>> tn.MPO.from_vector(torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 1])).entropies()
            tensor([0.6931, 0.6931], dtype=torch.float64)
        """
        return states.entropies(self._masked)

    # --- states ----------------------------------------------------------------------------------

    def expectation(self, operator: "MPO") -> Tensor:
        """Compute `<self| operator |self> / <self|self>` as a 0-dimensional tensor.

        No product is built. The state need not be normalized, and its norm may be outside the range of the
        dtype. If `self` is an operator, the value is `tr(self^H operator self) / tr(self^H self)`.

        Raises:
            ShapeError: the in- or out-legs of the operator are not the out-legs of the state.

        Example:
            >>> up, down = torch.eye(2)
            >>> state = tn.MPO.product_state([up, down, up])
            >>> state.expectation(tn.MPO.from_terms([(1, {k: "Z"}) for k in range(3)], [2] * 3))
            tensor(1.)
        """
        if not isinstance(operator, MPO):
            raise ShapeError(f"The expectation value needs an operator, got {type(operator).__name__}.")
        sides = (operator.out_dims, operator.in_dims, *operator.shape)
        if sides != (self.out_dims, self.out_dims, self.shape[0], self.shape[0]):
            raise ShapeError(
                "state.expectation(operator) needs an operator with the legs of the state, "
                f"{self.out_dims} on both sides; got one with out_dims {operator.out_dims} and in_dims "
                f"{operator.in_dims}."
            )
        return states.expectation(self._masked, operator.cores)

    def sample(self, count: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw basis states with the probabilities `|amplitude|^2 / norm^2` (not differentiable).

        Args:
            count: number of basis states.
            generator: random number generator; torch's global generator if absent.

        Returns:
            Integers of the shape `(count, sites)`: the state of each site.

        Raises:
            ShapeError: the in-legs are not 1, so this is not a state.
            ValueError: the state is zero.

        Example:
            >>> up, down = torch.eye(2)
            >>> tn.MPO.product_state([up, down, up]).sample(2)
            tensor([[0, 1, 0],
                    [0, 1, 0]])
        """
        self._check_state("Samples are drawn from a state")
        check_size("count", count, error=ValueError)
        return states.sample(self._masked, count, generator)

    def partial_trace(self, keep: int | Sequence[int]) -> "MPO":
        """Trace out all sites except `keep`: of a square operator, or of `|state><state|` for a state.

        The result of a state that is not normalized has the trace `norm^2`.

        Args:
            keep: the site, or the sites, that remain.

        Returns:
            The reduced operator on the kept sites, in their order in the chain.

        Raises:
            ShapeError: a site does not exist, or the out-legs and in-legs differ.

        Example:
            >>> bell = tn.MPO.from_vector(torch.tensor([1.0, 0, 0, 1]) / 2**0.5)
            >>> bell.partial_trace(keep=0).to_matrix()
            tensor([[0.5000, 0.0000],
                    [0.0000, 0.5000]])
        """
        kept = (keep,) if isinstance(keep, int) else check_sizes("keep", keep, least=0)
        if not kept or len(set(kept)) < len(kept) or not all(0 <= site < len(self) for site in kept):
            raise ShapeError(f"keep must name different sites of 0 to {len(self) - 1}, got {keep!r}.")
        if set(self.in_dims) == {1}:
            return MPO(states.reduced_state(self._masked, kept))
        if self.in_dims != self.out_dims:
            raise ShapeError(
                "Only an operator with equal out- and in-legs, or a state, has a partial trace; got out_dims "
                f"{self.out_dims} and in_dims {self.in_dims}."
            )
        return MPO(states.partial_trace(self._masked, kept))

    # --- pictures --------------------------------------------------------------------------------

    def show(self) -> None:
        """Print the chain with the sizes of its bonds and legs; legs of size 1 are omitted.

        Example:
            >>> tn.MPO.random([2] * 4, 1, max_bond=3).show()
            2   2   2   2
            │   │   │   │
            ●─2─●─3─●─2─●
        """
        print(states.diagram(self.cores))  # noqa: T201

    def draw(self) -> "Figure":
        """Draw the chain as a `matplotlib.figure.Figure`; `show` prints it as text."""
        return self.network.draw()

    # --- other libraries -------------------------------------------------------------------------

    def to_quimb(self) -> Any:
        """Convert the operator to a quimb `MatrixProductOperator`, or a state to a `MatrixProductState`.

        quimb does not support padding. The padding becomes a part of the result and is zero, so that norms
        and traces agree. Bonds can be larger than those of a padded operator.
        """
        return interop.to_quimb(self._exported)

    @classmethod
    def from_quimb(cls, operator: Any) -> "MPO":
        """Convert a quimb `MatrixProductOperator` or `MatrixProductState` to an MPO.

        In- and out-legs may differ in size; the in-legs of a state have size 1.
        """
        return cls(interop.from_quimb(operator))

    def to_tensorly(self) -> Any:
        """Convert the operator to a TensorLy `TTMatrix`; padding is treated as in `to_quimb`."""
        return interop.to_tensorly(self._exported)

    @classmethod
    def from_tensorly(cls, operator: Any) -> "MPO":
        """Convert a TensorLy `TTMatrix` to an MPO."""
        return cls(interop.from_tensorly(operator))

    # --- private ---------------------------------------------------------------------------------

    @property
    def _masked(self) -> tuple[Tensor, ...]:
        """Return the cores of the operator with its padding set to zero, for example to compute its norm."""
        return algebra.mask_padding(self.cores, *self.shape)

    @property
    def _exported(self) -> tuple[Tensor, ...]:
        """Return cores for a library without padding: the padding is zero, and no bond is redundant."""
        if self.shape == (math.prod(self.out_dims), math.prod(self.in_dims)):
            return self.cores
        return algebra.round_chain(self._masked, rel_error=rounding_error(self.dtype))[0]

    def _decomposed_again(
        self,
        matrix: Tensor,
        max_bond: int | Sequence[int] | None,
        rel_error: float | None,
        param_ratio: float | None,
    ) -> "MPO":
        """Repeat the decomposition that gave this MPO differentiably, within the same limits."""
        sites, scale = len(self), safe_scale(matrix)
        padded = pad_matrix(
            matrix.to(working_dtype(matrix.dtype)) / scale, math.prod(self.out_dims), math.prod(self.in_dims)
        )
        axes = [axis for k in range(sites) for axis in (k, sites + k)]
        cores, cut = algebra.round_dense(
            padded.reshape(*self.out_dims, *self.in_dims).permute(axes),
            0.0,
            max_bond=max_bond if param_ratio is None else self.bond_dims,
            rel_error=default_tolerance(matrix.dtype) if rel_error is None else rel_error,
            dtype=self.dtype,
        )
        limits = {"max_bond": max_bond, "param_ratio": param_ratio}
        check_rel_error(cut, rel_error, limits, matrix.dtype)
        found = self._like(algebra.scale(cores, scale), error=cut)
        found.truncation_error = cut
        found._log_distance = math.log(cut) + math.log(frobenius(matrix)) if cut > 0 else None
        return found

    def _like(self, cores: Sequence[Tensor], *, error: float = 0.0) -> "MPO":
        return MPO(cores, out_features=self.shape[0], in_features=self.shape[1], error=error)

    def _copy(self, cores: Sequence[Tensor]) -> "MPO":
        """Build an MPO from other cores, with the same shape and certificate."""
        same = self._like(cores, error=self.error)
        same._log_distance, same.truncation_error = self._log_distance, self.truncation_error
        return same

    def _log_norm(self) -> float:
        return float(self.log_norm().detach())

    # An operator `W` with the certificate `e` approximates a matrix `W0` with `|W0 - W| <= e |W0|`. Absolute
    # bounds of sums and products follow from the triangle inequality and are always finite. A relative bound
    # is finite only if the absolute bound is below `|W|`; otherwise `W0` may be zero.

    def _log_bound(self) -> float:
        if self._log_distance is not None or self.error == 0:
            return -math.inf if self._log_distance is None else self._log_distance
        if not self.error < 1:
            return math.inf
        # |W0 - W| <= e |W| / (1 - e), since |W0| <= |W| / (1 - e)
        return math.log(self.error) - math.log1p(-self.error) + self._log_norm()

    def _log_bound_of_product(self, other: "MPO") -> float:
        """Bound the logarithm of the error of any product that satisfies `|A * B| <= |A| |B|` (Frobenius)."""
        # |A0 * B0 - A * B| <= |A0 - A| |B0| + |A| |B0 - B| with |B0| <= |B| + |B0 - B|
        mine, theirs = self._log_bound(), other._log_bound()
        return _log_add(mine + _log_add(other._log_norm(), theirs), self._log_norm() + theirs)

    def _certify(self, log_distance: float) -> None:
        """Set the absolute and relative certificates, given a bound on the log of the absolute error."""
        log_norm = self._log_norm()
        self._log_distance, self.error = log_distance, 0.0
        # `log_distance` is NaN if an infinite bound was multiplied by zero; `error` then becomes infinite.
        if log_distance != -math.inf:
            ratio = math.exp(log_distance - log_norm) if log_distance < log_norm else 1.0
            self.error = ratio / (1 - ratio) if ratio < 1 else math.inf

    def _certify_product(self, left: "MPO", right: "MPO") -> None:
        if left.error or right.error:
            self._certify(left._log_bound_of_product(right))

    def _check_product(self, other: Tensor | Array, axis: int, size: int, how: str) -> None:
        shape = tuple(other.shape)
        if other.ndim == 0 or shape[axis] != size:
            raise ShapeError(
                f"Cannot multiply an MPO of shape {self.shape} {how} an array of shape {shape}: "
                f"dimension {axis} must be {size}."
            )

    def _check_square(self, what: str) -> None:
        if self.shape[0] != self.shape[1]:
            raise ShapeError(f"Only a square MPO {what}, got an MPO of shape {self.shape}.")

    def _check_no_padding(self, what: str) -> None:
        if self.shape != (math.prod(self.out_dims), math.prod(self.in_dims)):
            raise ShapeError(
                f"{what} must have no padding, got shape {self.shape} with dims {self.out_dims} x "
                f"{self.in_dims}; choose dims whose products are its shape."
            )

    def _check_state(self, what: str) -> None:
        if set(self.in_dims) != {1}:
            raise ShapeError(
                f"{what}, an MPO whose in-legs have size 1; got in_dims {self.in_dims}. Make one with "
                "MPO.product_state, MPO.from_vector or MPO.random(dims, 1, ...)."
            )

    def _check_same_dims(self, other: "MPO", what: str) -> None:
        if not isinstance(other, MPO):
            raise ShapeError(f"Only an MPO can be {what} with an MPO, got {type(other).__name__}.")
        mine = (self.shape, self.out_dims, self.in_dims)
        if mine != (theirs := (other.shape, other.out_dims, other.in_dims)):
            raise ShapeError(
                f"Only MPOs with equal shape, out_dims and in_dims can be {what}, got {mine} and {theirs}."
            )


def _both_dims(
    out_dims: Sequence[int], in_dims: Sequence[int] | int | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Check the sizes of the legs; in-legs are those of the out-legs if absent, or all the same number."""
    rows = check_sizes("out_dims", out_dims)
    if in_dims is None:
        return rows, rows
    if isinstance(in_dims, int):
        return rows, (check_size("in_dims", in_dims),) * len(rows)
    columns = check_sizes("in_dims", in_dims)
    if len(rows) != len(columns):
        raise ShapeError(f"Out-dims {rows} and in-dims {columns} must have the same number of sites.")
    return rows, columns


def _check_start(start: Tensor | None, limits: Sequence[int]) -> Tensor:
    """Check the first indices of a cross approximation, shape `(points, len(limits))`; none by default."""
    if start is None:
        return torch.zeros(0, len(limits), dtype=torch.int64, device="cpu")
    if not isinstance(start, Tensor) or start.dtype != torch.int64 or start.shape[1:] != (len(limits),):
        raise ShapeError(f"start must be an int64 tensor of shape (points, {len(limits)}), got {start!r}.")
    if bool(((start < 0) | (start >= torch.tensor(limits, device=start.device))).any()):
        raise ShapeError(f"start contains an index outside 0 ... size - 1 for the sizes {tuple(limits)}.")
    return start


def _from_numpy(value: Any) -> Any:
    return torch.from_numpy(np.array(value)) if isinstance(value, np.ndarray) else value


def _to_numpy(tensor: Tensor) -> Array:
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _swapped(matrices: Any) -> Any:
    return matrices.mT if isinstance(matrices, Tensor) else np.swapaxes(matrices, -1, -2)


def _features(name: str, features: int | None, dims: tuple[int, ...]) -> int:
    if features is None:
        return math.prod(dims)
    if check_size(name, features, error=ShapeError) > math.prod(dims):
        raise ShapeError(
            f"{name}={features} exceeds {math.prod(dims)}, the product of the leg sizes {dims} of the cores."
        )
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
                f"Core {k} is {core.dtype} on {core.device}, but the first core is {cores[0].dtype} on "
                f"{cores[0].device}; all cores must have the same dtype and device."
            )
        if core.ndim != 4 or core.shape[0] != bond or 0 in core.shape:
            raise ShapeError(
                f"Core {k} has shape {tuple(core.shape)}; expected (left, out, in, right), left={bond}, no "
                "size of 0."
            )
        bond = core.shape[3]
    if bond != 1:
        raise ShapeError(f"The right bond of the last core must be 1, got {bond}.")
    return cores


def _log_cut(rounded: Sequence[Tensor], cut: float) -> float:
    """Compute the logarithm of the absolute error of a truncation, from its left-canonical result.

    The truncation is a projection, so the norm before it is that of the result divided by `sqrt(1 - cut^2)`.
    """
    if cut == 0:
        return -math.inf
    norms = (
        float(torch.linalg.vector_norm(core.detach(), dtype=working_dtype(core.dtype))) for core in rounded
    )
    sizes = (core.shape[3] for core in rounded)  # the norm of an orthonormal core is the root of its bond
    log_norm = math.fsum(math.log(norm) - math.log(size) / 2 for norm, size in zip(norms, sizes, strict=True))
    return math.log(cut) + log_norm - math.log1p(-(min(cut, 1 - 1e-12) ** 2)) / 2


def _log_add(*logarithms: float) -> float:
    """Compute `log(sum(exp(x)))` without overflow."""
    top = max(logarithms)
    if math.isinf(top):
        return top
    return top + math.log(math.fsum(math.exp(x - top) for x in logarithms))


def _plus(*errors: float) -> float:
    """Add relative errors; the sum is infinite if one of them is infinite or NaN (infinity times zero)."""
    return math.fsum(errors) if all(map(math.isfinite, errors)) else math.inf
