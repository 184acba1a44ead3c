"""JSON descriptions of tensor-network layers, and uninitialized layers from descriptions.

A checkpoint holds the description of each compressed module beside its cores. Plugins register their own
module types here, so one loader serves them all.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from tensornet.errors import FormatError
from tensornet.nn.embedding import MPOEmbedding
from tensornet.nn.linear import empty_linear
from tensornet.nn.storage import Storage
from tensornet.topology import Topology

#: Makes an empty module from its description: `(spec, device, dtype) -> module`.
Builder = Callable[[Mapping[str, Any], torch.device | str | None, torch.dtype | None], nn.Module]

_BUILDERS: dict[str, Builder] = {}


def register_module_type(name: str, builder: Builder) -> None:
    """Register a builder of modules for `build_module`, by their `spec()["type"]`.

    Raises:
        ValueError: the name is taken.

    Example:
        >>> class Doubled(torch.nn.Identity):
        ...     def spec(self):
        ...         return {"type": "doubled"}
        >>> tn.nn.register_module_type("doubled", lambda spec, device, dtype: Doubled())
        >>> tn.nn.build_module({"type": "doubled"})
        Doubled()
    """
    if name in _BUILDERS:
        raise ValueError(f"A module type named {name!r} is already registered.")
    _BUILDERS[name] = builder


def module_spec(module: nn.Module) -> dict[str, Any] | None:
    """Describe a module of a registered type; None for any other module.

    Example:
        >>> tn.nn.module_spec(tn.nn.MPOLinear(16, 32, max_bond=4))["type"]
        'linear'
        >>> tn.nn.module_spec(torch.nn.Linear(4, 4)) is None
        True
    """
    spec = getattr(module, "spec", None)
    described = spec() if callable(spec) else None
    return described if isinstance(described, dict) and described.get("type") in _BUILDERS else None


def build_module(
    spec: Mapping[str, Any],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Build an uninitialized module from its description; on `device="meta"` nothing is allocated.

    Raises:
        FormatError: unknown type, or a description that is incomplete or inconsistent.

    Example:
        >>> layer = tn.nn.MPOLinear(16, 32, max_bond=4)
        >>> twin = tn.nn.build_module(tn.nn.module_spec(layer), device="meta")
        >>> twin.topology == layer.topology
        True
    """
    kind = spec.get("type")
    if not isinstance(kind, str) or kind not in _BUILDERS:
        raise FormatError(
            f"Unknown module type {kind!r} in the stored description; known are "
            f"{', '.join(sorted(_BUILDERS))}. A plugin may have to be imported first."
        )
    try:
        return _BUILDERS[kind](spec, device, dtype)
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"Bad description of a {kind!r} module: {error}") from error


def _build_linear(
    spec: Mapping[str, Any], device: torch.device | str | None, dtype: torch.dtype | None
) -> nn.Module:
    return empty_linear(
        Topology.from_dict(spec["topology"]),
        bias=bool(spec["bias"]),
        source=spec["source"],
        storage=Storage.from_dict(spec.get("storage", {})),
        device=device,
        dtype=dtype,
    )


def _build_embedding(
    spec: Mapping[str, Any], device: torch.device | str | None, dtype: torch.dtype | None
) -> nn.Module:
    topology = Topology.from_dict(spec["topology"])
    storage = Storage.from_dict(spec.get("storage", {}))
    return MPOEmbedding(
        topology, padding_idx=spec["padding_idx"], storage=storage, device=device, dtype=dtype
    )


register_module_type("linear", _build_linear)
register_module_type("embedding", _build_embedding)
