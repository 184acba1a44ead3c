"""Topologies for experts that recombine or rescale a few shared matrices."""

from tensornet._util import check_size
from tensornet.topology import CoreSpec, Topology


def mixture_of_bases(*, out_features: int, in_features: int, bases: int, rank: int | None = None) -> Topology:
    """Build the network `W = A sum_k a_k B_k`, which is an expert of MoBE if the `B_k` are shared.

    The transform `A` is on the shorter side: `A: (out, rank)` if `out <= in`, else the product is `(sum_k a_k
    B_k) A` with `A: (rank, in)`. In a `SharedCoreExperts` use `shared=("basis",)`; the default
    `shared="center"` does the same if `basis` is the largest core. Each expert then owns `mix: (bases,)` and
    `transform`. MoBE has a nonlinearity after the sum, which is not possible in a tensor network.

    Args:
        out_features, in_features: shape of the matrix.
        bases: number of matrices `B_k`.
        rank: inner dimension; the shorter side if absent or larger.

    Raises:
        TopologyError: a size is not an integer of at least 1.

    Reference:
        Chen et al. 2025, "MoBE: Mixture-of-Basis-Experts for Compressing MoE-based LLMs", equation 2.

    Example:
        >>> topology = tm.mixture_of_bases(out_features=16, in_features=8, bases=2)
        >>> bank = tm.SharedCoreExperts(topology, 4, shared=("basis",))
        >>> {name: tuple(core.shape) for name, core in bank.named_parameters()}
        {'core_basis': (16, 8, 2), 'core_mix': (4, 2), 'core_transform': (4, 8, 8)}
    """
    sizes = {"out_features": out_features, "in_features": in_features, "bases": bases}
    for name, size in (sizes if rank is None else {**sizes, "rank": rank}).items():
        check_size(name, size)
    widest = min(out_features, in_features)
    basis, transform = ("o0", "r", "k"), ("r", "i0")
    if out_features <= in_features:
        basis, transform = ("k", "r", "i0"), ("o0", "r")
    return Topology(
        family="mixture_of_bases",
        cores=(CoreSpec("basis", basis), CoreSpec("mix", ("k",)), CoreSpec("transform", transform)),
        sizes=(("o0", out_features), ("i0", in_features), ("r", min(rank or widest, widest)), ("k", bases)),
        out_labels=("o0",),
        in_labels=("i0",),
        out_features=out_features,
        in_features=in_features,
    )


def scaled_bases(*, out_features: int, in_features: int, bases: int = 1) -> Topology:
    """Build the network `W = sum_k diag(rows_k) B_k diag(columns_k)`.

    In a `SharedCoreExperts` with `shared=("basis",)` (or the default, `"center"`, if the bases are the
    largest core) an expert owns `bases * (out_features + in_features)` values. With one base the experts are
    the members of a BatchEnsemble. With random signs as initial scales, experts compute different functions
    from the first step on; with low-rank deltas that start at zero, they do not.

    Args:
        out_features, in_features: shape of the matrix.
        bases: number of matrices `B_k`.

    Raises:
        TopologyError: a size is not an integer of at least 1.

    Reference:
        Wen, Tran, Ba 2020, "BatchEnsemble: An Alternative Approach to Efficient Ensemble and Lifelong
        Learning", equation 1; the sum over several bases is our extension.

    Example:
        >>> import torch
        >>> import tensornet_moe as tm
        >>> topology = tm.scaled_bases(out_features=16, in_features=8, bases=2)
        >>> bank = tm.SharedCoreExperts(topology, 4, shared=("basis",))
        >>> {name: tuple(core.shape) for name, core in bank.named_parameters()}
        {'core_rows': (4, 2, 16), 'core_basis': (2, 16, 8), 'core_columns': (4, 2, 8)}
    """
    for name, size in (("out_features", out_features), ("in_features", in_features), ("bases", bases)):
        check_size(name, size)
    return Topology(
        family="scaled_bases",
        cores=(
            CoreSpec("rows", ("k", "o0")),
            CoreSpec("basis", ("k", "o0", "i0")),
            CoreSpec("columns", ("k", "i0")),
        ),
        sizes=(("k", bases), ("o0", out_features), ("i0", in_features)),
        out_labels=("o0",),
        in_labels=("i0",),
        out_features=out_features,
        in_features=in_features,
    )
