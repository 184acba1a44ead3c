"""Abstract bank of expert matrices, and the owner of cores that several banks share."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tensornet._util import check_size
from tensornet.errors import FormatError, ShapeError, TopologyError
from tensornet.network import random_cores
from tensornet.nn import register_module_type
from tensornet.topology import Topology
from tensornet_moe.grouped_linear import (
    Groups,
    grouped_linear,
    looped_linear,
    rows_linear,
    takes_grouped_mm,
)
from tensornet_moe.stacked import resolve_shared


class Borrower:
    """Base class of modules that use parameters of another module, their owner.

    A shared parameter belongs to its owner alone, and borrowers refer to the owner without registering it. So
    state dicts, optimizers and FSDP units contain the parameter once. The description (`spec`) of a borrower
    contains the owner's label; after building from descriptions, `lend_shared_cores` sets the owners.
    """

    #: Class of the owner; it has a `label`, and `check_fits(borrower)`, which raises if the two do not fit.
    owner_kind: ClassVar[type[nn.Module]]
    #: Label of the owner; None if the module borrows nothing.
    owner_label: str | None = None
    # In a tuple, so that the owner is not registered as a submodule.
    _owner: tuple[Any, ...] = ()

    @property
    def owner(self) -> Any:
        """Owner of the borrowed parameters; None if there are none, or if the owner was not set yet."""
        return self._owner[0] if self._owner else None

    def borrow(self, owner: Any) -> None:
        """Set the owner. Until then, a module built from a description knows only the owner's label.

        Args:
            owner: a module of the class `owner_kind`.

        Raises:
            RuntimeError: the module borrows nothing.
            TopologyError, ShapeError: the owner has other cores or experts than this module needs.
        """
        if self.owner_label is None:
            raise RuntimeError("This bank owns its shared cores; make it with shared=owner to borrow them.")
        owner.check_fits(self)
        self._owner, self.owner_label = (owner,), owner.label

    def lender(self) -> Any:
        """Return the owner.

        Raises:
            RuntimeError: the owner was not set yet.
        """
        if not self._owner:
            raise RuntimeError(
                f"These experts borrow from the {self.owner_kind.__name__} labelled {self.owner_label!r}, "
                "which they were not given: call tensornet_moe.bank.lend_shared_cores(model) on the model "
                "that contains both, or borrow(owner)."
            )
        return self._owner[0]


class ExpertBank(nn.Module, ABC):
    """Abstract bank of `num_experts` expert matrices of shape `(out_features, in_features)`.

    Subclass it to define new kinds of experts for `ExpertFFN` and `SharedCoreMoE`. A subclass must satisfy
    these laws, which `tensornet_moe.testing.BankLaws` tests. Results are differentiable with respect to every
    parameter. The parameters of *every* expert stay in the graph even if only some experts are requested,
    since data-parallel training needs a gradient for each. `expert_matrices(experts)` equals
    `expert_matrices()[experts]`. Unknown experts, or an empty selection, raise IndexError (`check_experts`
    does this). `spec`, a registered builder and the state dict rebuild the bank.

    Args:
        num_experts: number of experts, at least 1.
        shape: `(out_features, in_features)` of each matrix.

    Raises:
        ValueError: `num_experts` is below 1.

    Example:
        >>> class DenseBank(tm.ExpertBank):
        ...     def __init__(self, num_experts, shape, *, device=None, dtype=None):
        ...         super().__init__(num_experts, shape)
        ...         weight = torch.randn(num_experts, *shape, device=device, dtype=dtype)
        ...         self.weight = torch.nn.Parameter(weight)
        ...     def expert_matrices(self, experts=None):
        ...         return self.weight if experts is None else self.weight[self.check_experts(experts)]
        ...     def shared_parameters(self):
        ...         return {}
        ...     def spec(self):
        ...         shape = [self.out_features, self.in_features]
        ...         return {"type": "dense_bank", "num_experts": self.num_experts, "shape": shape}
        >>> def build(spec, device, dtype):
        ...     return DenseBank(spec["num_experts"], spec["shape"], device=device, dtype=dtype)
        >>> tn.nn.register_module_type("dense_bank", build)
        >>> DenseBank(4, (16, 8)).expert_matrices([0, 2]).shape
        torch.Size([2, 16, 8])
    """

    def __init__(self, num_experts: int, shape: tuple[int, int]) -> None:
        super().__init__()
        check_size("num_experts", num_experts, error=ValueError)
        self.num_experts = num_experts
        self.out_features, self.in_features = shape

    @abstractmethod
    def expert_matrices(self, experts: Sequence[int] | Tensor | None = None) -> Tensor:
        """Return the matrices of the given experts, shape `(len(experts), out_features, in_features)`.

        Args:
            experts: indices of experts, which may repeat; all experts in order if absent.

        Raises:
            IndexError: an unknown expert, or an empty selection; see `check_experts`.
        """

    @abstractmethod
    def shared_parameters(self) -> dict[str, nn.Parameter]:
        """Return the cores that all experts share, by name: the parameters that a `GradientMask` masks."""

    @abstractmethod
    def spec(self) -> dict[str, Any]:
        """Return a JSON-ready description, see `tensornet.nn.register_module_type`."""

    def apply_rows(self, x: Tensor, groups: Groups) -> Tensor:
        """Compute `y_r = W_e(r) x_r` for rows sorted by expert, from the matrices of experts that have rows.

        Override it if the same result can be computed without a matrix for each expert.

        Args:
            x: the rows, shape `(rows, in_features)`, in the dtype of the computation.
            groups: how the rows are grouped.

        Returns:
            Shape `(rows, out_features)`.
        """
        active = groups.active
        selected = active is not None and len(active) < self.num_experts
        matrices = self.expert_matrices(active if selected else None).to(x.dtype)
        if takes_grouped_mm(x, self.out_features, groups):
            return grouped_linear(x, matrices, groups)
        return looped_linear(x, matrices, groups) if selected else rows_linear(x, matrices, groups)

    def stored_tensors(self) -> tuple[Tensor, ...]:
        """Return every parameter that the matrices are built from, borrowed ones included."""
        return (*self.parameters(), *self.shared_parameters().values())

    def active_params(self, top_k: float) -> float:
        """Count the stored values that `top_k` experts use on average; shared values count once."""
        shared = {id(p): p.numel() for p in self.shared_parameters().values()}
        private = sum(p.numel() for p in self.parameters() if id(p) not in shared)
        return sum(shared.values()) + top_k * private / self.num_experts

    def multiply_adds(self, rows: int) -> int:
        """Count the multiply-adds of `apply_rows` for a number of rows that are spread over all experts."""
        return rows * self.out_features * self.in_features

    def check_experts(self, experts: Sequence[int] | Tensor) -> Tensor:
        """Return expert indices as a tensor on the device of the bank.

        Raises:
            IndexError: an index outside `[0, num_experts)`, or no index at all.
        """
        index = torch.as_tensor(experts, dtype=torch.long)
        if index.ndim != 1 or len(index) == 0 or not bool(((index >= 0) & (index < self.num_experts)).all()):
            raise IndexError(
                f"experts must be a non-empty list of indices in [0, {self.num_experts}), got {experts}."
            )
        return index.to(self.stored_tensors()[0].device)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the matrices: that of the first parameter."""
        return self.stored_tensors()[0].dtype

    @property
    def num_params(self) -> int:
        """Number of parameters that this bank owns, without borrowed cores."""
        return sum(p.numel() for p in self.parameters())


