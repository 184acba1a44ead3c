"""Menus: the number formats that the files of an export target can store, and the bytes that they take.

A library that exports models registers a menu for each of its export targets. Plans for a target then use
only formats that the target can store, and predict the size of the target's files.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch

from tensornet.errors import FormatError
from tensornet.quantization.formats import NumberFormat
from tensornet.registry import Registry


def by_stack(name: str, stack: str) -> Hashable:
    """Return a key that is equal for all matrices of one stack, and different for all other matrices.

    Args:
        name: name of the layer.
        stack: name of the parameter that contains its matrix and others; empty if there is none.
    """
    return stack or name


@dataclass(frozen=True)
class Menu:
    """Number formats that an export target can store exactly, if each row consists of complete groups.

    Args:
        formats: names of the formats.
        num_bytes: function that computes how many bytes a matrix takes in a file of the target. Its arguments
            are the format and the shape `(out, in)` of the matrix, and the dtype of the model.
        whole_model: True if the target stores embeddings and heads in these formats too.
        on_request: names of formats that the target can store too, but that plans use only if they are
            named, since other formats of the same size lose less.
        group: function of the name of a layer and of its stack (see `by_stack`). Layers with equal keys need
            the same format in this target.
    """

    formats: tuple[str, ...]
    num_bytes: Callable[[NumberFormat, Sequence[int], torch.dtype], int] = NumberFormat.nbytes
    whole_model: bool = False
    on_request: tuple[str, ...] = ()
    group: Callable[[str, str], Hashable] = by_stack


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
