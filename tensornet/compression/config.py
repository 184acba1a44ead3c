"""What to compress and how far: the options of `tensornet.compress`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from tensornet.budget import Budget
from tensornet.errors import BudgetError
from tensornet.topologies import topology_family, topology_names

Objective = Literal["auto", "weight", "curvature"]
OBJECTIVES = ("auto", "weight", "curvature")
AUTO = "auto"


@dataclass(frozen=True)
class CompressionConfig:
    """Options of `compress`. The caps may be combined; the tightest wins for each layer.

    Args:
        target_modules: patterns of module names to compress. A pattern matches a whole name, a suffix after
            a dot (`"c_fc"`), a glob (`"*.mlp.*"`), or, with the prefix `"re:"`, a regular expression for the
            whole name. None takes every linear layer except output heads; `"all"` takes embeddings and
            heads too.
        exclude_modules: patterns of module names to leave dense.
        topology: name of a registered family, or `"auto"` to let the planner choose for each layer.
        sites: number of cores for families that can choose it.
        max_bond: cap on every bond.
        rel_error: largest relative Frobenius error of each layer.
        param_ratio: share of the parameters of the targeted layers to keep.
        objective: what decides where parameters are spent: `"weight"` (Frobenius error of each layer),
            `"curvature"` (predicted loss, needs calibration data), or `"auto"` (curvature if there is data).

    Raises:
        BudgetError: a cap is out of range.
        TopologyError: unknown topology.
        ValueError: unknown objective.
    """

    target_modules: str | Sequence[str] | None = None
    exclude_modules: str | Sequence[str] | None = None
    topology: str = AUTO
    sites: int | None = None
    max_bond: int | None = None
    rel_error: float | None = None
    param_ratio: float | None = None
    objective: Objective = "auto"

    def __post_init__(self) -> None:
        if self.budget.unlimited and self.topology == AUTO:
            object.__setattr__(self, "topology", "mpo")  # without a budget every family is exact
        if self.topology != AUTO:
            topology_family(self.topology)
        if self.objective not in OBJECTIVES:
            raise ValueError(f"Unknown objective {self.objective!r}; choose one of {', '.join(OBJECTIVES)}.")
        if self.sites is not None and self.sites < 1:
            raise BudgetError(f"sites must be at least 1, got {self.sites}.")

    @property
    def budget(self) -> Budget:
        """The caps as a budget for one layer."""
        return Budget(self.max_bond, self.rel_error, self.param_ratio)

    @property
    def families(self) -> tuple[str, ...]:
        """Names of the families the planner may use."""
        return (self.topology,) if self.topology != AUTO else ("low_rank", "mpo")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready options; `from_dict` is the inverse."""
        data = {field.name: getattr(self, field.name) for field in fields(self)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in data.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "CompressionConfig":
        """Rebuild options, refusing unknown ones.

        Raises:
            ValueError: naming the unknown options and the known ones.
        """
        known = {field.name for field in fields(cls)}
        if unknown := sorted(data.keys() - known):
            raise ValueError(
                f"Unknown compression options {', '.join(unknown)}; known are {', '.join(sorted(known))}."
            )
        return cls(**data)


def family_options(name: str, config: CompressionConfig) -> dict[str, Any]:
    """Options of the configuration that this family understands: only low rank has no sites."""
    assert name in topology_names()
    return {} if name == "low_rank" or config.sites is None else {"sites": config.sites}
