"""Experts that add private low-rank corrections to the matrices of another bank."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tensornet._util import check_size, check_type
from tensornet.errors import ShapeError
from tensornet.linalg.svd import check_finite, safe_scale, working_dtype
from tensornet.linalg.weighted_svd import Weighting
from tensornet.nn import build_module, register_module_type
from tensornet.topologies import TopologyFamily, dense
from tensornet.topology import Topology
from tensornet_moe.bank import ExpertBank, check_weights
from tensornet_moe.experts import SharedCoreExperts
from tensornet_moe.grouped_linear import Groups, rows_linear
from tensornet_moe.joint_fit import stack_error
from tensornet_moe.shared_low_rank import fit_low_rank


class LowRankDeltaExperts(ExpertBank):
    """Experts `W_e = base_e + left_e right_e`, with private low-rank deltas added to a base bank.

    If all cores of the base are shared, this is D2-MoE, `W_e = W_0 + left_e right_e`. The base may also be a
    chain of cores. New deltas are zero (because `left` is), as in LoRA, so the experts initially equal those
    of the base.

    Args:
        base: any bank; its cores are trained together with the deltas.
        rank: rank of the deltas, at most the shorter side of the matrices.
        device, dtype: device and dtype of the deltas.

    Raises:
        TypeError: `base` is not an ExpertBank.
        ShapeError: `rank` exceeds the shorter side.
        ValueError: `rank` is not an integer of at least 1.

    Reference:
        Gu et al. 2025, "Delta Decompression for MoE-based LLMs Compression", section 3; the tensor-network
        base is our extension.

    Example:
        >>> weight = torch.randn(16, 8)
        >>> bank = tm.LowRankDeltaExperts.from_dense(weight, num_experts=4, rank=2)
        >>> bank.num_params == 16 * 8 + 4 * 2 * (16 + 8)
        True
        >>> torch.equal(bank.expert_matrices([3])[0], weight)
        True
    """

    def __init__(
        self,
        base: ExpertBank,
        rank: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_type("base", base, ExpertBank, "for example a SharedCoreExperts")
        check_size("rank", rank, error=ValueError)
        rows, columns = base.out_features, base.in_features
        if rank > min(rows, columns):
            raise ShapeError(f"rank={rank} exceeds the shorter side of {rows} x {columns} matrices.")
        super().__init__(base.num_experts, (rows, columns))
        self.base, self.rank = base, rank
        left = torch.zeros(self.num_experts, rows, rank, device=device, dtype=dtype)
        right = torch.randn(self.num_experts, rank, columns, device=device, dtype=dtype) / columns**0.5
        self.left, self.right = nn.Parameter(left), nn.Parameter(right)
        #: Relative Frobenius error with respect to the original matrices; None for a new bank.
        self.error: float | None = None

    @classmethod
    def from_dense(
        cls,
        weight: Tensor,
        *,
        num_experts: int,
        rank: int,
        topology: Topology | str | TopologyFamily = "dense",
        share: str | Sequence[str] = "base",
        seed: int = 0,
        **options: Any,
    ) -> "LowRankDeltaExperts":
        """Upcycle one dense matrix: the base is a decomposition of this matrix, and the deltas start at zero.

        Args:
            weight: shape `(out, in)`.
            num_experts: number of experts.
            rank: rank of the deltas.
            topology: topology of the base; `"dense"` keeps the matrix itself.
            share: what the experts share of the base: all of it, or less (see `tensornet_moe.sharing`).
            seed: seed of the random right factors, which are the same on every device.
            options: further options of `SharedCoreExperts.from_dense`, for example `out_dims=`, `max_bond=`.

        Raises:
            TopologyError, BudgetError, NonFiniteError: from the decomposition of the base.
        """
        base = SharedCoreExperts.from_dense(
            weight, num_experts=num_experts, topology=topology, share=share, seed=seed, **options
        )
        bank = cls(base, rank, device=weight.device, dtype=weight.dtype)
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(bank.right.shape, generator=generator, device="cpu") / bank.in_features**0.5
        with torch.no_grad():
            bank.right.copy_(drawn)
        bank.error = base.error
        return bank

    @classmethod
    @torch.no_grad()
    def from_experts(cls, weights: Tensor, *, rank: int) -> "LowRankDeltaExperts":
        """Fit given expert matrices by one dense base and a low-rank delta for each expert.

        Several bases are tried (`tensornet_moe.shared_low_rank`). The first is the mean of the matrices. For
        each later one, the deltas of the previous base are subtracted from the matrices before the mean is
        taken. The base that fits best is kept. The deltas are truncated SVDs of the differences from it.

        Args:
            weights: shape `(num_experts, out, in)`.
            rank: rank of the deltas.

        Raises:
            ShapeError: `weights` is not a stack of matrices, or `rank` exceeds their shorter side.
            NonFiniteError: NaN or infinity in `weights`.
        """
        check_weights(weights, "num_experts", "out", "in")
        check_finite(weights, "The stack of expert matrices")
        count, rows, columns = weights.shape
        where: dict[str, Any] = {"device": weights.device, "dtype": weights.dtype}
        topology = dense(out_features=rows, in_features=columns)
        base = SharedCoreExperts(topology, count, share="base", **where)
        bank = cls(base, rank, **where)
        scale = safe_scale(weights)  # so that squares neither overflow nor underflow
        target = weights.detach().to(working_dtype(weights.dtype)) / scale
        fits = fit_low_rank("base", list(target), [Weighting()] * count, rank)
        cores = {name: torch.stack([fit[name] for fit in fits]) for name in ("base", "0", "1")}  # type: ignore[misc]
        base.shared_parameters()["matrix"].copy_(cores["base"][0] * scale)
        bank.left.copy_(cores["0"] * scale**0.5)
        bank.right.copy_(cores["1"] * scale**0.5)
        bank.error = stack_error(target, cores["base"] + cores["0"] @ cores["1"])
        return bank

    def expert_matrices(self, experts: Sequence[int] | Tensor | None = None) -> Tensor:
        """Build the matrices of the given experts; see `ExpertBank`."""
        left: Tensor = self.left
        right: Tensor = self.right
        if experts is not None:
            experts = self.check_experts(experts)
            left, right = left.index_select(0, experts), right.index_select(0, experts)
        return torch.baddbmm(self.base.expert_matrices(experts).to(left.dtype), left, right)

    def apply_rows(self, x: Tensor, groups: Groups) -> Tensor:
        """Compute `y_r = base_e x_r + left_e (right_e x_r)`, or build the matrices if that is cheaper.

        Building is rarely cheaper if all cores of the base are shared: the base is then a single matrix.
        """
        built = self.num_experts if groups.active is None else len(groups.active)
        rows, columns = self.out_features, self.in_features
        if len(x) * (rows + columns) >= built * rows * columns:
            return super().apply_rows(x, groups)
        y = self.base.apply_rows(x, groups)
        inner = rows_linear(x, self.right.to(x.dtype), groups)
        return y + rows_linear(inner, self.left.to(x.dtype), groups)

    def active_params(self, top_k: float) -> float:
        """Count the values of the base and of the deltas that `top_k` experts use; see `ExpertBank`."""
        return self.base.active_params(top_k) + top_k * self.rank * (self.out_features + self.in_features)

    def multiply_adds(self, rows: int) -> int:
        """Count the multiply-adds of the computation that `apply_rows` chooses."""
        each, sides = self.out_features * self.in_features, self.out_features + self.in_features
        if rows * sides >= self.num_experts * each:
            return self.base.multiply_adds(rows) + self.num_experts * self.rank * each
        return self.base.multiply_adds(rows) + rows * self.rank * sides

    def shared_parameters(self) -> dict[str, nn.Parameter]:
        """Return the shared cores of the base, keyed by name."""
        return self.base.shared_parameters()

    def stored_tensors(self) -> tuple[Tensor, ...]:
        """Return the deltas and every tensor that the base stores."""
        # `parameters()` also returns the originals of parametrized cores.
        return (self.left, self.right, *self.base.parameters(), *self.base.stored_tensors())

    def private_tensors(self) -> tuple[Tensor, ...]:
        """Return the deltas and the private tensors of the base."""
        return (self.left, self.right, *self.base.private_tensors())

    def spec(self) -> dict[str, Any]:
        """Return a JSON-ready description; see `tensornet.nn.register_module_type`."""
        return {"type": "low_rank_delta_experts", "base": self.base.spec(), "rank": self.rank}

    def extra_repr(self) -> str:
        """Describe the module for `print(model)`."""
        return f"{self.num_experts} x ({self.out_features}, {self.in_features}), rank={self.rank}"


def _build(
    spec: Mapping[str, Any], device: torch.device | str | None, dtype: torch.dtype | None
) -> LowRankDeltaExperts:
    base: Any = build_module(spec["base"], device=device, dtype=dtype)
    return LowRankDeltaExperts(base, spec["rank"], device=device, dtype=dtype)


register_module_type("low_rank_delta_experts", _build)
