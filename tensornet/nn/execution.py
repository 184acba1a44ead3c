"""The part of a layer that decides how its operator is applied, and keeps the rebuilt matrix in eval."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from tensornet.contraction.machine import Machine, check_machine, default_machine
from tensornet.network import PLANNED_TOKENS, OperatorPlan
from tensornet.nn.explain import Explanation, explain
from tensornet.nn.fast_path import Shortcut
from tensornet.nn.matrix_cache import CachedMatrix, compute_dtype, may_cache, may_write_in_place
from tensornet.nn.strategy import (
    ALWAYS_CACHED,
    ALWAYS_RECONSTRUCT,
    CACHED,
    DEFAULT_CACHE_LIMIT,
    Bounds,
    Dispatch,
    Strategy,
    check_options,
    choose,
    dispatch,
)


class RoutedModule(nn.Module):
    """Abstract base of modules that apply a planned operator by one of several routes.

    Subclasses call `_start_routing` at the end of `__init__` and define `stored`, `weight` and `to_matrix`.

    A kept matrix is no part of the state: it is not saved, copied, pickled or moved. It is dropped by
    `train()`, `eval()`, `.to()` and `set_cores`, and built again when a core has changed (see
    `tensornet.nn.matrix_cache`). Compiled and exported programs never use one.
    """

    plan: OperatorPlan
    strategy: Strategy
    cache_limit: int | None
    machine: Machine | None
    _cached: CachedMatrix | None
    _shortcut: Shortcut | None

    @property
    def stored(self) -> Mapping[str, Tensor]:
        """The parameters and buffers that hold the cores, by name."""
        raise TypeError(f"{type(self).__name__} must define stored.")

    @property
    def weight(self) -> Tensor:
        """A tensor with the dtype and device of the cores."""
        raise TypeError(f"{type(self).__name__} must define weight.")

    def to_matrix(self) -> Tensor:
        """Dense matrix, shape `(out_features, in_features)`, differentiable."""
        raise TypeError(f"{type(self).__name__} must define to_matrix().")

    def explain(self, tokens: int = PLANNED_TOKENS) -> Explanation:
        """What each strategy costs for that many tokens, and which one the layer takes as it is now.

        Raises:
            ValueError: `tokens` is no integer of at least 1.
        """
        return explain(self, tokens)

    @property
    def matrix_bytes(self) -> int:
        """Size of the dense matrix in the dtype of the cores."""
        return self._matrix_bytes

    @property
    def cached_bytes(self) -> int:
        """Size of the matrix that is kept at the moment, 0 if there is none."""
        return 0 if self._cached is None else self._cached.matrix.nbytes

    @property
    def may_keep_matrix(self) -> bool:
        """Whether strategy and memory limit allow to keep the matrix in eval."""
        if self.strategy not in ("auto", "cached"):
            return False
        limit = self.cache_limit
        if limit is None:
            return self.strategy == "cached" or self._matrix_bytes <= DEFAULT_CACHE_LIMIT
        return self._matrix_bytes <= limit

    @property
    def matrix_at_hand(self) -> Tensor | None:
        """The matrix that is kept at the moment, unless it is one for autocast; it may be out of date."""
        return self._cached.matrix if self._cached is not None and self._cached.autocast is None else None

    def drop_cache(self) -> None:
        """Free the kept matrix; the next forward pass that wants one builds it again."""
        self._cached = self._shortcut = None

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
            cache_limit: bytes.
            machine: constants to decide by, see `tensornet.measure_machine`.

        Raises:
            TypeError: `machine` is none.
            ValueError: unknown strategy, negative limit.
        """
        check_options(strategy or self.strategy, cache_limit)
        check_machine(machine)
        self.strategy = strategy or self.strategy
        self.cache_limit = self.cache_limit if cache_limit is None else cache_limit
        self.machine = machine or self.machine
        self.drop_cache()
        self._plan_dispatch()
        return self

    def route(self, tokens: int, *, on_cpu: bool | None = None) -> int:
        """How to apply the operator to that many tokens now.

        Args:
            tokens: number of input vectors.
            on_cpu: whether it is done on the CPU; asks the cores if absent.

        Returns:
            The position of a candidate in `plan.applies`, `RECONSTRUCT`, `CACHED`, or `SLICED - k` for the
            k-th plan of `tensornet.contraction.slicing.plan_slices`.
        """
        # Tracers see the route without a kept matrix: it would become a constant that no update reaches.
        route = choose(self.bounds(on_cpu, may_keep=not torch.compiler.is_compiling()), tokens)
        if route == CACHED and not may_cache(self.tensors_of_cores()):
            return choose(self.bounds(on_cpu, may_keep=False), tokens)
        return route

    def bounds(self, on_cpu: bool | None = None, *, may_keep: bool = True) -> Bounds:
        """The routes for all token counts in the present mode; `may_keep=False` counts kept matrices out."""
        if self.strategy == "reconstruct" and not may_write_in_place():
            return ALWAYS_RECONSTRUCT
        table = self.dispatch if on_cpu is None else self._dispatch[0 if on_cpu else 1]
        if self.strategy == "reconstruct":
            return table.rebuilt
        if self.strategy == "factorized":
            return table.factorized
        if may_keep and not self.training and self.may_keep_matrix:
            return ALWAYS_CACHED if self.strategy == "cached" else table.cached
        return table.inference if may_write_in_place() else table.uncached

    def records_gradients(self) -> bool:
        """Whether a forward pass would now record gradients of the cores, which a kept matrix has not."""
        return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in self.stored.values())

    def kept_matrix(self) -> Tensor:
        """The kept matrix, built if it is absent or out of date; only where `route` gives `CACHED`."""
        held = self.tensors_of_cores()
        if self._cached is None or not self._cached.holds_for(held):
            self.drop_cache()  # frees the old one before the new one is built
            kind, dtype = self.weight.device.type, compute_dtype(self.weight)
            # An inference tensor could not serve a later pass that records gradients of its input.
            off = torch.autocast(kind, enabled=False)
            with torch.inference_mode(False), torch.no_grad(), off:
                matrix = self.to_matrix().to(dtype).contiguous()
            self._cached = CachedMatrix.of(matrix, held)
        return self._cached.matrix

    @property
    def dispatch(self) -> Dispatch:
        """The table of routes for the device the cores are on."""
        return self._dispatch[0 if self.weight.device.type == "cpu" else 1]

    def train(self, mode: bool = True) -> Self:
        """As in `nn.Module`; drops the kept matrix."""
        self.drop_cache()
        return super().train(mode)

    def _start_routing(self, strategy: Strategy, cache_limit: int | None) -> None:
        check_options(strategy, cache_limit)
        self.strategy = strategy
        self.cache_limit = cache_limit
        self.machine = None
        self._cached = self._shortcut = None
        self._stored_names = tuple(self.stored)
        self._plan_dispatch()

    def _plan_dispatch(self) -> None:
        """Decide the routes, for the CPU and for any other device, in the present dtype."""
        itemsize = self.weight.element_size()
        out_features, in_features = self.plan.topology.shape
        self._matrix_bytes = out_features * in_features * itemsize
        self._dispatch: tuple[Dispatch, Dispatch] = (
            dispatch(self.plan, self.machine or default_machine("cpu"), itemsize),
            dispatch(self.plan, self.machine or default_machine("cuda"), itemsize, slices=False),
        )

    def tensors_of_cores(self) -> tuple[Tensor | None, ...]:
        """The stored tensors; None for one that is neither a parameter nor a buffer now."""
        # Straight from the dictionaries: a parametrized tensor is then not taken for a parameter.
        parameters, buffers = self._parameters, self._buffers
        return tuple(
            buffers.get(name) if (tensor := parameters.get(name)) is None else tensor
            for name in self._stored_names
        )

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        self.drop_cache()
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
        self._plan_dispatch()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cached": None, "_shortcut": None}
