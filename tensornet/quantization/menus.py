"""Menus: the number formats that the files of an export target can store, and the bytes that they take.

A library that exports models registers a menu for each of its export targets. Plans for a target then use
only formats that the target can store, and predict the size of the target's files.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from tensornet.errors import FormatError
from tensornet.quantization.formats import NumberFormat
from tensornet.registry import Registry


@dataclass(frozen=True)
class Menu:
    """Number formats that an export target can store exactly, if each row consists of complete groups.

    Args:
        formats: names of the formats.
        num_bytes: function that computes how many bytes a matrix takes in a file of the target. Its arguments
            are the format and the shape `(out, in)` of the matrix, and the dtype of the model.
        whole_model: True if the target stores embeddings and heads in these formats too.
        fused: sets of layer names. The target's software fuses layers of one set that have the same parent
            module, so they need the same format.
    """

    formats: tuple[str, ...]
    num_bytes: Callable[[NumberFormat, Sequence[int], torch.dtype], int] = NumberFormat.nbytes
    whole_model: bool = False
    fused: tuple[tuple[str, ...], ...] = ()


#: Maps names of export targets to menus.
MENUS: Registry[Menu] = Registry(
    "menu of number formats",
    error=FormatError,
    hint="Install and import tensornet_hf, which registers the menus of its export targets, or list names of "
    "formats, such as ('int4',).",
)


def bytes_for(
    target: str | None, number_format: NumberFormat, shape: Sequence[int], dtype: torch.dtype
) -> int:
    """Compute how many bytes a matrix takes in a file.

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
