"""Whole experts shared by several layers: their owner, and the banks that borrow from it."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tensornet._util import check_type
from tensornet.errors import ShapeError
from tensornet.nn import build_module, register_module_type
from tensornet_moe.bank import ExpertBank
from tensornet_moe.ffn import ExpertFFN
from tensornet_moe.grouped_linear import Groups


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
            check_type(f"The bank {name!r}", bank, ExpertBank, "for example a SharedCoreExperts")
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

    def check_fits(self, bank: Any) -> None:
        """Raise unless a `TiedExperts` can borrow its matrices.

        Raises:
            ShapeError: no bank has its name, or that bank has other experts.
        """
        have, want = _shape_of(self.bank(bank.name)), _shape_of(bank)
        if have != want:
            raise ShapeError(
                f"The bank {bank.name!r} of {self.label!r} has (experts, out, in) = {have}, the experts tied "
                f"to it need {want}."
            )

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

    owner_kind: ClassVar[type[nn.Module] | None] = SharedExperts

    def __init__(
        self,
        owner: SharedExperts | str,
        name: str,
        *,
        num_experts: int | None = None,
        shape: tuple[int, int] | None = None,
    ) -> None:
        if isinstance(owner, SharedExperts):
            num_experts, rows, columns = _shape_of(owner.bank(name))
            shape = (rows, columns)
        elif num_experts is None or shape is None:
            raise ShapeError("With the label of an owner give num_experts= and shape=(out, in) as well.")
        super().__init__(num_experts, shape)
        self.name = name
        self.owner_label = owner if isinstance(owner, str) else owner.label
        if isinstance(owner, SharedExperts):
            self.borrow(owner)

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
        bank: ExpertBank = self.lender().bank(self.name)
        return bank


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
        advice = "that of a SharedCoreMoE is its attribute experts"
        check_type(f"Network {position} to tie", network, ExpertFFN, advice)
    shapes = [{name: _shape_of(network.bank(name)) for name in network.names} for network in networks]
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


def _shape_of(bank: ExpertBank) -> tuple[int, int, int]:
    return bank.num_experts, bank.out_features, bank.in_features


def _build_shared_experts(
    spec: Mapping[str, Any], device: torch.device | str | None, dtype: torch.dtype | None
) -> SharedExperts:
    banks: dict[str, Any] = {
        name: build_module(bank, device=device, dtype=dtype)
        for name, bank in zip(spec["names"], spec["banks"], strict=True)
    }
    return SharedExperts(banks, label=spec["label"])


def _build_tied_experts(
    spec: Mapping[str, Any], device: torch.device | str | None, dtype: torch.dtype | None
) -> TiedExperts:
    rows, columns = spec["shape"]
    return TiedExperts(spec["owner"], spec["name"], num_experts=spec["num_experts"], shape=(rows, columns))


register_module_type("shared_experts", _build_shared_experts)
register_module_type("tied_experts", _build_tied_experts)
