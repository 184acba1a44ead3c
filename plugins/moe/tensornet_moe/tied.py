"""Experts and cores shared by several layers: owners, and banks that borrow from them."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tensornet.errors import FormatError, ShapeError
from tensornet.topologies import TopologyFamily, topology_family
from tensornet.topology import Topology
from tensornet_moe.bank import ExpertBank, SharedCores
from tensornet_moe.checks import check_noise, check_weights, check_whole
from tensornet_moe.experts import SharedCoreExperts, with_noise
from tensornet_moe.ffn import ExpertFFN
from tensornet_moe.grouped_linear import Groups
from tensornet_moe.joint_fit import fit_shared, stack_error
from tensornet_moe.stacked import build_matrices, plan_stack


class SharedExperts(nn.Module):
    """Owner of banks that several layers share; each layer has a `TiedExperts`.

    A shared parameter must belong to one module: put the owner into the model that contains the layers (with
    FSDP, into the root unit).

    Args:
        banks: banks by name, for example `{"up": ..., "down": ...}`.
        label: name of the owner in the descriptions of borrowers; it must be unique in a model.

    Raises:
        TypeError: a value is not an ExpertBank.
        ValueError: `banks` is empty.

    Example:
        >>> bank = tm.SharedCoreExperts.from_dense(torch.randn(16, 8), num_experts=4)
        >>> owner = tm.tied.SharedExperts({"up": bank})
        >>> first, second = (tm.tied.TiedExperts(owner, "up") for _ in range(2))
        >>> torch.equal(first.expert_matrices(), second.expert_matrices()), first.num_params
        (True, 0)
    """

    def __init__(self, banks: Mapping[str, ExpertBank], *, label: str = "experts") -> None:
        super().__init__()
        if not banks:
            raise ValueError("SharedExperts got no bank: there is nothing to own.")
        for name, bank in banks.items():
            if not isinstance(bank, ExpertBank):
                raise TypeError(f"The bank {name!r} must be an ExpertBank, got a {type(bank).__name__}.")
        self.banks, self.label = nn.ModuleDict(banks), label

    def bank(self, name: str) -> ExpertBank:
        """Return the bank of a given name.

        Raises:
            ShapeError: no bank has this name.
        """
        if name not in self.banks:
            raise ShapeError(
                f"The SharedExperts labelled {self.label!r} own no bank {name!r}, they own "
                f"{', '.join(self.banks)}."
            )
        found = self.banks[name]
        assert isinstance(found, ExpertBank)
        return found

    def spec(self) -> dict[str, Any]:
        """Return a JSON-ready description, see `tensornet.nn.register_module_type`."""
        banks = [self.bank(name).spec() for name in self.banks]
        return {"type": "shared_experts", "names": list(self.banks), "banks": banks, "label": self.label}

    def extra_repr(self) -> str:
        """Describe the module for `print(model)`."""
        return f"label={self.label!r}"


class TiedExperts(ExpertBank):
    """Bank that borrows all its matrices from a `SharedExperts`, so that experts are tied over layers.

    Args:
        owner: owner of the matrices; or its label, if the owner is set later by `lend_shared_cores`.
        name: name of the bank in the owner.
        num_experts, shape: number and shape of the experts; needed only with a label.

    Raises:
        ShapeError: the owner has no such bank.

    Example:
        >>> bank = tm.SharedCoreExperts.from_dense(torch.randn(16, 8), num_experts=4)
        >>> tied = tm.tied.TiedExperts(tm.tied.SharedExperts({"up": bank}), "up")
        >>> torch.equal(tied.expert_matrices(), bank.expert_matrices())
        True

    Reference:
        "Expert Tying" (arXiv 2606.16825): neighbouring layers use the same experts with routers of their own.
    """

    def __init__(
        self,
        owner: SharedExperts | str,
        name: str,
        *,
        num_experts: int | None = None,
        shape: tuple[int, int] | None = None,
    ) -> None:
        if isinstance(owner, SharedExperts):
            bank = owner.bank(name)
            num_experts, shape = bank.num_experts, (bank.out_features, bank.in_features)
        elif num_experts is None or shape is None:
            raise ShapeError("With the label of an owner give num_experts= and shape=(out, in) as well.")
        super().__init__(num_experts, shape)
        self.name = name
        self.owner_label = owner.label if isinstance(owner, SharedExperts) else owner
        # In a tuple, so that the owner is not registered as a submodule.
        self._owner: tuple[SharedExperts, ...] = (owner,) if isinstance(owner, SharedExperts) else ()

    @property
    def owner(self) -> SharedExperts | None:
        """Owner of the matrices, None if it was not set yet."""
        return self._owner[0] if self._owner else None

    def borrow(self, owner: SharedExperts) -> None:
        """Set the owner, for banks that were built from a description.

        Raises:
            ShapeError: the owner has no bank of this name, or its bank has other experts.
        """
        bank = owner.bank(self.name)
        have = (bank.num_experts, bank.out_features, bank.in_features)
        want = (self.num_experts, self.out_features, self.in_features)
        if have != want:
            raise ShapeError(
                f"The bank {self.name!r} of {owner.label!r} has (experts, out, in) = {have}, the experts "
                f"tied to it need {want}."
            )
        self._owner, self.owner_label = (owner,), owner.label

    def expert_matrices(self, experts: Sequence[int] | Tensor | None = None) -> Tensor:
        """Return the matrices of the owner's bank; see `ExpertBank`."""
        return self._bank.expert_matrices(experts)

    def apply_rows(self, x: Tensor, groups: Groups) -> Tensor:
        """Apply the owner's bank; see `ExpertBank`."""
        return self._bank.apply_rows(x, groups)

    def keeps_matrices(self) -> bool:
        """Return True if the owner's bank caches its matrices."""
        return self._bank.keeps_matrices()

    @property
    def dtype(self) -> torch.dtype:
        """Dtype in which the owner's bank computes."""
        return self._bank.dtype

    def stored_tensors(self) -> tuple[Tensor, ...]:
        """Return the parameters of the owner's bank; see `ExpertBank`."""
        return self._bank.stored_tensors()

    def shared_parameters(self) -> dict[str, nn.Parameter]:
        """Return the shared cores of the owner's bank; see `ExpertBank`."""
        return self._bank.shared_parameters()

    def spec(self) -> dict[str, Any]:
        """Return a JSON-ready description, see `tensornet.nn.register_module_type`."""
        return {
            "type": "tied_experts",
            "owner": self.owner_label,
            "name": self.name,
            "num_experts": self.num_experts,
            "shape": [self.out_features, self.in_features],
        }

    def extra_repr(self) -> str:
        """Describe the module for `print(model)`."""
        return f"{self.num_experts} x ({self.out_features}, {self.in_features}), tied to {self.owner_label!r}"

    @property
    def _bank(self) -> ExpertBank:
        if not self._owner:
            raise RuntimeError(
                f"These experts borrow the bank {self.name!r} from the SharedExperts labelled "
                f"{self.owner_label!r}, which they were not given: call "
                "tensornet_moe.tied.lend_shared_cores(model) on the model that contains both, or "
                "bank.borrow(owner)."
            )
        return self._owner[0].bank(self.name)


