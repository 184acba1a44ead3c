"""Hypothesis strategies for matrices, budgets, topologies and networks, and hypothesis profiles.

Hypothesis draws shapes, kinds of spectra, dtypes and seeds, and simplifies them when a test fails. Matrix
elements come from a random generator with the drawn seed.
"""

import math
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from torch import Tensor

from tensornet.budget import Budget
from tensornet.mpo import MPO
from tensornet.network import TensorNetwork, random_cores
from tensornet.topologies import topology_family, topology_names
from tensornet.topology import Topology

#: Kinds of singular spectra of matrices. Matrices of the last two kinds have fixed ranks, 0 and 1.
SPECTRA = ("gaussian", "flat", "low_rank", "power", "exponential", "zero", "constant")

REAL = (torch.float32, torch.float64)
COMPLEX = (torch.complex64, torch.complex128)
HALF = (torch.float16, torch.bfloat16)


def dtypes(*, complex: bool = True, half: bool = False) -> SearchStrategy[torch.dtype]:
    """Draw floating-point dtypes; `complex` and `half` add complex and 16-bit dtypes.

    Example:
        >>> from hypothesis import find
        >>> from tensornet.testing import strategies
        >>> find(strategies.dtypes(half=True), lambda dtype: dtype == torch.bfloat16)
        torch.bfloat16
    """
    return st.sampled_from((*REAL, *(COMPLEX if complex else ()), *(HALF if half else ())))