class SharedCores(nn.Module):
    """Owner of cores that several banks share, for example one center for all layers.

    A shared parameter must belong to one module, so that state dicts, safetensors, optimizers and FSDP units
    contain it once. Put the owner into the model that contains the layers (with FSDP, into the root unit).

    Args:
        topology: topology of one expert; only its shared cores are stored here.
        shared: the cores to share, see `resolve_shared`.
        label: name of the owner in the descriptions of borrowers; it must be unique in a model.
        device, dtype: device and dtype of the cores.

    Raises:
        TopologyError: no core is selected, or an unknown one.

    Example:
        >>> topology = tn.topologies.mpo(out_dims=(2, 4, 2), in_dims=(2, 2, 2), max_bond=3)
        >>> owner = tm.SharedCores(topology, "center")
        >>> first, second = (tm.SharedCoreExperts(topology, 4, shared=owner) for _ in range(2))
        >>> first.shared_parameters()["1"] is second.shared_parameters()["1"]
        True
    """

    def __init__(
        self,
        topology: Topology,
        shared: str | Sequence[str] = "center",
        *,
        label: str = "shared",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.topology, self.label = topology, label
        self.names = resolve_shared(topology, shared)
        if not self.names:
            raise TopologyError(f"shared={shared!r} chooses no core: there is nothing to own.")
        cores = dict(
            zip(topology.core_names, random_cores(topology, device=device, dtype=dtype), strict=True)
        )
        for name in self.names:
            self.register_parameter(f"core_{name}", nn.Parameter(cores[name]))

    def core(self, name: str) -> nn.Parameter:
        """Return the parameter of one shared core."""
        return getattr(self, f"core_{name}")

    def check_fits(self, bank: Any) -> None:
        """Check that a `SharedCoreExperts` can borrow these cores.

        Raises:
            TopologyError: the bank shares other cores.
            ShapeError: a core has another shape in the topology of the bank.
        """
        if bank.shared != self.names:
            raise TopologyError(
                f"The owner {self.label!r} has the cores {list(self.names)}, these experts share "
                f"{list(bank.shared)}."
            )
        for name in self.names:
            have, want = self.topology.core_shapes[name], bank.topology.core_shapes[name]
            if have != want:
                raise ShapeError(
                    f"The borrowed core {name!r} has shape {have}, the topology says {want}: layers that "
                    "share a core need the same legs and bonds around it."
                )

    def spec(self) -> dict[str, Any]:
        """Return a JSON-ready description, see `tensornet.nn.register_module_type`."""
        return {
            "type": "shared_cores",
            "topology": self.topology.to_dict(),
            "shared": list(self.names),
            "label": self.label,
        }

    def extra_repr(self) -> str:
        """Describe the module for `print(model)`."""
        return f"label={self.label!r}, cores={list(self.names)}, topology={self.topology.family}"


def _build_shared_cores(
    spec: Mapping[str, Any], device: torch.device | str | None, dtype: torch.dtype | None
) -> SharedCores:
    topology = Topology.from_dict(spec["topology"])
    return SharedCores(topology, spec["shared"], label=spec["label"], device=device, dtype=dtype)


register_module_type("shared_cores", _build_shared_cores)


def lend_shared_cores(model: nn.Module) -> int:
    """For each borrower that was built from a description, find the owner by label and connect the two.

    Args:
        model: a model with owners (`SharedCores`, `ExpertPool`) and modules that borrow from them.

    Returns:
        Number of modules that were connected.

    Raises:
        FormatError: a borrower's label belongs to no owner in the model, or to several.
        TopologyError, ShapeError: an owner has other cores or experts than its borrower expects.
    """
    borrowers = [part for part in model.modules() if isinstance(part, Borrower)]
    waiting = [part for part in borrowers if part.owner_label is not None and part.owner is None]
    for part in waiting:
        owners: list[Any] = [module for module in model.modules() if isinstance(module, part.owner_kind)]
        found = [owner for owner in owners if owner.label == part.owner_label]
        if len(found) != 1:
            raise FormatError(
                f"Experts borrow from the {part.owner_kind.__name__} labelled {part.owner_label!r}, of which "
                f"{type(model).__name__} has {len(found)}; its labels are "
                f"{sorted({owner.label for owner in owners}) or 'none'}. Put the owner into the model, and "
                "give every owner a label of its own."
            )
        part.borrow(found[0])
    return len(waiting)


# --- arguments of several modules ---------------------------------------------------------------------


def check_not_negative(**values: float) -> None:
    """Raise ValueError unless each value is a finite number of at least 0."""
    for name, value in values.items():
        if not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise ValueError(f"{name} must be at least 0 and finite, got {value!r}.")


def check_weights(weights: object, *shape: str) -> None:
    """Raise ShapeError unless `weights` is a float tensor with one dimension for each name in `shape`."""
    expected = f"Expected a floating tensor of shape ({', '.join(shape)})"
    if not isinstance(weights, Tensor):
        raise ShapeError(f"{expected}, got a {type(weights).__name__}; stack matrices of one shape.")
    floating = weights.is_floating_point() or weights.is_complex()
    if weights.ndim != len(shape) or not floating or weights.numel() == 0:
        raise ShapeError(f"{expected}, got {tuple(weights.shape)}, {weights.dtype}.")
