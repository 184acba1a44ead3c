"""Banks of dense matrices, which replace shared-core experts in models prepared for inference."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from typing_extensions import Self

from tensornet.nn.prepare import refuse_saving, refuse_training
from tensornet_moe.bank import ExpertBank
from tensornet_moe.grouped_linear import Groups, grouped_linear, rows_linear, takes_grouped_mm


class PreparedExperts(ExpertBank):
    """Bank with a dense matrix for each expert; see `tensornet.nn.prepare_for_inference`.

    Args:
        matrices: shape `(E, out, in)`, not copied; or `(1, out, in)` if all experts are equal.
        num_experts: number of experts, `E`.
    """

    def __init__(self, matrices: Tensor, num_experts: int) -> None:
        super().__init__(num_experts, (matrices.shape[1], matrices.shape[2]))
        self.matrices = nn.Parameter(matrices, requires_grad=False)
        self.register_state_dict_pre_hook(refuse_saving)
        self.eval()

    def expert_matrices(self, experts: Sequence[int] | Tensor | None = None) -> Tensor:
        """Return the matrices of the given experts; see `ExpertBank`."""
        matrices = self.matrices.expand(self.num_experts, -1, -1)
        return matrices if experts is None else matrices.index_select(0, self.check_experts(experts))

    def apply_rows(self, x: Tensor, groups: Groups) -> Tensor:
        """Multiply rows by the matrices of their experts, without copying a selection of matrices."""
        matrices = self.matrices.to(x.dtype)
        if len(matrices) < self.num_experts:
            return nn.functional.linear(x, matrices[0])
        if takes_grouped_mm(x, self.out_features, groups):
            return grouped_linear(x, matrices, groups)
        return rows_linear(x, matrices, groups)

    def shared_parameters(self) -> dict[str, nn.Parameter]:
        """Return no parameters, since nothing is shared."""
        return {}

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode; raise TargetError if `mode` is True."""
        refuse_training(mode)
        return super().train(mode)

    def spec(self) -> dict[str, Any]:
        """Raise TargetError, since a prepared model cannot be saved."""
        refuse_saving(self)
        return {}

    def extra_repr(self) -> str:
        """Describe the module for `print(model)`."""
        return f"{self.num_experts} x ({self.out_features}, {self.in_features})"
