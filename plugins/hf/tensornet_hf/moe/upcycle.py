"""Upcycling: replace dense feed-forward networks by mixtures of experts that share cores."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from tensornet._util import progress_bar
from tensornet.compression.apply import set_submodule
from tensornet.errors import TargetError
from tensornet.nn.extension import structure_changed
from tensornet.nn.layer_kinds import carry_hooks
from tensornet_hf.moe.banks import across_layers, alone, owner_place, put_owners
from tensornet_hf.moe.causality import causal_networks
from tensornet_hf.moe.feed_forward import FeedForward
from tensornet_hf.moe.finder import find_feed_forwards
from tensornet_hf.moe.upcycle_config import MoEConfig
from tensornet_moe import ExpertFFN, SharedCoreExperts, SharedCoreMoE
from tensornet_moe.routers import router_kind


@dataclass(frozen=True)
class UpcycledLayer:
    """Entry of the report: one network that became a mixture.

    Args:
        name: of the module.
        dense_params: parameters before.
        params: parameters after, router included; without those that several layers share.
        shared_params: parameters that all experts share.
        error: largest relative Frobenius error among its matrices.
    """

    name: str
    dense_params: int
    params: int
    shared_params: int
    error: float


@dataclass(frozen=True)
class UpcycleReport:
    """Result of `upcycle`.

    Args:
        layers: one entry for each network.
        num_experts: experts of each.
        across_params: parameters that several layers share.

    Example:
        >>> from transformers import AutoModelForCausalLM
        >>> model = AutoModelForCausalLM.from_pretrained(th.embedded.gpt2_path())
        >>> report = th.upcycle(model, th.MoEConfig(num_experts=2))
        >>> report.num_experts, report.dense_experts_ratio < 1
        (2, True)
    """

    layers: tuple[UpcycledLayer, ...]
    num_experts: int
    across_params: int = 0

    @property
    def dense_params(self) -> int:
        """Parameters of the networks before."""
        return sum(layer.dense_params for layer in self.layers)

    @property
    def params(self) -> int:
        """Parameters of the mixtures; cores shared by several layers count once."""
        return sum(layer.params for layer in self.layers) + self.across_params

    @property
    def dense_experts_ratio(self) -> float:
        """Parameters relative to a mixture whose experts are all dense."""
        return self.params / (self.num_experts * self.dense_params)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON-ready form."""
        totals = {"dense_params": self.dense_params, "params": self.params}
        return {
            "num_experts": self.num_experts,
            **totals,
            "across_params": self.across_params,
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
def upcycle(
    model: nn.Module,
    config: MoEConfig,
    *,
    example: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> UpcycleReport:
    """Replace dense feed-forward networks by mixtures of experts, in place.

    Every expert starts as the decomposition of its dense network, so that without truncation, capacity and
    noise the model computes what it did, whatever the routers do (`"expert_choice"` excepted, where tokens
    that no expert chooses pass through the residual). A Hugging Face model saves, loads and trains as before,
    and the auxiliary losses join its loss in training; of other models collect them with
    `tensornet_moe.collect_aux_losses`.

    Where a network has no module of its own (BERT, OPT, BART), the mixture takes the place of its first
    matrix, and a module that does nothing those of the activation and the second. What such a layer drops
    out between them in training it then drops out of the result.

    Args:
        model: T5, GPT-2, BERT, or any model with networks `W_down act(W_up x)` (gated or not).
        config: what to make of them.
        example: keyword arguments of one call of the model. With a router that looks at later tokens
            (`"expert_choice"`) the model runs on them once, to see whether it is causal; only models whose
            inputs are not those of transformers need it.
        progress: show a progress bar.

    Raises:
        TargetError: no feed-forward network is found, one computes something else, or the router looks at
            later tokens and a network is causal; the model is unchanged.
        TopologyError, BudgetError, NonFiniteError: from a decomposition; the model is unchanged.
        TypeError: no model, or no configuration.

    Example:
        >>> from transformers import AutoModelForCausalLM
        >>> model = AutoModelForCausalLM.from_pretrained(th.embedded.gpt2_path())
        >>> report = th.upcycle(model, th.MoEConfig(num_experts=4, max_bond=32))
        >>> len(report.layers), report.params > report.dense_params
        (4, False)
    """
    if not isinstance(model, nn.Module) or not isinstance(config, MoEConfig):
        raise TypeError(
            "upcycle takes a model and a MoEConfig, got a "
            f"{type(model).__name__} and a {type(config).__name__}."
        )
    networks = find_feed_forwards(model, target_modules=config.target_modules, matrices=config.matrices)
    if not router_kind(config.router).causal:
        _refuse_causal(config, networks, causal_networks(model, networks, example=example))
    place = owner_place(model) if config.share_across_layers else None
    owners, banks = across_layers(networks, config, place, progress=progress)
    made = []
    for index, network in enumerate(
        progress_bar(networks, desc="upcycling", disable=not progress, unit="layer")
    ):
        seed = config.seed + index
        made.append(make_mixture(network, alone(network, config, seed, banks[index]), config, seed=seed))
    if place is not None:
        put_owners(place, {owner.label: owner for owner in owners})
    for network, (mixture, _) in zip(networks, made, strict=True):
        for name, part in network.replacements(mixture).items():
            if network.inside is None:  # else a matrix gives way to the whole network
                carry_hooks(model.get_submodule(name), part)
            set_submodule(model, name, part)
    structure_changed(model)
    across = sum(p.numel() for owner in owners for p in owner.parameters())
    return UpcycleReport(tuple(layer for _, layer in made), config.num_experts, across)


def _refuse_causal(config: MoEConfig, networks: Sequence[FeedForward], causal: Sequence[str]) -> None:
    if not causal:
        return
    others = [network.name for network in networks if network.name not in causal]
    rest = (
        f" The other {len(others)} networks, such as {others[0]}, may have it: name them with "
        "target_modules=[...] (--target)."
        if others
        else ""
    )
    raise TargetError(
        f"router={config.router!r} looks at later tokens, but {len(causal)} of {len(networks)} feed-forward "
        f"networks are causal, the first is {causal[0]}: training would leak the tokens to be predicted. "
        f'Use router="switch" or "topk".{rest}'
    )


def make_mixture(
    network: FeedForward, banks: Mapping[str, SharedCoreExperts], config: MoEConfig, *, seed: int
) -> tuple[SharedCoreMoE, UpcycledLayer]:
    """Build a mixture of these experts and its report entry; `seed` initializes the router."""
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
    choice = config.limits_itself
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
        dense_params=network.num_params,
        params=sum(p.numel() for p in mixture.parameters()),
        shared_params=sum(shared.values()),
        error=max(bank.error or 0.0 for bank in banks.values()),
    )
    return mixture, layer
