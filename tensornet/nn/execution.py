"""Execution of a layer: by contraction with the cores, a rebuilt matrix, or a cached matrix."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from tensornet._util import check_size
from tensornet.contraction.cost import Machine, check_machine, default_machine, dense_seconds
from tensornet.contraction.plan import (
    PLANNED_TOKENS,
    RECONSTRUCT,
    Bounds,
    OperatorPlan,
    choose,
    fastest_routes,
    plan_operator,
)
from tensornet.errors import TargetError
from tensornet.nn.explain import Explanation, explain, size_in_words
from tensornet.nn.fast_path import FastPath
from tensornet.nn.integer_cost import IntegerCost
from tensornet.nn.matrix_cache import MatrixKeeper, Strategy, check_options
from tensornet.topology import Topology

#: The route with a kept matrix, beside those of `OperatorPlan.seconds`.
CACHED = -2


class RoutedModule(MatrixKeeper):
    """Abstract base of modules that apply a planned operator by one of several routes.

    Subclasses set `topology`, call `_start_routing` at the end of `__init__` and define `stored`, `weight`
    and `to_matrix`. Contractions are planned at the first pass, so that loading a model plans nothing.
    """

    topology: Topology
    machine: Machine | None
    _optimize: str
    _plan: OperatorPlan | None
    _fast_path: FastPath | None

    @property
    def stored(self) -> Mapping[str, Tensor]:
        """Parameters and buffers that hold the cores, by name."""
        raise TypeError(f"{type(self).__name__} must define stored.")

    @property
    def weight(self) -> Tensor:
        """Stand-in with dtype, device and shape of the dense weight."""
        raise TypeError(f"{type(self).__name__} must define weight.")

    def to_matrix(self) -> Tensor:
        """Contract to the dense matrix, shape `(out_features, in_features)`, differentiable."""
        raise TypeError(f"{type(self).__name__} must define to_matrix().")

    @property
    def plan(self) -> OperatorPlan:
        """Contractions of the operator; equal topologies share one plan."""
        if torch.compiler.is_dynamo_compiling():
            return self._plan_for_trace()
        if self._plan is None:
            self._plan = plan_operator(self.topology, self._optimize)
        return self._plan

    def routes(self, on_cpu: bool, *, rebuild: bool = True) -> Bounds:
        """Compute the fastest route for every token count, without a kept matrix.

        Args:
            on_cpu: whether it is done on the CPU.
            rebuild: whether the matrix may be rebuilt.
        """
        if torch.compiler.is_dynamo_compiling():
            return self._routes_for_trace(on_cpu, rebuild)
        bounds = self._routes.get((on_cpu, rebuild))
        if bounds is None:
            machine = self.machine or default_machine("cpu" if on_cpu else "cuda")
            bounds = fastest_routes(self.plan, machine, self._computed_like().element_size(), rebuild=rebuild)
            self._routes[on_cpu, rebuild] = bounds
        return bounds

    def route(self, tokens: int, *, on_cpu: bool | None = None) -> int:
        """Choose the route for a token count.

        Args:
            tokens: number of input vectors.
            on_cpu: whether it is done on the CPU; asks the cores if absent.

        Returns:
            The position of a candidate in `plan.applies`, `RECONSTRUCT`, or `CACHED`.
        """
        if self.strategy == "reconstruct":
            return RECONSTRUCT
        if self.strategy == "cached" and self.keeps_now():
            return CACHED
        on_cpu = self._computed_like().device.type == "cpu" if on_cpu is None else on_cpu
        return choose(self.routes(on_cpu, rebuild=self.strategy != "factorized"), tokens)

    def explain(self, tokens: int = PLANNED_TOKENS) -> Explanation:
        """Report the cost of each strategy for a token count, and the strategy that the layer takes now.

        Raises:
            ValueError: `tokens` is not an integer of at least 1.
        """
        machine = self.machine or default_machine(self._computed_like().device)
        names = {RECONSTRUCT: "reconstruct", CACHED: "cached"}
        tokens = check_size("tokens", tokens, error=ValueError)
        integers = self._integer_costs(tokens, machine)
        whole = any(cost.multiplies for cost in integers.values())
        return explain(
            self.plan,
            tokens,
            machine,
            self._computed_like().element_size(),
            choice=lambda: "factorized" if whole else names.get(self.route(tokens), "factorized"),
            refused=self._refused(),
            integers=integers,
        )

    def _integer_costs(self, tokens: int, machine: Machine) -> dict[str, IntegerCost]:
        """Predict the cost of reading integer cores, by strategy."""
        return {}

    def configure(
        self,
        *,
        strategy: Strategy | None = None,
        cache_limit: int | None = None,
        machine: Machine | None = None,
    ) -> Self:
        """Change how the layer is applied; None leaves an option as it is. See `set_strategy` for a model.

        Args:
            strategy: see `NetworkModule`.
            cache_limit: bytes that may be kept under `"cached"`.
            machine: constants to decide by, see `tensornet.measure_machine`.

        Raises:
            TypeError: `machine` is not a `Machine`.
            ValueError: unknown strategy, negative limit.
        """
        check_machine(machine)
        super().configure(strategy=strategy, cache_limit=cache_limit)
        self.machine = machine or self.machine
        self._routes.clear()
        return self

    @property
    def matrix_bytes(self) -> int:
        """Size of the dense matrix in the dtype of the cores."""
        out_features, in_features = self.topology.shape
        return out_features * in_features * self._computed_like().element_size()

    @property
    def seconds_saved(self) -> float:
        """Predicted time that a kept matrix saves in a pass of one token."""
        like = self._computed_like()
        machine, itemsize = self.machine or default_machine(like.device), like.element_size()
        fastest = self.plan.seconds(self.plan.fastest(1, machine, itemsize), 1, machine, itemsize)
        return fastest - dense_seconds(*self.topology.shape, 1, machine, itemsize)

    def records_gradients(self) -> bool:
        """Return True if a forward pass would record gradients of the cores, which a kept matrix lacks."""
        return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in self.stored.values())

    def kept_matrix(self) -> Tensor:
        """Return the kept matrix, rebuilt if absent or out of date; only where `route` gives `CACHED`."""
        return self.kept(self.to_matrix)

    def drop_cache(self) -> None:
        """Free the kept matrix; the next forward pass that wants one builds it again."""
        super().drop_cache()
        self._fast_path = None

    def _start_routing(self, strategy: Strategy, cache_limit: int | None, optimize: str = "auto") -> None:
        self.machine, self._optimize, self._plan, self._fast_path = None, optimize, None, None
        self._routes: dict[tuple[bool, bool], Bounds] = {}
        self._stored_names = tuple(self.stored)
        self._start_keeping(strategy, cache_limit)

    def _forget_routes(self) -> None:
        """Discard the choice of routes after a change of device or dtype."""
        self.drop_cache()
        self._routes.clear()

    # Planning in a traced forward would break the graph: what it gives is taken as it is.
    @torch.compiler.assume_constant_result
    def _plan_for_trace(self) -> OperatorPlan:
        return self.plan

    @torch.compiler.assume_constant_result
    def _routes_for_trace(self, on_cpu: bool, rebuild: bool) -> Bounds:
        return self.routes(on_cpu, rebuild=rebuild)

    def _refused(self) -> dict[str, str]:
        """Explain why strategies are unavailable now, by name."""
        if self.strategy in ("factorized", "reconstruct"):
            other = {"factorized", "reconstruct", "cached"} - {self.strategy}
            return dict.fromkeys(other, "not the strategy set")
        if self.strategy == "auto":
            return {"cached": 'keeps the matrix: memory for speed, strategy="cached"'}
        if self.training:
            return {"cached": "only in eval"}
        if not self.may_keep_matrix:
            return {"cached": f"over cache_limit={size_in_words(self.cache_limit or 0)}"}
        if self.records_gradients():
            return {"cached": "gradients of the cores are recorded; use torch.no_grad()"}
        return {}

    def _core_tensors(self) -> tuple[Tensor | None, ...]:
        # Straight from the dictionaries: a parametrized tensor is then not taken for a parameter.
        parameters, buffers = self._parameters, self._buffers
        return tuple(
            buffers.get(name) if (tensor := parameters.get(name)) is None else tensor
            for name in self._stored_names
        )

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = self._buffers[name]
            if buffer is None or moved is None or moved is buffer:
                continue
            if torch._has_compatible_shallow_copy_type(buffer, moved):
                # As PyTorch moves parameters, but not buffers: the tensor of tied layers stays one.
                buffer.data = moved
                self._buffers[name] = buffer
        self._forget_routes()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_fast_path": None, "_plan": None, "_routes": {}}


def set_strategy(
    model: nn.Module,
    strategy: Strategy | None = None,
    *,
    cache_limit: int | None = None,
    machine: Machine | None = None,
) -> dict[str, int]:
    """Set strategy, cache limit and machine of every tensor-network layer and bank of shared-core experts.

    `"auto"` and the other strategies hold no more than the cores; `"cached"` is memory for speed. On the CPU
    in bfloat16, integers are held in the layout of torch's kernel: in at most 1.75 times the stored bytes,
    and under `"factorized"` in any (`int2` in twice its bytes).

    Args:
        model: any module.
        strategy: for all layers; None leaves each as it is.
        cache_limit: bytes that the kept matrices of all layers together may take under `"cached"`. The limit
            is dealt out now, to the layers that gain the most time per byte on a single token, and does not
            move between layers later. None leaves the limit of each layer as it is.
        machine: constants to decide by, for example from `tensornet.measure_machine()`.

    Returns:
        Bytes that each layer may keep, by name; layers that keep none are left out.

    Raises:
        TargetError: the model has no tensor-network layer.
        TypeError: `machine` is not a `Machine`.
        ValueError: unknown strategy, negative limit.

    Example:
        >>> model = torch.nn.Sequential(tn.nn.MPOLinear(64, 64, max_bond=4))
        >>> tn.nn.set_strategy(model, "cached")
        {'0': 16384}
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MatrixKeeper)}
    if not layers:
        raise TargetError(
            f"{type(model).__name__} has no layer made of cores; compress it first, or check that it is the "
            "compressed model that was passed."
        )
    check_machine(machine)
    cached = [layer for layer in layers.values() if (strategy or layer.strategy) == "cached"]
    check_options(strategy or ("cached" if cached else "auto"), cache_limit)
    for layer in layers.values():
        layer.configure(strategy=strategy)
        if isinstance(layer, RoutedModule):
            layer.configure(machine=machine)
    if cache_limit is not None:
        left = cache_limit
        gains = {id(layer): layer.seconds_saved / layer.matrix_bytes for layer in cached}
        for layer in sorted(cached, key=lambda layer: gains[id(layer)], reverse=True):
            fits = layer.matrix_bytes <= left
            layer.configure(cache_limit=layer.matrix_bytes if fits else 0)
            left -= layer.matrix_bytes if fits else 0
    return {name: layer.matrix_bytes for name, layer in layers.items() if layer.may_keep_matrix}


def cached_bytes(model: nn.Module) -> int:
    """Count the bytes of all matrices kept by layers of a model; 0 unless `"cached"` was requested.

    Example:
        >>> tn.nn.cached_bytes(tn.nn.MPOLinear(64, 64, max_bond=4))
        0
    """
    return sum(module.cached_bytes for module in model.modules() if isinstance(module, MatrixKeeper))
