"""Extensions: how a library with model classes of its own integrates with tensornet.

A model class may keep many matrices in one parameter, have its own way of saving, or come with text to
calibrate on. A plugin subclasses `ModelExtension`, overrides methods and registers one instance.
"""

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from types import FrameType, MethodType
from typing import Any, TypeVar

from torch import nn

from tensornet.checks import check_type
from tensornet.errors import TargetError
from tensornet.nn.expansion import matrices_apart
from tensornet.nn.fused_paths import keep_off_fused_paths
from tensornet.nn.serialization import module_spec

#: Runs a model that is given to it.
Run = Callable[[nn.Module], Any]
Function = TypeVar("Function", bound=Callable[[nn.Module], Any])


@dataclass(frozen=True)
class ProvidedData:
    """Calibration data of an extension.

    Args:
        batches: as for `tensornet.calibrate`.
        source: a few words for reports that say what the data is.
    """

    batches: Iterable[Any]
    source: str


class ModelExtension:
    """Base class of extensions; every method has a default that leaves models alone.

    Example:
        >>> from tensornet.nn.extension import ProvidedData
        >>> class Mine(tn.ModelExtension):
        ...     def calibration_data(self, model):
        ...         if isinstance(model, torch.nn.Linear):
        ...             return ProvidedData([torch.ones(1, 8)], "ones")
        >>> Mine().calibration_data(torch.nn.Linear(8, 8)).source
        'ones'
    """

    def expanded(self, model: nn.Module) -> AbstractContextManager[None]:
        """Expose weights that the model stores in another form as layers, inside the returned context.

        Entered while a model is observed, planned or changed. On exit every layer that was not replaced
        returns to the model's own form.

        Args:
            model: changed in place inside the context.
        """
        return nullcontext()

    def next_batch(self, block: nn.Module, batch: Mapping[str, Any]) -> None:
        """Pass information about a batch, such as its padding, to modules inside `block`.

        Called where blocks of a model run one by one, without the model around them.

        Args:
            block: part of a model that is expanded.
            batch: keyword arguments of the model.
        """

    def layers_replaced(self, model: nn.Module) -> bool:
        """Adapt a model after some of its layers were replaced, in either direction.

        Args:
            model: its layers are final; the method is called once after the last replacement.

        Returns:
            True if the extension takes care of how the model is saved. Unless some extension does,
            `save_pretrained` of the model raises TargetError.
        """
        return False

    def is_described(self, model: nn.Module) -> bool:
        """Return True if `save_pretrained` of the model writes its tensor-network layers.

        Asked while a model is saved of which only a part was compressed: `layers_replaced` saw that part.

        Args:
            model: has a method `save_pretrained`.
        """
        return False

    def calibration_data(self, model: nn.Module) -> ProvidedData | None:
        """Return calibration data for a model compressed without any; None leaves it to other extensions.

        Args:
            model: dense, about to be compressed.
        """
        return None

    def sample_batch(self, model: nn.Module) -> Mapping[str, Any] | None:
        """Return keyword arguments with which a model, or a part of one, can be called; None if unknown.

        Compressed models are run on it once, which reveals code that reads the weight of a replaced layer.

        Args:
            model: compressed or not.
        """
        return None

    def sample_runs(self, model: nn.Module) -> Iterable[Run]:
        """Return runs of the model on generated data, which reveal weights read outside their layers.

        Args:
            model: says which calls are possible.

        Returns:
            Functions that run a twin of the model, or a part of it; one that cannot may raise anything.
        """
        return ()


_EXTENSIONS: list[ModelExtension] = []


def register_extension(extension: ModelExtension) -> ModelExtension:
    """Register an extension, which is then asked about every model.

    Args:
        extension: an instance, not a class.

    Returns:
        The same extension.

    Raises:
        TypeError: `extension` is not a `ModelExtension`.

    Example:
        >>> class Mine(tn.ModelExtension):
        ...     pass
        >>> isinstance(tn.register_extension(Mine()), Mine)
        True
    """
    check_type("extension", extension, ModelExtension, "pass an instance of your subclass of it")
    _EXTENSIONS.append(extension)
    return extension


@contextmanager
def expanded(model: nn.Module) -> Iterator[None]:
    """Show all weights of a model as layers inside the block; may be nested."""
    with ExitStack() as stack:
        for apart in (matrices_apart, *(extension.expanded for extension in _EXTENSIONS)):
            stack.enter_context(apart(model))
        yield


def announce_batch(block: nn.Module, batch: Mapping[str, Any]) -> None:
    """Tell every extension the next batch of a block that runs without its model."""
    for extension in _EXTENSIONS:
        extension.next_batch(block, batch)


def provided_data(model: nn.Module) -> ProvidedData | None:
    """Return the data of the first extension that has some for this model, or None."""
    return next((data for x in _EXTENSIONS if (data := x.calibration_data(model)) is not None), None)


