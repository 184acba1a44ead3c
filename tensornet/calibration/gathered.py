"""Recognition of padding among tokens that a router has gathered.

Experts read `(picked tokens, features)`, whose sizes say nothing about rows and tokens, so that no mask can
be placed (`tensornet.calibration.token_axes`). Picking tokens copies their numbers, though: rows that are
equal, bit by bit, to those at padded positions of the hidden states before are padding.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class GatheredTokens:
    """Padded rows of the hidden states of one batch, and the picked rows that were recognised.

    Later layers of an expert read results computed from its rows, in the same order: the rows of one are
    those of another whose name differs in one part (`experts.3.up` and `experts.3.down`).

    Example:
        >>> seen = GatheredTokens()
        >>> states, mask = torch.randn(2, 3, 4), torch.tensor([[True, True, False], [True, False, False]])
        >>> seen.remember(states, mask)
        >>> seen.kept("experts.0.up", states[[0, 0, 1], [0, 2, 0]]).tolist()
        [True, False, True]
        >>> seen.kept("experts.0.down", torch.randn(3, 6)).tolist()
        [True, False, True]
    """

    states: dict[int, tuple[Tensor, int, Tensor]] = field(default_factory=dict)
    picked: dict[str, Tensor] = field(default_factory=dict)
    _padding: dict[int, Tensor] = field(default_factory=dict)

    def remember(self, states: Tensor, mask: Tensor) -> None:
        """Remember the newest hidden states of a width.

        Args:
            states: shape `(*mask.shape, features)`.
            mask: true at tokens.
        """
        width = states.shape[-1]
        self.states[width] = (states.detach(), _version(states), mask)
        self._padding.pop(width, None)

    def kept(self, name: str, x: Tensor, placed: Tensor | None = None) -> Tensor | None:
        """Tell tokens from padding among picked rows.

        Args:
            name: of the layer that reads them.
            x: shape `(rows, features)`.
            placed: the mask if the rows are all tokens in order, which their number allows.

        Returns:
            True at tokens, shape `(rows,)`; `placed` where nothing is recognised as padding.
        """
        found = self._recognised(x)
        if found is not None:
            in_order = placed is not None and not bool(found[~placed].any())
            self.picked[name] = placed if in_order and placed is not None else found
            return self.picked[name]
        parts = name.split(".")
        for other, keep in self.picked.items():
            differing = [a != b for a, b in zip(parts, other.split("."), strict=False)]
            if len(keep) == len(x) and sum(differing) == 1 and other.count(".") == name.count("."):
                return keep
        return placed

    def _recognised(self, x: Tensor) -> Tensor | None:
        width = x.shape[-1]
        if width not in self._padding:
            if width not in self.states:
                return None
            states, version, mask = self.states.pop(width)
            if _version(states) != version:  # changed in place since
                return None
            self._padding[width] = _fingerprints(states[~mask])
        padded = torch.isin(_fingerprints(x.detach()), self._padding[width])
        return ~padded if bool(padded.any()) else None


def hidden_states(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], mask: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """Find hidden states among the arguments of a module, with the mask in their shape; None without padding.

    Args:
        args, kwargs: of the module.
        mask: `(rows, tokens)`, true or 1 at tokens.
    """
    if mask is None or mask.ndim != 2 or bool(mask.all()):
        return None
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim in (2, 3):
            for placed in (mask.bool(), mask.bool().reshape(-1)):
                if value.shape[:-1] == placed.shape:
                    return value, placed
    return None


def _fingerprints(rows: Tensor) -> Tensor:
    """Hash each row by its bits alone, independent of the rows beside it."""
    bits = rows.float().contiguous().view(torch.int32).long()
    generator = torch.Generator("cpu").manual_seed(0)
    weights = torch.randint(-(2**62), 2**62, (rows.shape[-1],), generator=generator, device="cpu")
    return (bits * weights.to(rows.device)).sum(-1)  # wraps around, which loses nothing


def _version(x: Tensor) -> int:
    return -1 if x.is_inference() else x._version
