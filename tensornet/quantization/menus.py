"""Menus: the number formats that the files of an export target can store, and their sizes in these files.

A library with an exporter registers the menu of its target, so that a plan can use only formats that the
target stores, and count bytes as in its files.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from tensornet.errors import FormatError
from tensornet.quantization.formats import NumberFormat
from tensornet.registry import Registry


@dataclass(frozen=True)
class Menu:
    """Number formats that an export target can store exactly, if their groups divide the rows of a matrix.

    Args:
        formats: names of the formats.
        num_bytes: computes the bytes of a matrix in a file of the target from its format, its shape `(out,
            in)`, and the dtype of the model.
        whole_model: True if the target stores embeddings and heads in these formats too.
        fused: sets of layer names. The target's software fuses the layers of a set if they have the same
            parent, so they need the same format.
    """

    formats: tuple[str, ...]
    num_bytes: Callable[[NumberFormat, Sequence[int], torch.dtype], int] = NumberFormat.nbytes
    whole_model: bool = False
    fused: tuple[tuple[str, ...], ...] = ()


#: Menus by the names of export targets.
MENUS: Registry[Menu] = Registry(
    "menu of number formats",
    error=FormatError,
    hint="Install and import tensornet_hf, which registers the menus of its export targets, or list names of "
    "formats, such as ('int4',).",
)


def bytes_for(
    target: str | None, number_format: NumberFormat, shape: Sequence[int], dtype: torch.dtype
) -> int:
    """Compute the number of bytes of a matrix in a file.

    Args:
        target: name of an export target in `MENUS`; None for files of this library.
        number_format: number format of the matrix.
        shape: shape `(out, in)` of the matrix.
        dtype: dtype of the model.

    Raises:
        FormatError: no menu is registered for the target.
    """
    if target is None:
        return number_format.nbytes(shape, dtype)
    return MENUS[target].num_bytes(number_format, shape, dtype)
