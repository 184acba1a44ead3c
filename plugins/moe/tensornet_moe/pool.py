"""Pools of experts that several layers use, and the modules by which these layers refer to a pool."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tensornet._util import check_type
from tensornet.errors import FormatError, ShapeError, TargetError
from tensornet.nn import ModelExtension, build_module, register_extension, register_module_type
from tensornet_moe.ffn import ExpertFFN
from tensornet_moe.grouped_linear import Groups

Balance = Literal["pool", "layer"]
BALANCES = ("pool", "layer")


class ExpertPool(nn.Module):
    """Pool of experts that several layers use; each of these layers has its own router.

    The pool alone owns the parameters that these layers share. Its experts are an `ExpertFFN` with any banks,
    for example with private matrices, a shared center, low-rank deltas or quantized cores. Pass the pool, or
    a range of its experts (`PooledExperts`), to each layer in place of experts. Assign the pool to the model
    that contains the layers, so that its parameters are counted, trained and saved once. With FSDP, put the
    pool into the root unit.

    Args:
        experts: the networks. The pool owns them from now on.
        label: name by which layers find the pool when a model is loaded; it must be unique in the model.
        balance: what the balancing loss and the biases of routers aim at. `"pool"`: the load, summed over all
            layers, is even; a single layer may then prefer some experts. `"layer"`: the load is even in each
            layer.

    Raises:
        TypeError: `experts` is not an ExpertFFN.
        ValueError: an unknown `balance`.

    Reference:
        Huang et al. 2026, "UniPool: A Globally Shared Expert Pool for Mixture-of-Experts" (arXiv 2605.06665):
        one pool for all layers, balanced as a whole. "Expert Tying" (arXiv 2606.16825): pools of two
        neighbouring layers. Pools whose experts share cores, and ranges of a pool, are our extension.

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
        check_type("experts", experts, ExpertFFN, "for example the attribute experts of a SharedCoreMoE")
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
        """Apply each expert to its rows of `x: (rows, in_features)`, and return `(rows, out_features)`.

        The rows are sorted by expert, as `groups` describes.
        """
        y: Tensor = self.experts(x, groups)
        return y

    def spec(self) -> dict[str, Any]:
        """Return a JSON-ready description; see `tensornet.nn.register_module_type`."""
        options = {"label": self.label, "balance": self.balance}
        return {"type": "expert_pool", "experts": self.experts.spec(), **options}

    def extra_repr(self) -> str:
        """Describe the module for `print(model)`."""
        return f"label={self.label!r}, balance={self.balance!r}"


