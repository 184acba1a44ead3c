"""Cache of rebuilt matrices between forward passes: memory for speed, on request only.

The matrix belongs to the cores it was built from: the same parameter objects, at the same addresses, at the
same version. PyTorch raises a tensor's version at every in-place change, so an optimizer step, `copy_`
and `load_state_dict` are seen; a new parameter object and an assignment to `.data` are seen by identity and
address. Writing *into* `parameter.data` or into a NumPy view raises no version and cannot be seen: call
`train()`, `eval()` or `drop_cache()` on the layer or model after it.
"""

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal

import torch
from torch import Tensor, is_grad_enabled, nn
from torch._C import _are_functorch_transforms_active as transforms_active
from typing_extensions import Self

#: How a layer is applied, see `tensornet.nn.NetworkModule`.
Strategy = Literal["auto", "factorized", "reconstruct", "cached"]
STRATEGIES = ("auto", "factorized", "reconstruct", "cached")


@dataclass(frozen=True)
class CachedMatrix:
    """Dense matrix `(out_features, in_features)` with the state of the cores it was built from.

    Args:
        matrix: without gradient, in the dtype that products are computed in.
        states: of each core the parameter, its version and its address when the matrix was built.
        aliases: tensors on the same storage, which keep its address from being used again.
        kind: device type.
        autocast: the dtype of autocast when it was built, None if that was off.
    """

    matrix: Tensor
    states: tuple[tuple[Tensor, int, int], ...]
    aliases: tuple[Tensor, ...]
    kind: str
    autocast: torch.dtype | None

    @classmethod
    def of(cls, matrix: Tensor, cores: Sequence[Tensor | None]) -> "CachedMatrix":
        """Record a matrix with the present state of the cores."""
        assert all(core is not None for core in cores)
        known = tuple(core for core in cores if core is not None)
        aliases = tuple(core.detach() for core in known)
        kind = matrix.device.type
        states = tuple((core, core._version, core.data_ptr()) for core in known)
        return cls(matrix, states, aliases, kind, autocast_dtype(kind))

    def holds_for(self, cores: Sequence[Tensor | None]) -> bool:
        """Return True if rebuilding from these cores would give this matrix."""
        if autocast_dtype(self.kind) != self.autocast or len(cores) != len(self.states):
            return False
        for core, (known, version, address) in zip(cores, self.states, strict=True):
            if core is not known or known._version != version or known.data_ptr() != address:
                return False
        return True


def may_cache(cores: Sequence[Tensor | None], buffers: Iterable[Tensor | None] = ()) -> bool:
    """Return True if a matrix built from these cores may be kept and used for this call.

    Not where gradients of the cores are recorded, not inside a `torch.func` transform or a trace (their
    tensors die with them), and only for ordinary parameters: substitutes of `functional_call`,
    parametrizations, sharded and fake tensors have no identity or version that would tell when they change.

    Args:
        cores: the stored tensors.
        buffers: of the module, which may be floating: scales.
    """
    plain = {id(x) for x in buffers if type(x) is Tensor}
    if transforms_active() or torch.jit.is_tracing():  # a tracer crashes on tensors kept from its trace
        return False
    recording = is_grad_enabled()
    for core in cores:
        if core is None or (type(core) is not nn.Parameter and id(core) not in plain):
            return False
        if core.is_inference() or core.is_meta:
            return False
        if recording and core.requires_grad:
            return False
    return True


def compute_dtype(core: Tensor) -> torch.dtype:
    """Return the dtype in which a product with this core is computed: autocast's where it is on."""
    lowered = autocast_dtype(core.device.type)
    if lowered is None or core.dtype == torch.float64 or core.is_complex():
        return core.dtype
    return lowered


