"""Options of upcycling."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tensornet.budget import Budget
from tensornet.errors import TopologyError
from tensornet.topologies import TopologyFamily, topology_family
from tensornet.topologies.registry import fixed_topologies
from tensornet.topology import Topology
from tensornet_moe import Router
from tensornet_moe.checks import check_capacity, check_noise, check_not_negative, check_whole
from tensornet_moe.routers import COMBINE, Combine, router_kind


@dataclass(frozen=True)
class MoEConfig:
    """Options of `upcycle`: experts, router, shared cores and auxiliary losses.

    The variants of the paper's comparison: `shared="center"` is MPOE; `sites=1, shared="none"` gives every
    expert dense matrices of its own (Switch); `shared="none"` alone gives it all cores of its own;
    `max_bond=` truncates.

    Args:
        num_experts: experts of each network.
        top_k: experts for each token.
        router: `"switch"` (top-1), `"topk"`, `"expert_choice"` (encoders only: it looks at later tokens), or
            one of your own, see `tensornet_moe.register_router`.
        shared: which cores are shared: `"center"`, `"ends"`, `"none"`, `"all"`, or core names.
        share_across_layers: one owner of the shared cores for all layers whose matrices have one name and
            shape. The model then starts far from what it was, because one core cannot fit unrelated layers:
            see `tensornet_moe.share_across_layers`, and train it.
        topology: family of the decomposition, by name or itself; or topologies, one for each shape of matrix
            in the networks.
        sites: number of cores, 5 as in the paper if no dims are given.
        model_dims: factors of the model's width, for every matrix alike.
        hidden_dims: factors of the width of the hidden layer.
        max_bond, rel_error, param_ratio: budget of each matrix, exact if absent.
        noise: relative noise on private cores, which breaks the symmetry between experts.
        aux_loss_coef: weight of the load-balancing loss (0.01 as in Switch).
        z_loss_coef: weight of the router z-loss.
        capacity_factor: slots of an expert relative to an even load, None computes every token. For
            `"expert_choice"`: average number of experts for each token, 1 if absent.
        jitter: multiplicative noise on what the router sees, in training.
        combine: `"unit"`, `"prob"` or `"sigmoid"`, see `tensornet_moe.Router`; only the first computes at the
            start what the dense network computed.
        target_modules: patterns naming the networks; all that are recognised if absent.
        matrices: names of the layers inside, for networks of another form than the known ones; dotted where
            they lie deeper, for example `("intermediate.dense", "output.dense")` of BERT.
        seed: of routers and noise.

    Raises:
        ValueError, BudgetError: an option out of its range.

    Example:
        >>> th.MoEConfig(num_experts=4, router="topk", top_k=2).top_k
        2
    """

    num_experts: int = 8
    top_k: int = 1
    router: str = "switch"
    shared: str | Sequence[str] = "center"
    share_across_layers: bool = False
    topology: str | TopologyFamily | Topology | Sequence[Topology] = "mpo"
    sites: int | None = None
    model_dims: Sequence[int] | None = None
    hidden_dims: Sequence[int] | None = None
    max_bond: int | None = None
    rel_error: float | None = None
    param_ratio: float | None = None
    noise: float = 0.0
    aux_loss_coef: float = 0.01
    z_loss_coef: float = 0.0
    capacity_factor: float | None = None
    jitter: float = 0.0
    combine: Combine = "unit"
    target_modules: Sequence[str] | None = None
    matrices: Sequence[str] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        Budget(max_bond=self.max_bond, rel_error=self.rel_error, param_ratio=self.param_ratio)
        check_whole(num_experts=self.num_experts, top_k=self.top_k, sites=self.sites)
        object.__setattr__(self, "topology", _checked_topology(self))
        kind = router_kind(self.router)
        if self.combine not in COMBINE:
            raise ValueError(f"Unknown combine={self.combine!r}; choose one of {', '.join(COMBINE)}.")
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(
                f"top_k={self.top_k} with num_experts={self.num_experts}: a token can go to at least 1 "
                "and at most num_experts experts."
            )
        if self.top_k != 1 and "top_k" not in kind.options:
            raise ValueError(f'top_k={self.top_k} needs router="topk"; {self.router!r} has no top_k.')
        check_not_negative(aux_loss_coef=self.aux_loss_coef, z_loss_coef=self.z_loss_coef)
        check_capacity(self.capacity_factor)
        if not 0 <= self.jitter < 1:
            raise ValueError(f"jitter must lie in [0, 1), got {self.jitter}.")
        check_noise(self.noise)
        both = (self.model_dims, self.hidden_dims)
        for name, dims in zip(("model_dims", "hidden_dims"), both, strict=True):
            if dims is not None and (isinstance(dims, str) or not isinstance(dims, Sequence)):
                raise ValueError(f"{name} is a list with one factor for each site, got {dims!r}.")
        if all(d is not None for d in both) and len(set(map(len, both))) > 1:  # type: ignore[arg-type]
            raise ValueError(
                f"model_dims={self.model_dims} and hidden_dims={self.hidden_dims} must have one factor for "
                "each site, so equally many; use 1 where a site has none."
            )
        if self.share_across_layers and self.shared in ("none", (), []):
            raise ValueError('share_across_layers=True with shared="none" shares nothing.')
        if self.share_across_layers and (self.rel_error is not None or self.param_ratio is not None):
            raise ValueError(
                "share_across_layers=True fits all layers by the same bonds: limit them with max_bond, not "
                "with rel_error or param_ratio, which would choose other bonds for each layer."
            )
        if isinstance(self.matrices, str):
            raise ValueError(
                f'matrices is a list of two or three names, as ("up", "down"); got {self.matrices!r}.'
            )
        if isinstance(self.target_modules, str):
            raise ValueError(f"target_modules is a list of patterns; write [{self.target_modules!r}].")

    @property
    def fixed(self) -> tuple[Topology, ...]:
        """Topologies for matrices of their shapes; empty where a family is given."""
        return self.topology if isinstance(self.topology, tuple) else ()

    @property
    def limits_itself(self) -> bool:
        """True if the router applies `capacity_factor` itself, so that the mixture drops no token."""
        return "capacity_factor" in router_kind(self.router).options

    def make_router(self, num_features: int, *, seed: int) -> Router:
        """Build a router with weights drawn from `seed`, in float32 on the CPU."""
        kind = router_kind(self.router)
        options = {key: getattr(self, key, None) for key in ("jitter", "combine", *kind.options)}
        given = {key: value for key, value in options.items() if value is not None}
        with torch.device("cpu"):
            router = kind(num_features, self.num_experts, **given)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            router.weight.normal_(0, 0.1 / num_features**0.5, generator=generator)
        return router


def _checked_topology(config: MoEConfig) -> str | tuple[Topology, ...]:
    """Validate the topology option: the name of a family, or topologies read from a configuration.

    Raises:
        TopologyError: neither, or topologies beside options that would choose them.
    """
    given = config.topology
    if isinstance(given, str | TopologyFamily):
        return topology_family(given).name if isinstance(given, TopologyFamily) else given
    if not (found := fixed_topologies(given)):
        raise TopologyError(
            "topology must be the name of a family, a registered family, a Topology or a list of topologies; "
            f"got {given!r:.200}."
        )
    choosing = ("sites", "model_dims", "hidden_dims", "max_bond", "rel_error", "param_ratio")
    if beside := [name for name in choosing if getattr(config, name) is not None]:
        raise TopologyError(
            f"A topology fixes all dims and bonds: drop {', '.join(beside)}, or give the name of a family."
        )
    return found
