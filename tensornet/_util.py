"""Shared helpers: argument checks, context managers, optional imports, sizes in texts, cached results."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import fields, is_dataclass
from functools import wraps
from importlib import import_module
from importlib.util import find_spec
from numbers import Real
from operator import index
from pathlib import Path
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from tensornet.errors import (
    BudgetError,
    MemoryLimitError,
    MissingDependencyError,
    ShapeError,
    TopologyError,
)

P = ParamSpec("P")
R = TypeVar("R")

# --- argument checks -----------------------------------------------------------------------------

#: Dtypes of matrices that can be decomposed.
FLOATING = (
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
)


def refuse_transforms(tensor: Tensor, user: str) -> None:
    """Raise RuntimeError if a transform of `torch.func` tracks a tensor, whose derivatives would be lost."""
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):  # PyTorch has no public function for this
        raise RuntimeError(
            f"{user} has no derivatives and cannot be vectorized: detach the matrix, or use MPO.from_matrix, "
            "which is differentiable."
        )


def check_dense(value: Any, who: str, what: str, ndim: int) -> None:
    """Raise ShapeError unless `value` is a dense floating-point or complex tensor with `ndim` dimensions.

    Args:
        value: the argument to check.
        who: name of the public function or class that was called, for the message.
        what: description of the expected argument, for example `"a matrix of shape (out, in)"`.
        ndim: expected number of dimensions.

    Raises:
        ShapeError: the type, shape, dtype, device or layout is wrong; the message names the remedy.
    """
    if not isinstance(value, Tensor):
        raise ShapeError(
            f"{who} needs {what} as a torch.Tensor, got {type(value).__name__}; convert it with "
            "torch.as_tensor."
        )
    if value.ndim != ndim or value.numel() == 0:
        raise ShapeError(f"{who} needs {what} with at least one element, got shape {tuple(value.shape)}.")
    if value.dtype not in FLOATING:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATING)
        raise ShapeError(
            f"{who} needs {what} of floating or complex numbers ({names}), got {value.dtype}; cast it, for "
            "example with .float()."
        )
    if value.is_meta:
        raise ShapeError(f"{who} needs {what} with data, got a tensor on the meta device; load it first.")
    if value.layout is not torch.strided:
        raise ShapeError(f"{who} needs {what} in dense layout, got {value.layout}; use .to_dense().")


def check_input(x: Tensor, in_features: int) -> None:
    """Raise ShapeError unless the last dimension of the input `x` has size `in_features`."""
    if x.ndim == 0 or x.shape[-1] != in_features:
        raise ShapeError(
            f"The input has shape {tuple(x.shape)}; its last dimension must be in_features={in_features}."
        )


def check_size(name: str, value: Any, *, least: int = 1, error: type[ValueError] = TopologyError) -> int:
    """Convert a size, which may be a NumPy integer, to `int`, and check that it is at least `least`.

    Args:
        name: name of the argument, for the message.
        value: the size to convert.
        least: smallest allowed value.
        error: class of the exception that is raised for other values.
    """
    try:
        size = index(value)
    except TypeError:
        size = least - 1
    if isinstance(value, bool) or size < least:
        raise error(f"{name} must be an integer of at least {least}, got {value!r}.")
    return size


def check_sizes(name: str, values: Any, *, least: int = 1) -> tuple[int, ...]:
    """Convert a sequence of sizes, which may be NumPy integers, to a tuple of `int`.

    Raises:
        TopologyError: `values` is not a sequence of integers of at least `least`.
    """
    if not isinstance(values, Sequence | torch.Size) or isinstance(values, str):
        raise TopologyError(f"{name} must be a sequence of integers, for example (4, 8, 8); got {values!r}.")
    return tuple(check_size(f"Every entry of {name}", value, least=least) for value in values)


def check_type(name: str, value: Any, kind: type, advice: str) -> None:
    """Raise TypeError unless `value` is an instance of `kind`; the message ends with the remedy `advice`."""
    if not isinstance(value, kind):
        article = "an" if kind.__name__[0] in "AEIOU" else "a"
        raise TypeError(f"{name} must be {article} {kind.__name__}, got {type(value).__name__}; {advice}.")


def check_number(name: str, value: Any) -> None:
    """Raise BudgetError unless `value`, given for the argument `name`, is a real number."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise BudgetError(f"{name} must be a number, got {value!r}.")


