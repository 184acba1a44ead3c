"""How a layer is applied: core by core, or by rebuilding its matrix; and which is cheaper when."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tensornet.network import PLANNED_TOKENS, OperatorPlan, contract_to_matrix, contract_with_input

Strategy = Literal["auto", "factorized", "reconstruct", "cached"]
STRATEGIES = ("auto", "factorized", "reconstruct", "cached")

#: Cost of moving one element by a permuting copy, in multiply-adds. Measured on CPUs: a strided copy
#: runs at about 1 element/ns, a matmul at about 30 multiply-adds/ns for each core.
COPY_COST = 30


@dataclass(frozen=True)
class CostModel:
    """Predicted costs in equivalent multiply-adds, linear in the number of tokens.

    Args:
        factorized: per token, core by core.
        rebuild: once, for the dense matrix.
        dense: per token, with the dense matrix.
    """

    factorized: float
    rebuild: float
    dense: float

    def choose(self, tokens: int) -> Strategy:
        """The cheaper of `"factorized"` and `"reconstruct"`."""
        factorized = self.factorized * tokens <= self.rebuild + self.dense * tokens
        return "factorized" if factorized else "reconstruct"


def cost_model(plan: OperatorPlan) -> CostModel:
    """Costs of a planned operator."""
    # The plan's totals are for PLANNED_TOKENS; parts that do not depend on tokens are small there.
    per_token = (plan.apply.multiply_adds + COPY_COST * plan.apply.moved) / PLANNED_TOKENS
    rebuild = plan.matrix.multiply_adds + COPY_COST * plan.matrix.moved
    return CostModel(per_token, rebuild, plan.topology.out_features * plan.topology.in_features)


def apply_network(
    plan: OperatorPlan, costs: CostModel, cores: tuple[Tensor, ...], x: Tensor, strategy: Strategy
) -> Tensor:
    """Apply the operator to `x: (..., in_features)` by `"factorized"`, `"reconstruct"` or the cheaper."""
    if strategy == "auto":
        strategy = costs.choose(x.numel() // plan.topology.in_features)
    if strategy == "factorized":
        return contract_with_input(plan, cores, x)
    return torch.nn.functional.linear(x, contract_to_matrix(plan, cores))
