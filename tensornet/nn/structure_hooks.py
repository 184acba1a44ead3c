"""Telling libraries that own a model class that layers of a model were replaced.

A model class may have its own way of saving, which knows nothing of layers made of cores. A plugin registers
a hook that teaches it; until one has, the model's `save_pretrained` refuses instead of writing a folder that
nobody can load.
"""

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

from tensornet.errors import TargetError
from tensornet.nn.serialization import module_spec

#: Called with a model after some of its layers were replaced, either way.
#: Returns True if it takes care of how the model is saved.
StructureHook = Callable[[nn.Module], bool]

_HOOKS: list[StructureHook] = []


def register_structure_hook(hook: StructureHook) -> StructureHook:
    """Have `hook` called whenever layers of a model were replaced. Usable as a decorator."""
    _HOOKS.append(hook)
    return hook


def structure_changed(model: nn.Module) -> None:
    """Call every hook; where none takes care of saving, make `save_pretrained` refuse.

    Whoever replaces layers calls this once, after the last one.
    """
    handled = _run_hooks(model)
    if handled or not callable(getattr(type(model), "save_pretrained", None)):
        return
    if any(_is_special(module) for module in model.modules()):
        # On the instance: only this model is affected, and a hook that comes later can take it off.
        model.save_pretrained = MethodType(save_pretrained, model)  # type: ignore[assignment]
    else:
        _remove_guard(model)


def _is_special(module: nn.Module) -> bool:
    """Whether a module has a description, or refuses to give one as it is now."""
    try:
        return module_spec(module) is not None
    except TargetError:
        return True


def save_pretrained(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Stands in for the model's own method: asks the hooks again, then saves or refuses.

    It has that method's name because pickling finds a bound method by its function's name.
    """
    if not _run_hooks(self):
        raise TargetError(
            f"This {type(self).__name__} holds layers made of cores, and its save_pretrained does not know "
            "how to write them: the folder could not be loaded. Run `import tensornet_hf`, then save again; "
            "or call tensornet.decompress(model) first to save dense weights."
        )
    _remove_guard(self)
    return self.save_pretrained(*args, **kwargs)  # type: ignore[operator]


def _remove_guard(model: nn.Module) -> None:
    if getattr(model.__dict__.get("save_pretrained"), "__func__", None) is save_pretrained:
        del model.__dict__["save_pretrained"]


def _run_hooks(model: nn.Module) -> bool:
    answers = [hook(model) for hook in _HOOKS]
    return any(answers)