def tie_experts(networks: Sequence[ExpertFFN], *, label: str = "experts") -> SharedExperts:
    """Tie the expert matrices of several networks to those of the first; biases and routers are not tied.

    Args:
        networks: networks of neighbouring layers, with the same number, names and shapes of experts.
        label: label of the owner.

    Returns:
        The owner of the matrices. Put it into the model that contains the layers.

    Raises:
        ValueError: fewer than two networks, or the same one twice.
        ShapeError: the networks have experts of different number, names or shapes.

    Example:
        >>> def network():
        ...     up = tm.SharedCoreExperts.from_dense(torch.randn(16, 8), num_experts=4)
        ...     down = tm.SharedCoreExperts.from_dense(torch.randn(8, 16), num_experts=4)
        ...     return tm.ExpertFFN({"up": up, "down": down}, bias=True)
        >>> first, second = network(), network()
        >>> owner = tm.tie_experts([first, second])
        >>> torch.equal(first.bank("up").expert_matrices(), second.bank("up").expert_matrices())
        True
    """
    if len({id(network) for network in networks}) != len(networks) or len(networks) < 2:
        raise ValueError(f"Expected at least two different networks to tie, got {len(networks)}.")
    for position, network in enumerate(networks):
        if not isinstance(network, ExpertFFN):
            raise TypeError(
                f"Network {position} to tie must be an ExpertFFN, got a {type(network).__name__}; that of a "
                "SharedCoreMoE is its attribute experts."
            )
    shapes = [_shapes(network) for network in networks]
    for position, found in enumerate(shapes):
        if found != shapes[0]:
            raise ShapeError(
                f"The experts of networks 0 and {position} cannot be tied: (experts, out, in) are "
                f"{shapes[0]} and {found}. Build them with equal banks, or tie networks of equal shapes."
            )
    owner = SharedExperts({name: networks[0].bank(name) for name in networks[0].names}, label=label)
    for network in networks:
        for name in network.names:
            setattr(network, name, TiedExperts(owner, name))
    return owner


