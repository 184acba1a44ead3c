"""Result of decomposing a matrix."""

from collections.abc import Callable
from dataclasses import dataclass, field

from tensornet.network import TensorNetwork
from tensornet.topology import Topology


@dataclass(frozen=True)
class Decomposition:
    """Network that approximates a matrix, with certified error.

    Args:
        network: the cores.
        error: guaranteed upper bound of `|W - W'|_F / |W|_F`.
        bound_by: the cap that decided the bonds: `"max_bond"`, `"rel_error"`, `"param_ratio"`, or
            `"exact"` if no bond was truncated.
        iterations: sweeps of alternating least squares, 0 where the decomposition has a closed form.
        converged: whether alternating least squares settled before its sweep limit.

    Example:
        >>> found = tn.decompose(torch.randn(12, 8), "low_rank", max_bond=3)
        >>> found.network.num_params, found.bound_by, 0 < found.error < 1
        (60, 'max_bond', True)
    """

    network: TensorNetwork
    error: float
    bound_by: str
    iterations: int = 0
    converged: bool = True


@dataclass(frozen=True)
class Prediction:
    """Outcome that a decomposition within a budget will have, without its cores.

    Args:
        topology: of the network.
        error: relative Frobenius error.
        bound_by: the cap that decides the bonds, see `Decomposition`.
        decompose: decomposes by what the prediction has computed already; None where that saves nothing.
    """

    topology: Topology
    error: float
    bound_by: str
    decompose: Callable[[], Decomposition] | None = field(default=None, compare=False, repr=False)
