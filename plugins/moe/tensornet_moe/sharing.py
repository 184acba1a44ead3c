"""Sharing cores across layers: one owner for the shared cores of several layers."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tensornet.errors import FormatError
from tensornet.topologies import TopologyFamily, topology_family
from tensornet.topology import Topology
from tensornet_moe.checks import check_noise, check_weights, check_whole
from tensornet_moe.expert_bank import AbsentCores, SharedCores
from tensornet_moe.experts import SharedCoreExperts
from tensornet_moe.initialization import Start, with_noise
from tensornet_moe.joint_fit import fit_shared, stack_error
from tensornet_moe.stacked import build_matrices, plan_stack
from tensornet_moe.tied_experts import AbsentExperts, SharedExperts, TiedExperts


@torch.no_grad()
def share_across_layers(
    weights: Tensor,
    *,
    num_experts: int,
    label: str = "shared",
    topology: Topology | str | TopologyFamily = "mpo",
    shared: str | Sequence[str] = "center",
    noise: float = 0.0,
    seed: int = 0,
    max_bond: int | None = None,
    max_sweeps: int = 10,
    **options: Any,
) -> tuple[SharedCores, list[SharedCoreExperts]]:
    """Upcycle several layers at once, with cores shared by all experts of all layers (our extension).

    The matrices of the layers are fitted jointly (see `fit_shared`); all experts of one layer start as the
    fit of its matrix. One center fits unrelated layers badly: `.error` of each bank measures this, and such
    a model must be trained before use.

    Args:
        weights: the dense matrix of each layer, shape `(layers, out, in)`.
        num_experts: experts of each layer.
        label: of the owner.
        topology: an explicit topology, or a family's name.
        shared: which cores are shared.
        noise, seed: as in `SharedCoreExperts.from_dense`; layer k uses `seed + k`.
        max_bond: cap on the bonds where `topology` is a name.
        max_sweeps: limit of alternating least squares.
        options: passed to the family, for example `out_dims=`, `in_dims=`, `sites=`.

    Returns:
        The owner, which belongs into the model beside the layers, and a bank for each layer, which borrows
        from it. `.error` of a bank is the relative Frobenius error of that layer's matrix before noise.

    Raises:
        ShapeError: `weights` is not a stack of matrices of the topology's shape.
        NonFiniteError: NaN or infinity in `weights`.
        TopologyError: `shared` chooses no core, or an unknown one.
        ValueError: noise below 0, or no expert.

    Example:
        >>> owner, banks = tm.share_across_layers(torch.randn(2, 8, 8), num_experts=3, max_bond=4)
        >>> owner.names, len(banks), banks[0].owner is owner
        (('1',), 2, True)
    """
    check_weights(weights, "layers", "out", "in")
    check_noise(noise)
    check_whole(num_experts=num_experts)
    if isinstance(topology, str | TopologyFamily):
        topology = topology_family(topology).build(*weights.shape[1:], max_bond=max_bond, **options)
    owner = SharedCores(topology, shared, label=label, device="meta")
    fit = fit_shared(weights, topology, owner.names, max_sweeps=max_sweeps)
    for name in owner.names:
        core = fit.cores[name].to(weights.dtype).contiguous()
        owner.register_parameter(f"core_{name}", nn.Parameter(core, requires_grad=True))
    banks = []
    for layer, weight in enumerate(weights):
        generator = torch.Generator().manual_seed(seed + layer)
        own = {n: core[layer] for n, core in fit.cores.items() if n not in owner.names}
        cores = {
            name: [with_noise(core, noise, generator) for _ in range(num_experts)]
            for name, core in own.items()
        }
        error = _error(weight, topology, {**fit.cores, **own})
        start = Start((topology,) * num_experts, owner.names, cores, error)
        banks.append(SharedCoreExperts._from_start(start, weights.dtype, owner))
    return owner, banks


def lend_shared_cores(model: nn.Module) -> int:
    """Connect banks rebuilt from descriptions with the owners of their cores or matrices, found by label.

    Args:
        model: holds banks and owners.

    Returns:
        Number of banks that were waiting for an owner.

    Raises:
        FormatError: the model has no owner of a label, or several.
        TopologyError, ShapeError: an owner has other cores or experts than its borrower expects.

    Example:
        >>> owner, banks = tm.share_across_layers(torch.randn(2, 8, 8), num_experts=3, max_bond=4)
        >>> specs = [part.spec() for part in (owner, *banks)]
        >>> model = torch.nn.ModuleList(tn.nn.build_module(spec, device=None, dtype=None) for spec in specs)
        >>> tm.lend_shared_cores(model)
        2
    """
    modules = list(model.modules())
    cores = [m for m in modules if isinstance(m, SharedCoreExperts) and isinstance(m.owner, AbsentCores)]
    experts = [m for m in modules if isinstance(m, TiedExperts) and isinstance(m.owner, AbsentExperts)]
    for bank in cores:
        assert bank.owner is not None
        bank.borrow(_owner(model, SharedCores, bank.owner.label))
    for tied in experts:
        tied.borrow(_owner(model, SharedExperts, tied.owner.label))
    return len(cores) + len(experts)


_Owner = TypeVar("_Owner", SharedCores, SharedExperts)


def _owner(model: nn.Module, kind: type[_Owner], label: str) -> _Owner:
    """Return the one owner of a kind with this label."""
    owners = [m for m in model.modules() if isinstance(m, kind)]
    found = [owner for owner in owners if owner.label == label]
    if len(found) != 1:
        raise FormatError(
            f"Experts borrow from the {kind.__name__} labelled {label!r}, of which "
            f"{type(model).__name__} has {len(found)}; its labels are "
            f"{sorted({owner.label for owner in owners}) or 'none'}. Put the owner into the model, and give "
            "every owner a label of its own."
        )
    return found[0]


def _error(weight: Tensor, topology: Topology, cores: Mapping[str, Tensor]) -> float:
    made = build_matrices(plan_stack(topology, topology.core_names, 1), cores, 1)
    return stack_error(weight[None], made)