def _shapes(network: ExpertFFN) -> dict[str, tuple[int, int, int]]:
    banks = {name: network.bank(name) for name in network.names}
    return {name: (b.num_experts, b.out_features, b.in_features) for name, b in banks.items()}


# --- cores of several layers ----------------------------------------------------------------------


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

    The matrices of the layers are fitted jointly (see `fit_shared`); all experts of a layer start as the fit
    of its matrix. Shared cores fit unrelated layers badly (see `.error` of each bank), so the model must be
    trained before use.

    Args:
        weights: the dense matrix of each layer, shape `(layers, out, in)`.
        num_experts: experts of each layer.
        label: label of the owner.
        topology: an explicit topology, or a family's name.
        shared: the cores to share.
        noise, seed: as in `SharedCoreExperts.from_dense`; layer k uses `seed + k`.
        max_bond: cap on the bonds, if `topology` is a name.
        max_sweeps: limit of alternating least squares.
        options: passed to the family, for example `out_dims=`, `in_dims=`, `sites=`.

    Returns:
        The owner, and a bank for each layer that borrows from it. Put the owner into the model that contains
        the layers. `.error` of a bank is the relative Frobenius error of that layer's matrix before noise.

    Raises:
        ShapeError: `weights` is not a stack of matrices of the topology's shape.
        NonFiniteError: NaN or infinity in `weights`.
        TopologyError: `shared` selects no core, or an unknown one.
        ValueError: `noise` is below 0 or `num_experts` below 1.

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
        bank = SharedCoreExperts._from_cores((topology,) * num_experts, owner, cores, error, weights.dtype)
        banks.append(bank)
    return owner, banks


def lend_shared_cores(model: nn.Module) -> int:
    """Connect banks that were built from descriptions with their owners, which are found by label.

    Args:
        model: a model with banks and owners.

    Returns:
        Number of banks that were connected.

    Raises:
        FormatError: the model has no owner with some label, or several.
        TopologyError, ShapeError: an owner has other cores or experts than its borrower expects.

    Example:
        >>> owner, banks = tm.share_across_layers(torch.randn(2, 8, 8), num_experts=3, max_bond=4)
        >>> specs = [part.spec() for part in (owner, *banks)]
        >>> model = torch.nn.ModuleList(tn.nn.build_module(spec, device=None, dtype=None) for spec in specs)
        >>> tm.tied.lend_shared_cores(model)
        2
    """
    waiting = [
        module
        for module in model.modules()
        if isinstance(module, SharedCoreExperts | TiedExperts) and module.owner_label and not module.owner
    ]
    for bank in waiting:
        assert bank.owner_label is not None
        if isinstance(bank, TiedExperts):
            bank.borrow(_owner(model, SharedExperts, bank.owner_label))
        else:
            bank.borrow(_owner(model, SharedCores, bank.owner_label))
    return len(waiting)


_Owner = TypeVar("_Owner", SharedCores, SharedExperts)


def _owner(model: nn.Module, kind: type[_Owner], label: str) -> _Owner:
    """Return the only owner of a class with this label."""
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
