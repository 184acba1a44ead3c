"""Base class of families that split row and column indices into legs, and functions that choose leg sizes."""

import math
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from tensornet._util import check_size, check_sizes
from tensornet.budget import Budget, caps_of_bonds
from tensornet.errors import TopologyError
from tensornet.linalg.svd import frobenius
from tensornet.linalg.tt_svd import check_dims
from tensornet.network import TensorNetwork
from tensornet.topologies.base import Decomposition, TopologyFamily, check_options, check_request, keywords
from tensornet.topology import CoreSpec, Topology

DEFAULT_SITES = 3
#: Largest padding as a fraction of the true size. More padding would cost more parameters than slightly less
#: balanced factors.
MAX_PADDING = 0.05
#: Penalty that `balanced_factors` adds if there is padding, because padding needs copies of input and output.
_ANY_PADDING = 0.5
#: Options of every `FactoredFamily`.
_DIMS = ("out_dims", "in_dims", "sites")
#: Sizes of out-legs and of in-legs.
Dims = tuple[tuple[int, ...], tuple[int, ...]]


class FactoredFamily(TopologyFamily):
    """Base class of families with the options `out_dims`, `in_dims` (balanced by default) and `sites`.

    A subclass sets `builder` and implements `decompose_at` and `decompose_to`. Further keywords in the
    signatures of `builder` and `decompose_at` are options too.

    Example:
        >>> family = tn.topologies.topology_family("mpo")
        >>> isinstance(family, tn.topologies.FactoredFamily), family.options
        (True, ('bond_dims', 'in_dims', 'out_dims', 'sites'))
    """

    #: Number of sites if neither dims nor `sites` are given.
    default_sites: ClassVar[int] = DEFAULT_SITES
    #: Builder with keywords `out_dims, in_dims, max_bond, out_features, in_features`.
    builder: ClassVar[Callable[..., Topology]]

    def build(
        self,
        out_features: int,
        in_features: int,
        *,
        max_bond: int | Sequence[int] | None = None,
        out_dims: Sequence[int] | None = None,
        in_dims: Sequence[int] | None = None,
        sites: int | None = None,
        **options: Any,
    ) -> Topology:
        """Build the topology with the given dims, or with balanced dims."""
        check_options(self.name, options, {*keywords(type(self).builder), *_DIMS})
        rows, columns = self.choose_dims((out_features, in_features), out_dims, in_dims, sites)
        topology = type(self).builder(
            out_dims=rows,
            in_dims=columns,
            max_bond=max_bond,
            out_features=out_features,
            in_features=in_features,
            **options,
        )
        return replace(topology, family=self.name)

    def decompose(
        self,
        matrix: Tensor,
        budget: Budget,
        *,
        out_dims: Sequence[int] | None = None,
        in_dims: Sequence[int] | None = None,
        sites: int | None = None,
        **options: Any,
    ) -> Decomposition:
        """Decompose a matrix with the given dims, or with balanced dims."""
        check_options(self.name, options, {*keywords(self.decompose_at), *_DIMS})
        shape = check_request(self.name, matrix, budget)
        rows, columns = self.choose_dims(shape, out_dims, in_dims, sites)
        return self.decompose_at(matrix, rows, columns, budget, **options)

    @abstractmethod
    def decompose_at(
        self,
        matrix: Tensor,
        out_dims: tuple[int, ...],
        in_dims: tuple[int, ...],
        budget: Budget,
    ) -> Decomposition:
        """Decompose `matrix: (out_features, in_features)` into a network with these leg sizes."""

    @property
    def options(self) -> tuple[str, ...]:
        """Names of all options: dims, sites, and the options of `builder` and `decompose_at`."""
        return tuple(sorted({*_DIMS, *keywords(type(self).builder), *keywords(self.decompose_at)}))

    def options_of(self, topology: Topology) -> dict[str, Any]:
        """Return the leg sizes of a topology as options."""
        return {"out_dims": topology.out_dims, "in_dims": topology.in_dims}

    def choose_dims(
        self,
        shape: tuple[int, int],
        out_dims: Sequence[int] | None,
        in_dims: Sequence[int] | None,
        sites: int | None,
    ) -> Dims:
        """Choose balanced factors for the dims that are not given.

        Override the method if the number of sites is fixed.
        """
        return choose_dims(shape, out_dims, in_dims, sites, self.default_sites)