def spaced_places(size: int, count: int) -> list[int]:
    """Choose `count` evenly spaced indices from 0 to `size - 1`, both included.

    They are computed in integers. `torch.linspace` computes in the default dtype, so even in single precision
    indices above 2^24 would be inexact, and the last one could be out of range.
    """
    steps = max(count - 1, 1)
    return [(2 * k * (size - 1) + steps) // (2 * steps) for k in range(count)]


# --- context managers and global state -----------------------------------------------------------

_DEVICES = ("cpu", "cuda")


def outside_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function to run without autocast, whose 16-bit products would violate its error bounds."""

    @wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        with ExitStack() as stack:
            for device in _DEVICES:
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            return function(*args, **kwargs)

    return wrapped


def on_cpu_unless_said(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function to run with the CPU as default device, whatever `torch.set_default_device` has set.

    Sensitivities and ranks are computed on the CPU, even if the weights are on another device. Do not
    decorate a function that runs a model: the model may rely on the default device.
    """

    @wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.get_default_device().type == "cpu":  # the `with` below would slow down every operation
            return function(*args, **kwargs)
        with torch.device("cpu"):
            return function(*args, **kwargs)

    return wrapped


@contextmanager
def in_eval_mode(*models: nn.Module) -> Iterator[None]:
    """Put models in eval mode inside the block, and restore the mode of every module afterwards.

    The fused fast path of PyTorch's attention and encoder layers is disabled, since it bypasses the hooks of
    their submodules.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    training = [module for model in models for module in model.modules() if module.training]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for module in training:
            module.training = True


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run compiled modules eagerly inside the block, so that hooks on their submodules are called."""
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Disable the key/value cache of a model inside the block.

    Passes over whole texts do not need a cache. When one block of a transformer runs several times on the
    same batch, a cache would append the tokens of every run.
    """
    # Submodules may have their own configurations.
    found = (getattr(module, "config", None) for module in model.modules())
    configs: list[Any] = [*{id(x): x for x in found if getattr(x, "use_cache", None) is not None}.values()]
    flags = [config.use_cache for config in configs]
    for config in configs:
        config.use_cache = False
    try:
        yield
    finally:
        for config, flag in zip(configs, flags, strict=True):
            config.use_cache = flag


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside any `DataParallel`, `DistributedDataParallel` and `torch.compile` wrappers."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def transforms_active() -> bool:
    """Return True inside a `torch.func` transform.

    Tensors made inside a transform must not be cached for later calls. PyTorch has no public function for
    this check.
    """
    return bool(torch._C._are_functorch_transforms_active())


def is_exporting() -> bool:
    """Return True only during `torch.export`, not inside `torch.compile`.

    Before torch 2.12, the public `torch.compiler.is_exporting` returns True in compiled code, too.
    """
    return bool(torch.compiler._is_exporting_flag)


# --- optional dependencies -------------------------------------------------------------------------

DISTRIBUTION = "tensornet-torch"


def missing_hint(modules: Sequence[str], *, extra: str, user: str) -> str | None:
    """Write one line with the pip command that installs missing modules.

    The modules are searched for, not imported, so that an error raised *inside* an installed package is not
    reported as a missing package.

    Args:
        modules: top-level module names, as imported.
        extra: the extra of this distribution that installs the modules.
        user: what needs the modules, in words for the message, such as `"the command line"`.

    Returns:
        The line, or None if every module is installed.
    """
    missing = [name for name in modules if find_spec(name) is None]
    if not missing:
        return None
    return (
        f"{user} needs {', '.join(missing)}, not installed here. Run: pip install '{DISTRIBUTION}[{extra}]'"
    )


def require(modules: Sequence[str], *, extra: str, user: str) -> None:
    """Raise MissingDependencyError, with the text of `missing_hint`, unless every module is installed."""
    hint = missing_hint(modules, extra=extra, user=user)
    if hint is not None:
        raise MissingDependencyError(hint)


def import_optional(module: str, *, extra: str, user: str) -> ModuleType:
    """Import a module of an optional package.

    `module` is a dotted name; the other arguments and the errors are those of `require`.
    """
    require((module.partition(".")[0],), extra=extra, user=user)
    return import_module(module)


# --- numbers in texts --------------------------------------------------------------------------------


def compact_count(value: float) -> str:
    """Format a number with three significant digits and a unit, k, M or B."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{f'{value / size:#.3g}'.rstrip('.')}{unit}"
    return f"{value:g}"


def compact_bytes(value: float) -> str:
    """Format a size in bytes with three significant digits; 1234567 becomes `1.23 MB`."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{f'{value / size:#.3g}'.rstrip('.')} {unit}"
    return f"{value:g} B"


# --- memory ------------------------------------------------------------------------------------------


def memory_held() -> str:
    """Return the memory that this process holds, for progress bars; empty without the package psutil."""
    try:
        import psutil
    except ImportError:
        return ""
    return f"{psutil.Process().memory_info().rss / 1e9:.1f} GB"


#: Results of fewer bytes are computed without asking for the available memory.
_SMALL_RESULT = 2**28


def available_memory(device: torch.device) -> int | None:
    """Return the bytes that can still be allocated on a device; None if the system does not tell.

    On the CPU this is the smaller of the free memory of the machine and the rest of a container's limit.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type != "cpu":
        return None
    found = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
        group = Path("/sys/fs/cgroup")
        limit, used = ((group / name).read_text() for name in ("memory.max", "memory.current"))
        found.append(int(limit) - int(used))  # ValueError if the limit is "max"
    except (OSError, ValueError):
        pass  # another operating system, or no limit
    return min(found, default=None)


def check_memory(elements: int, like: Tensor, what: str, advice: str) -> None:
    """Raise MemoryLimitError if this many elements like those of a tensor do not fit in memory."""
    needed = elements * like.element_size()
    if needed < _SMALL_RESULT or (available := available_memory(like.device)) is None or needed <= available:
        return
    raise MemoryLimitError(
        f"{what} needs {needed / 1e9:,.1f} GB, but only {available / 1e9:,.1f} GB are available on "
        f"{like.device}; {advice}."
    )


# --- results computed once -----------------------------------------------------------------------

#: Cache of the innermost `remembering` block; None outside any block. Keys contain the `id` of tensors. The
#: arguments are stored too, because Python may reuse the `id` of a deleted tensor.
_known: ContextVar[dict[Hashable, tuple[Any, Any]] | None] = ContextVar("known", default=None)


@contextmanager
def remembering() -> Iterator[None]:
    """Cache the results of functions decorated with `remembered` inside the block.

    The compression candidates of one layer share decompositions. Since decompositions can be larger than
    the layer, the cache is emptied when the block ends.
    """
    token = _known.set({})
    try:
        yield
    finally:
        _known.reset(token)


def remembered(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function so that its results are cached inside a `remembering` block.

    A tensor argument matches only the same, unmodified tensor object; other arguments are compared by value.
    All callers get the same result object and must not change it.
    """

    @wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        known = _known.get()
        if known is None:
            return function(*args, **kwargs)
        key = (function, _key(args), _key(tuple(sorted(kwargs.items()))))
        if key not in known:
            known[key] = (args, kwargs), function(*args, **kwargs)
        found: R = known[key][1]
        return found

    return wrapped


def _key(value: Any) -> Hashable:
    """Build a hashable cache key: tensors by identity and version, tuples and dataclasses item by item."""
    if isinstance(value, Tensor):
        return id(value), value._version
    if isinstance(value, tuple):
        return tuple(_key(x) for x in value)
    if is_dataclass(value) and not isinstance(value, type):
        return type(value), tuple(_key(getattr(value, field.name)) for field in fields(value))
    return value