def autocast_dtype(kind: str) -> torch.dtype | None:
    """Return the dtype of autocast on a device type; None where it is off."""
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def check_options(strategy: str, cache_limit: int | None) -> None:
    """Raise ValueError for unknown options; warn about a limit without effect.

    Raises:
        ValueError: unknown strategy, or a limit that is not a number of bytes.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"Unknown strategy {strategy!r}; choose one of {', '.join(STRATEGIES)}.")
    if cache_limit is not None and (not isinstance(cache_limit, Integral) or cache_limit < 0):
        raise ValueError(
            f"cache_limit must be a number of bytes of at least 0, got {cache_limit!r}; 0 keeps no matrix."
        )
    if cache_limit and strategy != "cached":
        warnings.warn(
            f"cache_limit={cache_limit} has no effect under strategy={strategy!r}, which keeps no matrix; "
            'to trade memory for speed use strategy="cached" with this limit.',
            DeprecationWarning,
            stacklevel=4,
        )


class MatrixKeeper(nn.Module):
    """Abstract base of modules that rebuild matrices and keep them on request.

    Under `strategy="cached"` matrices are kept in eval while no gradient of a core is wanted, up to
    `cache_limit` bytes; under every other strategy nothing is kept. A kept matrix is no part of the state: it
    is not saved, copied, pickled or moved. It is dropped by `train()`, `eval()`, `.to()` and `configure`, and
    built again when a core has changed. Compiled and exported programs never use one.

    Subclasses call `_start_keeping` at the end of `__init__` and define `matrix_bytes`, `seconds_saved` and
    `_core_tensors`.
    """

    strategy: Strategy
    cache_limit: int | None
    _cached: CachedMatrix | None

    @property
    def matrix_bytes(self) -> int:
        """Size of the rebuilt matrices in the dtype of the cores."""
        raise TypeError(f"{type(self).__name__} must define matrix_bytes.")

    @property
    def seconds_saved(self) -> float:
        """Predicted time that a kept matrix saves in a pass of one token."""
        raise TypeError(f"{type(self).__name__} must define seconds_saved.")

    def _core_tensors(self) -> tuple[Tensor | None, ...]:
        """Return the tensors that the matrices are built from; None for values computed elsewhere."""
        raise TypeError(f"{type(self).__name__} must define _core_tensors().")

    def _core_buffers(self) -> Iterable[Tensor | None]:
        """Return the buffers that may be among `_core_tensors`."""
        return self._buffers.values()

    def _computed_like(self) -> Tensor:
        """Return a tensor with the dtype and device of the computation."""
        return next(x for x in self._core_tensors() if x is not None and x.is_floating_point())

    @property
    def cached_bytes(self) -> int:
        """Size of the kept matrices, 0 if there are none."""
        return 0 if self._cached is None else self._cached.matrix.nbytes

    @property
    def may_keep_matrix(self) -> bool:
        """True if strategy and memory limit allow keeping the matrix in eval mode."""
        if self.strategy != "cached":
            return False
        return self.cache_limit is None or self.matrix_bytes <= self.cache_limit

    def keeps_now(self) -> bool:
        """Return True if the next pass would use a kept matrix, in the present mode."""
        if self.strategy != "cached" or self.training or torch.compiler.is_compiling():
            return False  # tracers must see no kept matrix: it would become a constant that no update reaches
        return self.may_keep_matrix and may_cache(self._core_tensors(), self._core_buffers())

    def drop_cache(self) -> None:
        """Free the kept matrix; the next forward pass that wants one builds it again."""
        self._cached = None

    def configure(self, *, strategy: Strategy | None = None, cache_limit: int | None = None) -> Self:
        """Change how the layer is applied; None leaves an option as it is. See `set_strategy` for a model.

        Args:
            strategy: see `NetworkModule`.
            cache_limit: bytes that may be kept under `"cached"`.

        Raises:
            ValueError: unknown strategy, negative limit.
        """
        check_options(strategy or self.strategy, cache_limit)
        self.strategy = strategy or self.strategy
        self.cache_limit = self.cache_limit if cache_limit is None else cache_limit
        self.drop_cache()
        return self

    def kept(self, build: Callable[[], Tensor]) -> Tensor:
        """Return the cached result of `build`, built again if absent or stale; only where `keeps_now`."""
        cores = self._core_tensors()
        if self._cached is None or not self._cached.holds_for(cores):
            self.drop_cache()  # frees the old one before the new one is built
            like = self._computed_like()
            off = torch.autocast(like.device.type, enabled=False)
            dtype = compute_dtype(like)
            # An inference tensor could not serve a later pass that records gradients of its input.
            with torch.inference_mode(False), torch.no_grad(), off:
                matrix = build().to(dtype).contiguous()
            self._cached = CachedMatrix.of(matrix, cores)
        return self._cached.matrix

    def train(self, mode: bool = True) -> Self:
        """Set the mode as in `nn.Module`, and drop the kept matrix."""
        self.drop_cache()
        return super().train(mode)

    def _start_keeping(self, strategy: Strategy, cache_limit: int | None) -> None:
        check_options(strategy, cache_limit)
        self.strategy, self.cache_limit, self._cached = strategy, cache_limit, None

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        self.drop_cache()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cached": None}
