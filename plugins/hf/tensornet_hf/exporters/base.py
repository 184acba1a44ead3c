"""Parts that all exporters share: the integers of a layer, and the report of an export."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from tensornet.errors import DestinationError
from tensornet.io import check_place
from tensornet.nn.module import NetworkModule
from tensornet.nn.storage import PackedCore
from tensornet.quantization import NumberFormat
from tensornet.quantization.formats import unpack
from tensornet_hf.report import compact_bytes

#: Suffix of the files of llama.cpp.
GGUF = ".gguf"


def check_new_file(path: Path, *, force: bool) -> None:
    """Check that a file may be written, before any work is done.

    Raises:
        DestinationError: it exists and `force` is not set, or cannot be written.
    """
    if path.is_dir() or (path.exists() and not force):
        raise DestinationError(
            f"{path} exists already. Choose another name, or replace a file with force=True (--force)."
        )
    check_place("The model", path)


def renamed_entries(config: PreTrainedConfig) -> dict[str, Any]:
    """Collect entries of a configuration that other packages read and transformers 5 has renamed."""
    rope = getattr(config, "rope_parameters", None) or {}
    found = {"n_ctx": getattr(config, "n_positions", None), "rotary_pct": rope.get("partial_rotary_factor")}
    return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True)
class ExportReport:
    """Report of an export: what was packed, and what was written dense and why.

    Args:
        destination: the file or folder.
        packed: type of every tensor or layer that was packed, by its name in the destination.
        dense: reason for every compressed layer or tensor that was written dense, by name.
        num_bytes: size of the weight files.

    Example:
        >>> from pathlib import Path
        >>> from tensornet_hf.exporters.base import ExportReport
        >>> print(ExportReport(Path("out"), packed={"lm_head": "int8"}, dense={}, num_bytes=1000))
        1 tensors packed (1 int8), 0 written dense, 1.00 kB: out
    """

    destination: Path
    packed: dict[str, str]
    dense: dict[str, str]
    num_bytes: int

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {kind}" for kind, count in Counter(self.packed.values()).items())
        first = (
            f"{len(self.packed)} tensors packed ({counts}), {len(self.dense)} written dense, "
            f"{compact_bytes(self.num_bytes)}: {self.destination}"
        )
        return "\n".join([first, *(f"dense: {name}: {why}" for name, why in self.dense.items())])


class IntegerMatrix(NamedTuple):
    """Weight of a layer, stored as one matrix of integers: `scale * (code - zero)` or `scale * level[code]`.

    Args:
        codes: uint8, shape `(out, in)`.
        scales: float32, shape `(out, groups)`.
        zeros: float32 of the same shape; may be half-integers.
        number_format: the format.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    number_format: NumberFormat

    @property
    def points(self) -> Tensor:
        """Multiples of the scales, `code - zero` or levels, float32, shape `(out, in)`."""
        if (levels := self.number_format.levels(self.scales)) is not None:
            return levels.values[self.codes.long()]
        return self.codes.float() - self.number_format.spread(self.zeros, self.codes.shape[1])

    @property
    def spread_scales(self) -> Tensor:
        """Scale of every element, float32, shape `(out, in)`."""
        return self.number_format.spread(self.scales, self.codes.shape[1]).contiguous()


def integer_matrix(layer: NetworkModule) -> IntegerMatrix | str:
    """Return the integers of a layer, or in a few words why it is not one matrix of integers.

    Example:
        >>> from tensornet_hf.exporters.base import integer_matrix
        >>> integer_matrix(tn.nn.MPOLinear(16, 16, max_bond=2))
        "a network of the family 'mpo', not one matrix"
    """
    topology = layer.topology
    legs = (*topology.out_labels, *topology.in_labels)
    if [core.labels for core in topology.cores] != [legs] or topology.shape != topology.padded_shape:
        return f"a network of the family {topology.family!r}, not one matrix"
    (core,) = layer.stored_cores
    number_format = layer.storage.format_of(topology.core_names[0])
    if not isinstance(core, PackedCore) or number_format.bits is None:
        return f"stored as {number_format.name}, not as integers"
    scales = core.scale_values.float()
    zeros = torch.full_like(scales, number_format.center)
    if "zeros" in core.names:
        zeros = unpack(core.zeros, number_format.bits, scales.shape[-1]).float()
    return IntegerMatrix(number_format.unpack(core.codes, core.columns), scales, zeros, number_format)
