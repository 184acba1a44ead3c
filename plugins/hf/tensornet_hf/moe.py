"""Upcycling: the dense feed-forward networks of a model become mixtures of experts that share cores."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from tensornet.budget import Budget
from tensornet.compression.apply import set_submodule
from tensornet.compression.hooks import structure_changed
from tensornet_hf.feed_forward import FeedForward, find_feed_forwards
from tensornet_moe import (
    ExpertChoiceRouter,
    ExpertFFN,
    Router,
    SharedCoreExperts,
    SharedCoreMoE,
    SwitchRouter,
    TopKRouter,
)
from tensornet_moe.routing import COMBINE, Combine

RouterName = Literal["switch", "topk", "expert_choice"]
ROUTERS = ("switch", "topk", "expert_choice")


@dataclass(frozen=True)
class MoEConfig:
    """How dense feed-forward networks become mixtures.

    The variants of the paper's comparison: `shared="center"` is MPOE; `sites=1, shared="none"` gives every
    expert dense matrices of its own (Switch); `shared="none"` alone gives it all cores of its own;
    `max_bond=` truncates.

    Args:
        num_experts: experts of each network.
        top_k: experts for each token.
        router: `"switch"` (top-1), `"topk"`, or `"expert_choice"` (encoders only: it looks at later tokens).
        shared: which cores are shared: `"center"`, `"ends"`, `"none"`, `"all"`, or core names.
        topology: family of the decomposition.
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
        combine: `"unit"` or `"prob"`, see `tensornet_moe.Router`.
        target_modules: patterns naming the networks; all that are recognised if absent.
        matrices: names of the layers inside, for networks of another form than the known ones.
        seed: of routers and noise.

    Raises:
        ValueError, BudgetError: an option out of its range.
    """

    num_experts: int = 8
    top_k: int = 1
    router: RouterName = "switch"
    shared: str | Sequence[str] = "center"
    topology: str = "mpo"
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
        if self.router not in ROUTERS:
            raise ValueError(f"Unknown router {self.router!r}; choose one of {', '.join(ROUTERS)}.")
        if self.combine not in COMBINE:
            raise ValueError(f"Unknown combine={self.combine!r}; choose one of {', '.join(COMBINE)}.")
        if self.num_experts < 1:
            raise ValueError(f"num_experts must be at least 1, got {self.num_experts}.")
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(
                f"top_k={self.top_k} with num_experts={self.num_experts}: a token can go to at least 1 "
                "and at most num_experts experts."
            )
        if self.top_k != 1 and self.router != "topk":
            raise ValueError(f'top_k={self.top_k} needs router="topk"; {self.router!r} has no top_k.')
        if self.aux_loss_coef < 0 or self.z_loss_coef < 0:
            raise ValueError(
                f"Coefficients of losses must be at least 0, got aux_loss_coef={self.aux_loss_coef}, "
                f"z_loss_coef={self.z_loss_coef}."
            )
        if isinstance(self.target_modules, str):
            raise ValueError(f"target_modules is a list of patterns; write [{self.target_modules!r}].")

    def make_router(self, num_features: int, *, seed: int) -> Router:
        """A router with weights drawn from `seed`, in float32 on the CPU."""
        options: dict[str, Any] = {"jitter": self.jitter, "combine": self.combine}
        router: Router
        if self.router == "switch":
            router = SwitchRouter(num_features, self.num_experts, **options)
        elif self.router == "topk":
            router = TopKRouter(num_features, self.num_experts, top_k=self.top_k, **options)
        else:
            factor = 1.0 if self.capacity_factor is None else self.capacity_factor
            router = ExpertChoiceRouter(num_features, self.num_experts, capacity_factor=factor, **options)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            router.weight.normal_(0, 0.1 / num_features**0.5, generator=generator)
        return router


@dataclass(frozen=True)
class UpcycledLayer:
    """One network that became a mixture.

    Args:
        name: of the module.
        dense_params: parameters before.
        params: parameters after, router included.
        shared_params: those of them that all experts share.
        error: largest relative Frobenius error among its matrices.
    """

    name: str
    dense_params: int
    params: int
    shared_params: int
    error: float


@dataclass(frozen=True)
class UpcycleReport:
    """What `upcycle` did.

    Args:
        layers: one entry for each network.
        num_experts: experts of each.
    """

    layers: tuple[UpcycledLayer, ...]
    num_experts: int

    @property
    def dense_params(self) -> int:
        """Parameters of the networks before."""
        return sum(layer.dense_params for layer in self.layers)

    @property
    def params(self) -> int:
        """Parameters of the mixtures."""
        return sum(layer.params for layer in self.layers)

    @property
    def dense_experts_ratio(self) -> float:
        """Parameters relative to a mixture whose experts are all dense."""
        return self.params / (self.num_experts * self.dense_params)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        totals = {"dense_params": self.dense_params, "params": self.params}
        return {
            "num_experts": self.num_experts,
            **totals,
            "dense_experts_ratio": self.dense_experts_ratio,
            "layers": [asdict(layer) for layer in self.layers],
        }

    def __str__(self) -> str:
        worst = max(layer.error for layer in self.layers)
        return (
            f"{len(self.layers)} feed-forward networks became {self.num_experts} experts each: "
            f"{self.dense_params:,} -> {self.params:,} parameters, {self.dense_experts_ratio:.3f} of dense "
            f"experts; largest relative error {worst:.2e}"
        )


@torch.no_grad()
def upcycle(model: nn.Module, config: MoEConfig, *, progress: bool = False) -> UpcycleReport:
    """Replace dense feed-forward networks by mixtures of experts, in place.

    Every expert starts as the decomposition of its dense network, so that without truncation, capacity and
    noise the model computes what it did, whatever the routers do (`"expert_choice"` excepted, where tokens
    that no expert chooses pass through the residual). A Hugging Face model saves, loads and trains as before,
    and the auxiliary losses join its loss in training; of other models collect them with
    `tensornet_moe.collect_aux_losses`.

    Args:
        model: T5, GPT-2, or any model with networks `W_down act(W_up x)` (gated or not).
        config: what to make of them.
        progress: show a progress bar.

    Raises:
        TargetError: no feed-forward network is found, or one computes something else; the model is unchanged.
        TopologyError, BudgetError, NonFiniteError: from a decomposition; the model is unchanged.
    """
    networks = find_feed_forwards(model, target_modules=config.target_modules, matrices=config.matrices)
    made = []
    for index, network in enumerate(tqdm(networks, desc="upcycling", disable=not progress, unit="layer")):
        made.append(make_mixture(network, config, seed=config.seed + index))
    for network, (mixture, _) in zip(networks, made, strict=True):
        for name in network.names:
            set_submodule(model, name, mixture)
    structure_changed(model)
    return UpcycleReport(tuple(layer for _, layer in made), config.num_experts)


def make_mixture(
    network: FeedForward, config: MoEConfig, *, seed: int
) -> tuple[SharedCoreMoE, UpcycledLayer]:
    """A mixture whose experts all start as one dense network, and its line in the report."""
    down = network.matrices[-1]
    banks = {
        name: _bank(network.matrix(name), name == down, config, seed=seed * 3 + position)
        for position, name in enumerate(network.matrices)
    }
    first = network.matrix(network.matrices[0])
    where: dict[str, Any] = {"device": first.device, "dtype": first.dtype}
    biases = {name: network.bias(name) for name in network.matrices}
    experts = ExpertFFN(
        banks,
        activation=network.activation,
        bias=any(bias is not None for bias in biases.values()),
        dropout=network.dropout if network.dropout_place == "hidden" else 0.0,
        **where,
    )
    for name, bias in biases.items():
        if bias is not None:
            getattr(experts, f"{name}_bias").copy_(bias.expand(config.num_experts, -1))
    choice = config.router == "expert_choice"
    mixture = SharedCoreMoE(
        config.make_router(first.shape[1], seed=seed).to(**where),
        experts,
        capacity_factor=None if choice else config.capacity_factor,
        # Experts that choose are balanced by construction; the loss would be a constant.
        balance_coef=0.0 if choice else config.aux_loss_coef,
        z_coef=config.z_loss_coef,
        dropout=network.dropout if network.dropout_place == "output" else 0.0,
    )
    for bank in banks.values():
        bank.requires_grad_(True)
    shared = {id(p): p.numel() for bank in banks.values() for p in bank.shared_parameters().values()}
    layer = UpcycledLayer(
        name=network.name,
        dense_params=sum(p.numel() for p in network.module.parameters()),
        params=sum(p.numel() for p in mixture.parameters()),
        shared_params=sum(shared.values()),
        error=max(bank.error or 0.0 for bank in banks.values()),
    )
    return mixture, layer


def _bank(matrix: Tensor, is_down: bool, config: MoEConfig, *, seed: int) -> SharedCoreExperts:
    options: dict[str, Any] = {}
    dims = (config.model_dims, config.hidden_dims)
    if config.topology == "mpo":
        options["out_dims"], options["in_dims"] = dims if is_down else dims[::-1]
        options["sites"] = config.sites if config.sites or any(d is not None for d in dims) else 5
    elif config.sites is not None or any(d is not None for d in dims):
        options = {"sites": config.sites, "model_dims": config.model_dims, "hidden_dims": config.hidden_dims}
    return SharedCoreExperts.from_dense(
        matrix,
        num_experts=config.num_experts,
        topology=config.topology,
        shared=config.shared,
        noise=config.noise,
        seed=seed,
        max_bond=config.max_bond,
        rel_error=config.rel_error,
        param_ratio=config.param_ratio,
        **{key: value for key, value in options.items() if value is not None},
    )