def sample_batch(model: nn.Module) -> Mapping[str, Any] | None:
    """Return the batch of the first extension that makes one for this model, or None."""
    return next((batch for x in _EXTENSIONS if (batch := x.sample_batch(model)) is not None), None)


def sample_runs(model: nn.Module) -> list[Run]:
    """Return the runs of all extensions."""
    return [run for extension in _EXTENSIONS for run in extension.sample_runs(model)]


def structure_changed(model: nn.Module) -> None:
    """Tell every extension that layers were replaced; block `save_pretrained` unless one handles it.

    Code that replaces layers calls this once, after the last one.
    """
    keep_off_fused_paths(model)
    handled = _tell_extensions(model)
    if refuse_other_owners not in model._state_dict_pre_hooks.values():
        model.register_state_dict_pre_hook(refuse_other_owners)  # public, since copies and pickles find it
    if handled or not callable(getattr(type(model), "save_pretrained", None)):
        return
    if any(_is_special(module) for module in model.modules()):
        # On the instance: other models are not affected, and an extension that comes later can remove it.
        model.save_pretrained = MethodType(save_pretrained, model)  # type: ignore[assignment]
    else:
        _remove_guard(model)


def save_pretrained(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Ask the extensions again, then save or raise TargetError.

    It has that method's name because pickling finds a bound method by its function's name.
    """
    if not _tell_extensions(self):
        raise TargetError(
            f"This {type(self).__name__} holds layers made of cores, and its save_pretrained does not know "
            "how to write them: the folder could not be loaded. Run `import tensornet_hf`, then save again; "
            "or call tensornet.decompress(model) first to save dense weights."
        )
    _remove_guard(self)
    return self.save_pretrained(*args, **kwargs)  # type: ignore[operator]


def refuse_other_owners(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    """Raise TargetError if a larger model saves the module and does not describe its layers.

    To explain why it looks at the call stack: a module does not know the model that it is a part of, and
    whoever compresses a part names that part alone. The tensors of both are collected inside the larger
    model's `save_pretrained`.

    Args:
        module: had layers replaced; this is its hook for `state_dict`.
        prefix: name of the module in the larger model, with a dot at its end; empty if there is none.
        keep_vars: see `torch.nn.Module.state_dict`.

    Raises:
        TargetError: the folder could not be loaded; the message says what to call.
    """
    owner = _saved_owner() if prefix and any(map(_is_special, module.modules())) else None
    if owner is None or any(extension.is_described(owner) for extension in _EXTENSIONS):
        return
    raise TargetError(
        f"A part of this {type(owner).__name__}, {prefix.removesuffix('.')}, holds layers made of cores, and "
        "its save_pretrained does not describe them: the folder could not be loaded. Run `import "
        "tensornet_hf` and tensornet_hf.prepare_for_saving(model), then save again."
    )


def _saved_owner() -> nn.Module | None:
    """Return the model whose `save_pretrained` runs; None also if PEFT writes adapters alone."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self") if frame.f_code.co_name == "save_pretrained" else None
        if isinstance(owner, nn.Module):
            return None if getattr(owner, "peft_config", None) else owner
        frame = frame.f_back
    return None


def _tell_extensions(model: nn.Module) -> bool:
    answers = [extension.layers_replaced(model) for extension in _EXTENSIONS]
    return any(answers)


def _is_special(module: nn.Module) -> bool:
    """Return True if a module has a description, or cannot be described in its present state."""
    try:
        return module_spec(module) is not None
    except TargetError:
        return True


def _remove_guard(model: nn.Module) -> None:
    if getattr(model.__dict__.get("save_pretrained"), "__func__", None) is save_pretrained:
        del model.__dict__["save_pretrained"]


# --- deprecated: one function for each method, until the next release --------------------------------


class _FromFunction(ModelExtension):
    """Extension with one method, registered by one of the deprecated functions below."""

    def __init__(self, method: str, function: Callable[[nn.Module], Any]) -> None:
        setattr(self, method, function)


def _register(old: str, method: str, function: Function) -> Function:
    warnings.warn(
        f"{old} is deprecated and goes with the next release; subclass tensornet.ModelExtension, "
        f"override {method} and call register_extension.",
        DeprecationWarning,
        stacklevel=3,
    )
    register_extension(_FromFunction(method, function))
    return function


def register_structure_hook(hook: Function) -> Function:
    """Register a function for `ModelExtension.layers_replaced` (deprecated)."""
    return _register("register_structure_hook", "layers_replaced", hook)


def register_expansion(expansion: Function) -> Function:
    """Register a function for `ModelExtension.expanded` (deprecated)."""
    return _register("register_expansion", "expanded", expansion)


def register_calibration_provider(provider: Function) -> Function:
    """Register a function for `ModelExtension.calibration_data` (deprecated)."""
    return _register("register_calibration_provider", "calibration_data", provider)


def register_runs(provider: Function) -> Function:
    """Register a function for `ModelExtension.sample_runs` (deprecated)."""
    return _register("register_runs", "sample_runs", provider)
