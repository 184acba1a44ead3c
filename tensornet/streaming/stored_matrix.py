"""Locate the matrix of one layer in the files of a checkpoint."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tensornet.io import Slice, load_slice


@dataclass(frozen=True)
class StoredMatrix:
    """Matrix stored in one or more slices of files, concatenated along the rows.

    Args:
        parts: two-dimensional, of one dtype and width.
        transposed: together they are the transpose of the matrix `(out_features, in_features)`.
    """

    parts: tuple[Slice, ...]
    transposed: bool = False

    @property
    def dtype(self) -> str:
        """Dtype as named in file headers."""
        return self.parts[0].dtype

    @property
    def nbytes(self) -> int:
        """Length in bytes."""
        return sum(part.nbytes for part in self.parts)

    @property
    def shape(self) -> tuple[int, int]:
        """Shape `(out_features, in_features)`."""
        rows, columns = sum(part.shape[0] for part in self.parts), self.parts[0].shape[1]
        return (columns, rows) if self.transposed else (rows, columns)

    def load(self) -> Tensor:
        """Return the matrix `(out_features, in_features)`: mapped if it is one slice, else in memory.

        Raises:
            FormatError: a file has become shorter.
        """
        parts = [load_slice(part) for part in self.parts]
        matrix = parts[0] if len(parts) == 1 else torch.cat(parts)
        return matrix.T if self.transposed else matrix