@st.composite
def dims(
    draw: DrawFn, *, min_sites: int = 1, max_sites: int = 4, max_dim: int = 4
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Draw leg sizes `(out_dims, in_dims)` for a random number of sites.

    Example:
        >>> from hypothesis import find
        >>> from tensornet.testing import strategies
        >>> find(strategies.dims(min_sites=2), lambda dims: True)
        ((1, 1), (1, 1))
    """
    sites = draw(st.integers(min_sites, max_sites))
    legs = st.tuples(*[st.integers(1, max_dim)] * sites)
    return draw(legs), draw(legs)


@st.composite
def matrices(
    draw: DrawFn,
    *,
    shape: tuple[int, int] | None = None,
    max_size: int = 24,
    dtype: SearchStrategy[torch.dtype] | torch.dtype | None = None,
    spectrum: str | None = None,
    rank: int | None = None,
    scales: bool = True,
) -> Tensor:
    """Draw a matrix; properties that are not given are drawn too.

    Args:
        shape: shape `(out, in)`; any shape up to `max_size` if absent.
        max_size: largest number of rows and of columns, if `shape` is absent.
        dtype: a dtype or a strategy for dtypes; real and complex dtypes if absent.
        spectrum: one of `SPECTRA`. If absent, any of them, or, if `rank` is given, any that does not fix the
            rank.
        rank: rank of the matrix, at most the smaller of its sizes. If absent, the rank is full unless the
            spectrum fixes it or is `"low_rank"`.
        scales: whether the matrix may be scaled by 1e-12 or 1e12; never for 16-bit types.

    Example:
        >>> from hypothesis import given
        >>> from tensornet.testing import strategies
        >>> @given(matrix=strategies.matrices(max_size=8, dtype=torch.float64))
        ... def test(matrix):
        ...     assert max(matrix.shape) <= 8
        >>> test()
    """
    sizes = st.integers(1, max_size)
    rows, columns = shape or (draw(sizes), draw(sizes))
    kind = dtype if isinstance(dtype, torch.dtype) else draw(dtype if dtype is not None else dtypes())
    name = spectrum or draw(st.sampled_from(SPECTRA if rank is None else SPECTRA[:-2]))
    scale = draw(st.sampled_from((1.0, 1.0, 1e-12, 1e12))) if scales and kind not in HALF else 1.0
    matrix = matrix_with_spectrum((rows, columns), name, seed=draw(st.integers(0, 2**16)), rank=rank)
    if kind.is_complex and name not in ("zero", "constant"):
        angles = torch.linspace(0, 3, columns, dtype=torch.float64)
        # Multiplying by a unitary diagonal matrix preserves the singular values.
        return (matrix * torch.exp(1j * angles) * scale).to(kind)
    return (matrix * scale).to(kind)


def matrix_with_spectrum(shape: tuple[int, int], name: str, *, seed: int, rank: int | None = None) -> Tensor:
    """Build a float64 matrix whose singular values follow one of `SPECTRA`; equal seeds give equal matrices.

    Raises:
        ValueError: the spectrum is unknown.

    Example:
        >>> from tensornet.testing import strategies
        >>> strategies.matrix_with_spectrum((6, 4), "exponential", seed=0).shape
        torch.Size([6, 4])
    """
    if name not in SPECTRA:
        raise ValueError(f"Unknown spectrum {name!r}; choose one of {', '.join(SPECTRA)}.")
    generator = torch.Generator().manual_seed(seed)
    size = min(shape)
    if name in ("zero", "constant"):
        return torch.full(shape, 0.0 if name == "zero" else 1.0, dtype=torch.float64)
    gaussian = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    if name == "gaussian" and rank is None:
        return gaussian
    U, S, Vh = torch.linalg.svd(gaussian, full_matrices=False)
    k = torch.arange(size, dtype=torch.float64)
    if name == "flat":
        S = torch.ones(size, dtype=torch.float64)
    elif name == "power":
        S = 1 / (k + 1)
    elif name == "exponential":
        S = torch.exp(-k)
    if name == "low_rank" and rank is None:
        rank = max(1, size // 3)
    if rank is not None:
        S = torch.where(k < rank, S, 0)
    return (U * S) @ Vh


@st.composite
def budgets(draw: DrawFn, *, max_bond: int = 8) -> Budget:
    """Draw a budget with any combination of limits, possibly without any limit.

    Example:
        >>> from hypothesis import find
        >>> from tensornet.testing import strategies
        >>> find(strategies.budgets(), lambda budget: budget.max_bond == 3).max_bond
        3
    """
    return Budget(
        max_bond=draw(st.none() | st.integers(1, max_bond)),
        rel_error=draw(st.none() | st.sampled_from((0.0, 0.01, 0.1, 0.5, 0.9))),
        param_ratio=draw(st.none() | st.sampled_from((0.3, 0.6, 1.0, 2.0))),
    )


@st.composite
def mpos(
    draw: DrawFn,
    *,
    dims: SearchStrategy[tuple[tuple[int, ...], tuple[int, ...]]] | None = None,
    max_bond: int = 4,
    dtype: SearchStrategy[torch.dtype] | torch.dtype | None = None,
    padded: bool = True,
) -> MPO:
    """Draw a random MPO; its bonds may be larger than its matrix needs.

    Args:
        dims: strategy for `(out_dims, in_dims)`.
        max_bond: largest bond.
        dtype: a dtype or a strategy for dtypes; real and complex dtypes if absent.
        padded: whether up to two rows and up to two columns may be padding.

    Example:
        >>> from hypothesis import given
        >>> from tensornet.testing import strategies
        >>> @given(mpo=strategies.mpos(max_bond=3))
        ... def test(mpo):
        ...     assert max(mpo.bond_dims, default=1) <= 3
        >>> test()
    """
    rows, columns = draw(dims if dims is not None else _default_dims)
    kind = dtype if isinstance(dtype, torch.dtype) else draw(dtype if dtype is not None else dtypes())
    bonds = [1, *(draw(st.integers(1, max_bond)) for _ in rows[1:]), 1]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    cores = [
        torch.randn(bonds[k], o, i, bonds[k + 1], generator=generator, dtype=kind, device="cpu")
        for k, (o, i) in enumerate(zip(rows, columns, strict=True))
    ]
    full_out, full_in = math.prod(rows), math.prod(columns)
    cut = st.integers(0, 2) if padded else st.just(0)
    return MPO(
        cores,
        out_features=max(1, full_out - draw(cut)),
        in_features=max(1, full_in - draw(cut)),
    )


@st.composite
def topologies(
    draw: DrawFn, *, families: tuple[str, ...] | None = None, max_size: int = 16, max_bond: int = 4
) -> Topology:
    """Draw a topology of a registered family, built for a random shape.

    Args:
        families: names of families to choose from; all registered families if absent.
        max_size: largest number of rows and columns.
        max_bond: largest bond.

    Example:
        >>> from hypothesis import given
        >>> from tensornet.testing import strategies
        >>> @given(topology=strategies.topologies(families=("tucker",), max_size=8))
        ... def test(topology):
        ...     assert topology.family == "tucker"
        >>> test()
    """
    family = topology_family(draw(st.sampled_from(families or topology_names())))
    rows, columns = draw(st.integers(1, max_size)), draw(st.integers(1, max_size))
    return family.build(rows, columns, max_bond=draw(st.integers(1, max_bond)))


@st.composite
def networks(
    draw: DrawFn,
    *,
    topology: SearchStrategy[Topology] | None = None,
    dtype: SearchStrategy[torch.dtype] | torch.dtype = torch.float64,
) -> TensorNetwork:
    """Draw a network with Gaussian cores, scaled so that it preserves the variance of activations.

    Example:
        >>> from hypothesis import given
        >>> from tensornet.testing import strategies
        >>> @given(network=strategies.networks())
        ... def test(network):
        ...     assert network.to_matrix().shape == network.shape
        >>> test()
    """
    drawn = draw(topology if topology is not None else topologies())
    kind = dtype if isinstance(dtype, torch.dtype) else draw(dtype)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    return TensorNetwork(drawn, random_cores(drawn, generator=generator, dtype=kind))


_default_dims = dims()


def register_profiles() -> None:
    """Register the profiles `default`, `ci` and `nightly` with hypothesis.

    Select a profile with `settings.load_profile(name)`; the tests of this project read the name from the
    environment variable `HYPOTHESIS_PROFILE`.

    - `default`: 50 random examples, for development.
    - `ci`: 15 examples, the same in every run.
    - `nightly`: 1000 random examples, to find rare failures.

    No profile has a deadline, since the first call of an operation takes longer: it plans or compiles.

    Example:
        >>> from hypothesis import settings
        >>> from tensornet.testing import register_profiles
        >>> register_profiles()
        >>> settings.get_profile("ci").max_examples
        15
    """
    # Set all options explicitly, since hypothesis has other defaults on CI machines.
    common: dict[str, Any] = {
        "deadline": None,
        "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
    }
    settings.register_profile("default", max_examples=50, derandomize=False, **common)
    settings.register_profile(
        "ci", max_examples=15, derandomize=True, database=None, print_blob=True, **common
    )
    settings.register_profile("nightly", max_examples=1000, derandomize=False, **common)
