"""Pools of experts that several layers use, and the references to a pool in these layers."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from tensornet._util import check_type
from tensornet.errors import ShapeError, TargetError
from tensornet.nn import build_module, register_module_type
from tensornet_moe.bank import Borrower
from tensornet_moe.ffn import ExpertFFN
from tensornet_moe.grouped_linear import Groups

Balance = Literal["pool", "layer"]
BALANCES = ("pool", "layer")


class ExpertPool(nn.Module):
    """Pool of whole experts that several layers use; each of these layers has its own router.

    The experts are an `ExpertFFN` of any banks: private matrices, a shared center, low-rank deltas, cores in
    number formats. Give the pool to the layers in place of experts, and assign it to the model that contains
    them, so that its parameters are counted, trained and saved once. With FSDP put it into the root unit.

    Args:
        experts: the networks. The pool owns them from now on.
        label: name by which layers find the pool when a model is loaded; it must be unique in the model.
        balance: what the balancing loss and the biases of routers aim at. `"pool"`: an even load summed over
            all layers, so that a single layer may prefer some experts. `"layer"`: an even load in each layer.

    Raises:
        TypeError: `experts` is not an ExpertFFN.
        ValueError: an unknown `balance`.

    Reference:
        Huang et al. 2026, "UniPool: A Globally Shared Expert Pool for Mixture-of-Experts" (arXiv 2605.06665):
        one pool for all layers, balanced as a whole. "Expert Tying" (arXiv 2606.16825): pools of two
        neighbouring layers, see `tie_experts`. Pools whose experts share cores are our extension.

    Example:
        >>> def bank(rows, columns):
        ...     return tm.SharedCoreExperts.from_dense(torch.randn(rows, columns), num_experts=6)
        >>> class Model(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.pool = tm.ExpertPool(tm.ExpertFFN({"up": bank(16, 8), "down": bank(8, 16)}))
        ...         routers = (tm.TopKRouter(8, 6, top_k=2) for _ in range(3))
        ...         self.layers = torch.nn.ModuleList(tm.SharedCoreMoE(x, self.pool) for x in routers)
        ...     def forward(self, x):
        ...         for layer in self.layers:
        ...             x = x + layer(x)
        ...         return x
        >>> model = Model()
        >>> model(torch.randn(5, 8)).shape
        torch.Size([5, 8])
        >>> [name for name in model.state_dict() if "core" not in name]
        ['layers.0.router.weight', 'layers.1.router.weight', 'layers.2.router.weight']
        >>> sum(name.endswith("up.core_1") for name in model.state_dict())
        1
    """

    def __init__(self, experts: ExpertFFN, *, label: str = "pool", balance: Balance = "pool") -> None:
        super().__init__()
        check_type("experts", experts, ExpertFFN, "that of a SharedCoreMoE is its attribute experts")
        if balance not in BALANCES:
            raise ValueError(f"Unknown balance={balance!r}; choose one of {', '.join(BALANCES)}.")
        self.experts, self.label, self.balance = experts, label, balance

    @property
    def num_experts(self) -> int:
        """Number of experts."""
        return self.experts.num_experts

    @property
    def in_features(self) -> int:
        """Number of input features of a token."""
        return self.experts.in_features

    @property
    def out_features(self) -> int:
        """Number of output features of a token."""
        return self.experts.out_features

    @property
    def device(self) -> torch.device:
        """Device of the experts."""
        return self.experts.bank(self.experts.names[0]).stored_tensors()[0].device

    def forward(self, x: Tensor, groups: Groups) -> Tensor:
        """Map rows `(rows, in_features)`, sorted by expert (see `groups`), to `(rows, out_features)`."""
        y: Tensor = self.experts(x, groups)
        return y

    def check_fits(self, borrower: Any) -> None:
        """Raise ShapeError unless this pool has the number and size of experts that a layer expects."""
        have, want = _sizes(self), _sizes(borrower)
        if have != want:
            raise ShapeError(
                f"The pool labelled {self.label!r} has (experts, in, out) = {have}, the layer was built for "
                f"{want}."
            )

    def spec(self) -> dict[str, Any]:
        """Return a JSON-ready description, see `tensornet.nn.register_module_type`."""
        options = {"label": self.label, "balance": self.balance}
        return {"type": "expert_pool", "experts": self.experts.spec(), **options}

    def extra_repr(self) -> str:
        """Describe the module for `print(model)`."""
        return f"label={self.label!r}, balance={self.balance!r}"


class PooledExperts(Borrower, nn.Module):
    """Experts of a layer that uses an `ExpertPool`, which owns their parameters.

    Args:
        owner: the pool; or its label, if the pool is set later by `lend_shared_cores`.
        num_experts, in_features, out_features: number and size of the experts; only needed if `owner` is a
            label.
    """

    owner_kind: ClassVar[type[nn.Module]] = ExpertPool

    def __init__(
        self, owner: ExpertPool | str, *, num_experts: int = 0, in_features: int = 0, out_features: int = 0
    ) -> None:
        super().__init__()
        if isinstance(owner, ExpertPool):
            num_experts, in_features, out_features = _sizes(owner)
        self.num_experts, self.in_features, self.out_features = num_experts, in_features, out_features
        self.owner_label = owner.label if isinstance(owner, ExpertPool) else owner
        if isinstance(owner, ExpertPool):
            self.borrow(owner)

    def forward(self, x: Tensor, groups: Groups) -> Tensor:
        """Apply the experts of the pool; see `ExpertFFN.forward`.

        Raises:
            RuntimeError: the pool was not set yet, or is on another device than the rows.
        """
        pool: ExpertPool = self.lender()
        # An offloaded pool is on the meta device until hooks load it.
        if pool.device not in (x.device, torch.device("meta")):
            raise RuntimeError(
                f"The pool labelled {pool.label!r} is on {pool.device}, a layer that uses it on {x.device}. "
                "Assign the pool to the model that contains the layers, and move the whole model."
            )
        y: Tensor = pool(x, groups)  # called as a module, so that hooks of the pool run
        return y

    def spec(self) -> dict[str, Any]:
        """Return a JSON-ready description, see `tensornet.nn.register_module_type`."""
        sizes = {name: getattr(self, name) for name in ("num_experts", "in_features", "out_features")}
        return {"type": "pooled_experts", "owner": self.owner_label, **sizes}

    def extra_repr(self) -> str:
        """Describe the module for `print(model)`."""
        return f"{self.num_experts} experts of the pool {self.owner_label!r}"


def find_pools(model: nn.Module) -> dict[str, ExpertPool]:
    """Find the pools of a model by module name, and check that each belongs to one module only.

    Raises:
        TargetError: a pool belongs to two modules, two pools have the same label, or a layer uses a pool that
            the model does not contain.
    """
    pools: dict[str, ExpertPool] = {}
    seen: set[tuple[int, str]] = set()
    for name, part in model.named_modules(remove_duplicate=False):
        if not isinstance(part, ExpertPool):
            continue
        parent, _, attribute = name.rpartition(".")
        # The module that owns a pool may itself have several names; it is still one owner.
        place = (id(model.get_submodule(parent)), attribute)
        if place in seen:
            continue
        seen.add(place)
        for other_name, other in pools.items():
            if other is part:
                raise TargetError(
                    f"The pool labelled {part.label!r} is owned twice, as {other_name!r} and as {name!r}, so "
                    "that files would contain it twice. Assign it to one module that contains all its layers."
                )
            if other.label == part.label:
                raise TargetError(
                    f"The pools {other_name!r} and {name!r} have the same label {part.label!r}, by which "
                    "layers find them; give each a label of its own."
                )
        pools[name] = part
    for name, part in model.named_modules():
        if isinstance(part, PooledExperts) and not any(part.owner is pool for pool in pools.values()):
            raise TargetError(
                f"{name!r} uses the pool labelled {part.owner_label!r}, which {type(model).__name__} does "
                "not contain, so that it would be neither trained nor saved. Assign it: model.pool = pool."
            )
    return pools


def _sizes(experts: Any) -> tuple[int, int, int]:
    return experts.num_experts, experts.in_features, experts.out_features


def _build_pool(
    spec: Mapping[str, Any], device: torch.device | str | None, dtype: torch.dtype | None
) -> ExpertPool:
    experts: Any = build_module(spec["experts"], device=device, dtype=dtype)
    return ExpertPool(experts, label=spec["label"], balance=spec["balance"])


def _build_pooled(
    spec: Mapping[str, Any], device: torch.device | str | None, dtype: torch.dtype | None
) -> PooledExperts:
    sizes = {name: spec[name] for name in ("num_experts", "in_features", "out_features")}
    return PooledExperts(spec["owner"], **sizes)


register_module_type("expert_pool", _build_pool)
register_module_type("pooled_experts", _build_pooled)
