"""Builders of empty mixture modules from their JSON descriptions, for checkpoints."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tensornet.nn import build_module, register_module_type
from tensornet.nn.storage import Storage
from tensornet.topology import Topology
from tensornet_moe.bank import ExpertBank, SharedCores
from tensornet_moe.experts import SharedCoreExperts
from tensornet_moe.ffn import ExpertFFN
from tensornet_moe.layer import SharedCoreMoE
from tensornet_moe.low_rank_deltas import LowRankDeltaExperts
from tensornet_moe.routers import Router
from tensornet_moe.tied import SharedExperts, TiedExperts

_Device = torch.device | str | None


def _typed(module: nn.Module, kind: type) -> Any:
    if not isinstance(module, kind):
        raise TypeError(f"expected a {kind.__name__}, the description makes a {type(module).__name__}")
    return module


def _experts(spec: Mapping[str, Any], device: _Device, dtype: torch.dtype | None) -> nn.Module:
    topologies = [Topology.from_dict(data) for data in spec["topologies"]]
    return SharedCoreExperts(
        topologies[0] if len(topologies) == 1 else topologies,
        spec["num_experts"],
        shared=spec["shared"],
        owner_label=spec["owner"],
        storage=Storage.from_dict(spec.get("storage", {})),
        device=device,
        dtype=dtype,
    )


def _shared_cores(spec: Mapping[str, Any], device: _Device, dtype: torch.dtype | None) -> nn.Module:
    topology = Topology.from_dict(spec["topology"])
    return SharedCores(topology, spec["shared"], label=spec["label"], device=device, dtype=dtype)


def _low_rank_deltas(spec: Mapping[str, Any], device: _Device, dtype: torch.dtype | None) -> nn.Module:
    base = _typed(build_module(spec["base"], device=device, dtype=dtype), ExpertBank)
    return LowRankDeltaExperts(base, spec["rank"], device=device, dtype=dtype)


def _shared_experts(spec: Mapping[str, Any], device: _Device, dtype: torch.dtype | None) -> nn.Module:
    banks = {
        name: _typed(build_module(bank, device=device, dtype=dtype), ExpertBank)
        for name, bank in zip(spec["names"], spec["banks"], strict=True)
    }
    return SharedExperts(banks, label=spec["label"])


def _tied_experts(spec: Mapping[str, Any], device: _Device, dtype: torch.dtype | None) -> nn.Module:
    rows, columns = spec["shape"]
    return TiedExperts(
        spec["owner"],
        spec["name"],
        num_experts=spec["num_experts"],
        shape=(rows, columns),
    )


def _ffn(spec: Mapping[str, Any], device: _Device, dtype: torch.dtype | None) -> nn.Module:
    banks = {
        name: _typed(build_module(spec["matrices"][name], device=device, dtype=dtype), ExpertBank)
        for name in spec["names"]
    }
    return ExpertFFN(
        banks,
        activation=spec["activation"],
        bias=spec["bias"],
        dropout=spec["dropout"],
        device=device,
        dtype=dtype,
    )


def _moe(spec: Mapping[str, Any], device: _Device, dtype: torch.dtype | None) -> nn.Module:
    shared_expert = spec["shared_expert"]
    if shared_expert is not None:
        shared_expert = _typed(build_module(shared_expert, device=device, dtype=dtype), ExpertFFN)
    return SharedCoreMoE(
        _typed(build_module(spec["router"], device=device, dtype=dtype), Router),
        _typed(build_module(spec["experts"], device=device, dtype=dtype), ExpertFFN),
        shared_expert=shared_expert,
        capacity_factor=spec["capacity_factor"],
        balance_coef=spec["balance_coef"],
        z_coef=spec["z_coef"],
        dropout=spec["dropout"],
    )


register_module_type("shared_cores", _shared_cores)
register_module_type("shared_core_experts", _experts)
register_module_type("low_rank_delta_experts", _low_rank_deltas)
register_module_type("shared_experts", _shared_experts)
register_module_type("tied_experts", _tied_experts)
register_module_type("expert_ffn", _ffn)
register_module_type("shared_core_moe", _moe)
