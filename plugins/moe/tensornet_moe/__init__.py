"""Mixture-of-experts layers whose experts share tensor-network cores, with routers, losses and masks."""

from typing import Any

import tensornet_moe.expert_sharing
import tensornet_moe.rounding  # noqa: F401  (these imports register extensions)
from tensornet.gone import no_attribute
from tensornet_moe.balance import expert_load, update_biases
from tensornet_moe.bank import ExpertBank
from tensornet_moe.costs import ModelCosts, describe
from tensornet_moe.experts import SharedCoreExperts
from tensornet_moe.ffn import ExpertFFN
from tensornet_moe.layer import SharedCoreMoE, collect_aux_losses, load_balancing_loss, router_z_loss
from tensornet_moe.low_rank_deltas import LowRankDeltaExperts
from tensornet_moe.mask import GradientMask, linear_fade, shared_parameters
from tensornet_moe.mixtures import mixture
from tensornet_moe.pool import ExpertPool, PooledExperts
from tensornet_moe.rates import parameter_groups
from tensornet_moe.routers import (
    ExpertChoiceRouter,
    Router,
    Routing,
    SwitchRouter,
    TopKRouter,
    register_router,
)
from tensornet_moe.specialist_layers import SpecialistLinear, Specialists, change_form, specialists

__all__ = [
    "ExpertBank",
    "ExpertChoiceRouter",
    "ExpertFFN",
    "ExpertPool",
    "GradientMask",
    "LowRankDeltaExperts",
    "ModelCosts",
    "PooledExperts",
    "Router",
    "Routing",
    "SharedCoreExperts",
    "SharedCoreMoE",
    "SpecialistLinear",
    "Specialists",
    "SwitchRouter",
    "TopKRouter",
    "change_form",
    "collect_aux_losses",
    "describe",
    "expert_load",
    "linear_fade",
    "load_balancing_loss",
    "mixture",
    "parameter_groups",
    "register_router",
    "router_z_loss",
    "shared_parameters",
    "specialists",
    "update_biases",
]


def __getattr__(name: str) -> Any:
    """Raise an error that says what took the place of a name of earlier versions."""
    raise no_attribute("tensornet_moe", name)