def choose_dims(
    shape: tuple[int, int],
    out_dims: Sequence[int] | None,
    in_dims: Sequence[int] | None,
    sites: int | None,
    default_sites: int = DEFAULT_SITES,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Choose balanced factors of the shape for the dims that are not given.

    Out-dims are ascending and in-dims descending, so that the product of the two is similar at all sites.

    Raises:
        TopologyError: `sites` is not the length of the given dims, or the dims do not fit the shape.
    """
    for name, features in zip(("out_features", "in_features"), shape, strict=True):
        check_size(name, features)
    for name, dims in (("out_dims", out_dims), ("in_dims", in_dims)):
        if dims is not None:
            check_sizes(name, dims)
    if sites is not None:
        check_size("sites", sites)
    given = [len(dims) for dims in (out_dims, in_dims) if dims is not None]
    count = given[0] if given else (sites or default_sites)
    if sites is not None and sites != count:
        raise TopologyError(f"sites={sites} contradicts the given dims, which are for {count} sites.")
    rows = tuple(out_dims) if out_dims is not None else balanced_factors(shape[0], count)
    columns = tuple(in_dims) if in_dims is not None else balanced_factors(shape[1], count)[::-1]
    check_dims(shape, rows, columns)
    return rows, columns


def balanced_factors(size: int, sites: int) -> tuple[int, ...]:
    """Split `size` into `sites` factors of similar magnitude.

    If `size` has no balanced factors, the product is larger, by at most 5 %: 50257 = 29 * 1733 becomes
    36 * 37 * 38. The additional rows or columns are zero and count as parameters. The factors minimize
    `log(max/min) + 8 * log(product/size) + (0.5 if product > size)`.

    Args:
        size: the dimension to split, at least 1.
        sites: number of factors, at least 1.

    Returns:
        Factors in ascending order; their product is at least `size`.

    Raises:
        TopologyError: `size` or `sites` is below 1.

    Examples:
        >>> tn.topologies.balanced_factors(768, 3)
        (8, 8, 12)
    """
    if size < 1 or sites < 1:
        raise TopologyError(f"Cannot split size {size} into {sites} factors: both must be at least 1.")
    return _balanced_factors(size, sites)


@lru_cache(maxsize=4096)
def _balanced_factors(size: int, sites: int) -> tuple[int, ...]:
    root = round(size ** (1 / sites))
    if root**sites == size:  # also for sizes like 2^62, whose divisors would take hours
        return (root,) * sites

    def penalty(padded: int) -> float:
        return 8 * math.log(padded / size) + (_ANY_PADDING if padded > size else 0)

    def exact_factors(padded: int) -> tuple[int, ...]:
        """Split an integer into factors one by one, always at the divisor nearest to `rest ** (1 / left)`."""
        factors, rest = [], padded
        for left in range(sites, 1, -1):
            root = rest ** (1 / left)
            factors.append(min(_divisors(rest), key=lambda d: abs(math.log(d / root))))
            rest //= factors[-1]
        return tuple(sorted([*factors, rest]))

    # For small sizes, allow a padding of 1 even if it is more than 5 %.
    ceiling = max(math.floor(size * (1 + MAX_PADDING)), size + 1)
    best, factors = math.inf, tuple[int, ...]()
    for padded in range(size, ceiling + 1):
        if penalty(padded) >= best:  # the penalty grows with the padding, so nothing better follows
            break
        found = exact_factors(padded)
        imbalance = math.log(found[-1] / found[0]) + penalty(padded)
        if imbalance < best:
            best, factors = imbalance, found
    return factors


@lru_cache(maxsize=65536)
def _divisors(size: int) -> tuple[int, ...]:
    small = [d for d in range(1, math.isqrt(size) + 1) if size % d == 0]
    return tuple(sorted({*small, *(size // d for d in small)}))


def padded_shape(
    out_dims: Sequence[int], in_dims: Sequence[int], out_features: int | None, in_features: int | None
) -> tuple[int, int]:
    """Return `(out_features, in_features)`; a value of None becomes the product of the dims.

    Raises:
        TopologyError: `out_dims` and `in_dims` differ in length, or a product is less than the number of
            features.
    """
    products = (math.prod(check_sizes("out_dims", out_dims)), math.prod(check_sizes("in_dims", in_dims)))
    rows = products[0] if out_features is None else check_size("out_features", out_features)
    columns = products[1] if in_features is None else check_size("in_features", in_features)
    check_dims((rows, columns), out_dims, in_dims)
    return rows, columns


def site_topology(
    family: str,
    cores: Iterable[Sequence[str]],
    bonds: Sequence[int],
    out_dims: Sequence[int],
    in_dims: Sequence[int],
    shape: tuple[int, int],
) -> Topology:
    """Build a topology with an out-leg `o<k>` and an in-leg `i<k>` for each site `k`.

    Args:
        family: name of the family.
        cores: labels of each core. Cores are named by their positions.
        bonds: sizes of the bonds `b0`, `b1`, ...
        out_dims: sizes of the out-legs.
        in_dims: sizes of the in-legs.
        shape: shape `(out_features, in_features)` without padding.
    """
    sizes = {
        f"{x}{k}": size
        for x, y in (("b", bonds), ("o", out_dims), ("i", in_dims))
        for k, size in enumerate(y)
    }
    return Topology(
        family=family,
        cores=tuple(CoreSpec(str(k), tuple(core)) for k, core in enumerate(cores)),
        sizes=tuple(sizes.items()),
        out_labels=tuple(f"o{k}" for k in range(len(out_dims))),
        in_labels=tuple(f"i{k}" for k in range(len(in_dims))),
        out_features=shape[0],
        in_features=shape[1],
    )


def check_bonds(
    name: str,
    bonds: Sequence[int] | None,
    count: int,
    each: str,
    max_bond: int | Sequence[int] | None,
) -> tuple[int | None, ...]:
    """Check the bonds and limits passed to a builder.

    Args:
        name: name of the argument with the bonds.
        bonds: the bonds, or None.
        count: required number of bonds.
        each: end of the error message, such as `"one for each bond"`.
        max_bond: limit for all bonds, a sequence with a limit for each bond, or None.

    Returns:
        One limit for each bond; None means no limit.

    Raises:
        TopologyError: the bonds are not `count` integers of at least 1.
    """
    caps = caps_of_bonds(max_bond, count, TopologyError)
    if bonds is not None and len(check_sizes(name, bonds)) != count:
        raise TopologyError(f"{name} {tuple(bonds)} must have {count} entries, {each}.")
    return caps


def clip_bonds(name: str, wanted: Sequence[int], useful: Sequence[int]) -> list[int]:
    """Clip bonds to the largest useful bonds, with a warning if a bond is changed.

    Args:
        name: name of the builder's argument, for the warning.
        wanted: bonds that the caller requested.
        useful: largest bonds that the dims and the neighbouring bonds allow.
    """
    kept = [min(pair) for pair in zip(wanted, useful, strict=True)]
    if kept != list(wanted):
        warnings.warn(
            f"{name} {tuple(wanted)} is larger than these dims can use, and is clipped to {tuple(kept)}.",
            stacklevel=2,
        )
    return kept


def fitted_network(topology: Topology, cores: Sequence[Tensor]) -> TensorNetwork:
    """Build a network of exactly this topology: pad the cores with zeros, and balance their norms.

    Cores can be smaller than planned, since truncating a bond may lower the rank at the next bonds.
    """
    shapes = topology.core_shapes.values()
    padded = [pad_core(core, shape) for core, shape in zip(cores, shapes, strict=True)]
    return TensorNetwork(topology, balance_norms(padded))


def pad_core(core: Tensor, shape: Sequence[int]) -> Tensor:
    """Pad a core with zeros at the end of each dimension to the given shape."""
    padding = [amount for have, want in zip(core.shape, shape, strict=True) for amount in (want - have, 0)]
    return torch.nn.functional.pad(core, padding[::-1])


def balance_norms(cores: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Rescale the cores so that all have elements of equal root mean square; the operator does not change.

    After TT-SVD the last core has the whole norm, so that no learning rate would suit all cores.
    """
    scales = [frobenius(core) / core.numel() ** 0.5 for core in cores]
    if min(scales) == 0:
        return tuple(cores)
    mean = 1.0
    for scale in scales:
        mean *= scale ** (1 / len(scales))
    return tuple(core * (mean / scale) for core, scale in zip(cores, scales, strict=True))
