"""Adapters that wrap layers of a model, as those of PEFT do: recognized without importing the library.

To explain how this works: an adapter takes the place of the layer that it changes. It holds that layer as
`base_layer`, holds layers of its own beside it, and lists those in the class attribute `adapter_layer_names`.
Merging adds the adapter's matrix to `base_layer.weight`, which a layer made of cores does not have.
"""

from collections.abc import Iterable

from torch import nn

from tensornet.errors import TargetError

#: Under this name an adapter holds the layer that it wraps.
BASE = "base_layer"


def adapter_names(model: nn.Module) -> list[str]:
    """List the names of the adapters inside a model.

    >>> class Adapter(nn.Module):
    ...     adapter_layer_names = ("down",)
    >>> adapter_names(nn.Sequential(nn.Linear(4, 4), Adapter()))
    ['1']
    """
    return [name for name, x in model.named_modules(remove_duplicate=False) if _is_adapter(x)]


def split_by_adapters(model: nn.Module, names: Iterable[str]) -> tuple[set[str], set[str]]:
    """Select layers that belong to adapters, and layers that adapters wrap and could not merge into cores.

    An adapter that merges into cores says so by a true class attribute `merges_into_cores`.

    Args:
        model: any module.
        names: of layers inside it.

    Returns:
        The names of both kinds of layers.
    """
    adapters = {name: model.get_submodule(name) for name in adapter_names(model)}
    own, wrapped = set(), set()
    for name in names if adapters else ():
        parts = name.split(".")
        around = [(adapters.get(".".join(parts[:k])), part) for k, part in enumerate(parts)]
        inside = [(adapter, part) for adapter, part in around if adapter is not None]
        if any(part != BASE for _, part in inside):
            own.add(name)
        elif any(not getattr(adapter, "merges_into_cores", False) for adapter, _ in inside):
            wrapped.add(name)
    return own, wrapped


def refuse_wrapped(wrapped: Iterable[str]) -> None:
    """Raise TargetError if layers to compress lie under adapters.

    Args:
        wrapped: their names.

    Raises:
        TargetError: there are any.
    """
    if names := sorted(wrapped):
        others = f" ({len(names) - 1} other layers too)" if len(names) > 1 else ""
        raise TargetError(
            f"{names[0]} lies under an adapter{others}, which could not be merged into cores. Merge the "
            "adapters first, by merge_and_unload() in PEFT; or compress first, and add adapters by "
            f"tensornet_hf.peft.lora_config; or leave such layers dense, by exclude_modules={BASE!r}."
        )


def _is_adapter(module: nn.Module) -> bool:
    return isinstance(getattr(type(module), "adapter_layer_names", None), tuple)