class PooledExperts(nn.Module):
    """Experts of a layer that uses an `ExpertPool`: all experts of the pool, or a range of them.

    Only the model owns the pool. A layer refers to the pool without registering it, so state dicts,
    optimizers and FSDP units contain the parameters of the pool once. The description (`spec`) of a layer
    refers to its pool by label. After a model is built from descriptions, `connect_pools` sets the pools.

    If the ranges do not overlap, every layer has its own experts. The layers then share only the cores that
    all experts of the pool share, for example one center. In the same way, a model that applies one block
    several times can give each pass its own experts.

    Args:
        pool: the pool; or its label, if the pool is set later.
        experts: indices of the pool's experts that the layer uses, in ascending order; all if absent. Needed
            if `pool` is a label.
        in_features, out_features: numbers of features of a token; needed only if `pool` is a label.

    Raises:
        TypeError: `experts` is not a range.
        IndexError: the range is empty or descending, or contains experts that the pool does not have.

    Example:
        >>> pool = tm.ExpertPool(tm.mixture(d_model=8, d_ff=16, experts=6).experts)
        >>> first, second = (
        ...     tm.SharedCoreMoE(tm.SwitchRouter(8, 3), tm.PooledExperts(pool, range(3 * k, 3 * k + 3)))
        ...     for k in range(2)
        ... )
        >>> second(torch.randn(5, 8)).shape
        torch.Size([5, 8])
    """

    def __init__(
        self,
        pool: ExpertPool | str,
        experts: range | None = None,
        *,
        in_features: int = 0,
        out_features: int = 0,
    ) -> None:
        super().__init__()
        if isinstance(pool, ExpertPool):
            experts = range(pool.num_experts) if experts is None else experts
            in_features, out_features = pool.in_features, pool.out_features
        check_type("experts", experts, range, "for example range(8)")
        assert experts is not None
        if len(experts) == 0 or experts.step < 1 or experts.start < 0:
            raise IndexError(f"A layer uses one or more experts of a pool in ascending order, got {experts}.")
        self.experts, self.in_features, self.out_features = experts, in_features, out_features
        self.label = pool.label if isinstance(pool, ExpertPool) else pool
        # The pool is kept in a tuple, so that it is not registered as a submodule.
        self._pool: tuple[ExpertPool, ...] = ()
        if isinstance(pool, ExpertPool):
            self.connect(pool)

    @property
    def num_experts(self) -> int:
        """Number of experts that the layer uses."""
        return len(self.experts)

    @property
    def pool(self) -> ExpertPool:
        """Pool that the layer uses.

        Raises:
            RuntimeError: the pool has not been set yet.
        """
        if not self._pool:
            raise RuntimeError(
                f"The pool labelled {self.label!r} was not given to a layer that uses it: call "
                "tensornet_moe.pool.connect_pools(model) on the model that contains both."
            )
        return self._pool[0]

    def connect(self, pool: ExpertPool) -> None:
        """Set the pool that the layer uses.

        Raises:
            IndexError: the layer uses experts that the pool does not have.
            ShapeError: the pool's experts have other sizes than the layer was built for.
        """
        if self.experts[-1] >= pool.num_experts:
            raise IndexError(
                f"The pool labelled {pool.label!r} has {pool.num_experts} experts, the layer uses "
                f"{self.experts}."
            )
        have, want = (pool.in_features, pool.out_features), (self.in_features, self.out_features)
        if have != want:
            raise ShapeError(
                f"The experts of the pool labelled {pool.label!r} have (in, out) = {have}, the layer was "
                f"built for {want}."
            )
        self._pool, self.label = (pool,), pool.label

    def forward(self, x: Tensor, groups: Groups) -> Tensor:
        """Apply the experts of the layer; see `ExpertFFN.forward`.

        Raises:
            RuntimeError: the pool has not been set yet, or is on another device than the rows.
        """
        pool = self.pool
        # An offloaded pool is on the meta device until hooks load it.
        if pool.device not in (x.device, torch.device("meta")):
            raise RuntimeError(
                f"The pool labelled {pool.label!r} is on {pool.device}, a layer that uses it on {x.device}. "
                "Assign the pool to the model that contains the layers, and move the whole model."
            )
        if len(self.experts) < pool.num_experts:
            sizes = None
            if groups.sizes is not None:
                rows = dict(zip(self.experts, groups.sizes, strict=True))
                sizes = tuple(rows.get(expert, 0) for expert in range(pool.num_experts))
            expert_of_row = self.experts.start + self.experts.step * groups.expert_of_row
            groups = Groups(self.in_pool(groups.counts), expert_of_row, sizes)
        y: Tensor = pool(x, groups)  # called as a module, so that hooks of the pool run
        return y

    def in_pool(self, values: Tensor) -> Tensor:
        """Extend values `(E,)` of the layer's experts to the whole pool, with zeros for all other experts."""
        index = torch.tensor(self.experts, device=values.device)
        return values.new_zeros(self.pool.num_experts).index_copy(0, index, values)

    def spec(self) -> dict[str, Any]:
        """Return a JSON-ready description; see `tensornet.nn.register_module_type`."""
        return {
            "type": "pooled_experts",
            "pool": self.label,
            "experts": [self.experts.start, self.experts.stop, self.experts.step],
            "in_features": self.in_features,
            "out_features": self.out_features,
        }

    def extra_repr(self) -> str:
        """Describe the module for `print(model)`."""
        return f"{self.experts} of the pool {self.label!r}"


def connect_pools(model: nn.Module) -> int:
    """Connect each layer that was built from a description to the pool with its label.

    Args:
        model: a model with pools, and layers that use them.

    Returns:
        Number of layers that were connected.

    Raises:
        FormatError: a layer's label belongs to no pool in the model, or to several.
        IndexError, ShapeError: a pool has other experts than its layer expects.
    """
    pools = [part for part in model.modules() if isinstance(part, ExpertPool)]
    waiting = [part for part in model.modules() if isinstance(part, PooledExperts) and not part._pool]
    for part in waiting:
        found = [pool for pool in pools if pool.label == part.label]
        if len(found) != 1:
            raise FormatError(
                f"A layer uses the pool labelled {part.label!r}, of which {type(model).__name__} has "
                f"{len(found)}; its labels are {sorted({pool.label for pool in pools}) or 'none'}. Put the "
                "pool into the model, and give every pool a label of its own."
            )
        part.connect(found[0])
    return len(waiting)


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
        if isinstance(part, PooledExperts) and not any(part.pool is pool for pool in pools.values()):
            raise TargetError(
                f"{name!r} uses the pool labelled {part.label!r}, which {type(model).__name__} does "
                "not contain, so that it would be neither trained nor saved. Assign it: model.pool = pool."
            )
    return pools


def _build_pool(
    spec: Mapping[str, Any], device: torch.device | str | None, dtype: torch.dtype | None
) -> ExpertPool:
    experts: Any = build_module(spec["experts"], device=device, dtype=dtype)
    return ExpertPool(experts, label=spec["label"], balance=spec["balance"])


def _build_pooled(
    spec: Mapping[str, Any], device: torch.device | str | None, dtype: torch.dtype | None
) -> PooledExperts:
    sizes = {name: spec[name] for name in ("in_features", "out_features")}
    return PooledExperts(spec["pool"], range(*spec["experts"]), **sizes)


class PoolExtension(ModelExtension):
    """Extension that refuses to save or load a model whose layers use a pool outside the model."""

    def check_whole(self, model: nn.Module) -> None:
        """Raise TargetError if a pool is missing from the model or contained twice; see `find_pools`."""
        find_pools(model)


register_module_type("expert_pool", _build_pool)
register_module_type("pooled_experts", _build_pooled)
register_extension(PoolExtension())
