"""Abstract base class for banks of expert matrices, and argument checks that several modules use."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tensornet._util import check_size
from tensornet.errors import ShapeError
from tensornet_moe.grouped_linear import (
    Groups,
    grouped_linear,
    looped_linear,
    rows_linear,
    takes_grouped_mm,
)


class ExpertBank(nn.Module, ABC):
    """Abstract base class for a bank of `num_experts` matrices, each `(out_features, in_features)`.

    Subclass it to define new kinds of experts for `ExpertFFN` and `SharedCoreMoE`. A subclass must satisfy
    the following laws, which `tensornet_moe.testing.BankLaws` tests. Results are differentiable with respect
    to every parameter. The parameters of *every* expert stay in the graph even if only some experts are
    requested, since data-parallel training needs a gradient for each parameter. `expert_matrices(experts)`
    equals `expert_matrices()[experts]`. Unknown experts, or an empty selection, raise IndexError
    (`check_experts` does this). A registered builder can rebuild the bank from its `spec` and state dict.

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
            experts: indices of experts, possibly repeated; all experts in order if absent.

        Raises:
            IndexError: an unknown expert, or an empty selection; see `check_experts`.
        """

    @abstractmethod
    def shared_parameters(self) -> dict[str, nn.Parameter]:
        """Return the cores that all experts share, keyed by name; a `GradientMask` masks these parameters."""

    @abstractmethod
    def spec(self) -> dict[str, Any]:
        """Return a JSON-ready description; see `tensornet.nn.register_module_type`."""

    def apply_rows(self, x: Tensor, groups: Groups) -> Tensor:
        """Multiply rows, sorted by expert, by the matrices of their experts: `y_r = W_e(r) x_r`.

        In eager mode, only the matrices of experts to which at least one row is routed are built. Override
        this method if the result can be computed without building a matrix for each expert.

        Args:
            x: the rows, shape `(rows, in_features)`, in the dtype of the computation.
            groups: the number of rows of each expert, and the expert of each row.

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
        """Return every tensor that the matrices are built from."""
        return tuple(self.parameters())

    def private_tensors(self) -> tuple[Tensor, ...]:
        """Return the stored tensors that belong to single experts; their first dimension is the expert."""
        shared = {id(x) for x in self.shared_parameters().values()}
        return tuple(x for x in self.stored_tensors() if id(x) not in shared)

    def active_params(self, top_k: float) -> float:
        """Count the stored values that `top_k` experts use on average; shared values count once."""
        shared = {id(p): p.numel() for p in self.shared_parameters().values()}
        private = sum(p.numel() for p in self.parameters() if id(p) not in shared)
        return sum(shared.values()) + top_k * private / self.num_experts

    def multiply_adds(self, rows: int) -> int:
        """Count the multiply-adds of `apply_rows` for the given number of rows.

        The count assumes that every expert gets at least one row.
        """
        return rows * self.out_features * self.in_features

    def check_experts(self, experts: Sequence[int] | Tensor) -> Tensor:
        """Check expert indices, and return them as a tensor on the device of the bank.

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
        """Dtype of the matrices: the dtype of the first stored tensor."""
        return self.stored_tensors()[0].dtype

    @property
    def num_params(self) -> int:
        """Number of parameters of this bank."""
        return sum(p.numel() for p in self.parameters())


# --- argument checks that several modules use -----------------------------------------------------------


def check_not_negative(**values: float) -> None:
    """Raise ValueError unless each value is a finite number of at least 0."""
    for name, value in values.items():
        if not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise ValueError(f"{name} must be at least 0 and finite, got {value!r}.")


def check_weights(weights: object, *shape: str) -> None:
    """Raise ShapeError unless `weights` is a non-empty float or complex tensor of `len(shape)` dimensions."""
    expected = f"Expected a floating tensor of shape ({', '.join(shape)})"
    if not isinstance(weights, Tensor):
        raise ShapeError(f"{expected}, got a {type(weights).__name__}; stack matrices of one shape.")
    floating = weights.is_floating_point() or weights.is_complex()
    if weights.ndim != len(shape) or not floating or weights.numel() == 0:
        raise ShapeError(f"{expected}, got {tuple(weights.shape)}, {weights.dtype}.")
