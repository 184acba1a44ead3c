"""Unpack the matrices in folders for MLX, GPTQ and compressed-tensors, as the programs that load them do.

The functions follow the published layouts, and read the number of bits and the group size from config.json.
They share no code with the functions that pack, so that a comparison with the dense model also finds errors
of those.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tensornet.errors import FormatError, TargetError
from tensornet.io import Slice, load_slice, read_headers
from tensornet_hf.checkpoint import read_json, weight_files

#: Number of codes that are unpacked at a time; each takes 8 bytes meanwhile.
_CHUNK = 1 << 22
#: Values of the 4-bit floating-point numbers (E2M1) of the OCP Microscaling specification, by their code.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)

#: Part of the names of MLX's stacks of experts.
_STACK = ".switch_mlp."


class PackedMatrix(NamedTuple):
    """A packed matrix in the files of a folder.

    Args:
        layer: name of the layer.
        parts: location of each of its tensors, by the last part of its name, such as `scales`.
        target: name of the export target that has this layout, one of `LAYOUTS`.
        config: content of config.json.
        number: place of the matrix, if the tensors are those of a stack of matrices.
    """

    layer: str
    parts: Mapping[str, Slice]
    target: str
    config: Mapping[str, Any]
    number: int | None = None

    def unpacked(self) -> tuple[Tensor, str]:
        """Return the matrix in float32, shape `(out, in)`, and a description of its number format.

        Raises:
            FormatError: config.json does not describe the layer, or a tensor is missing or contradicts it.
        """
        return LAYOUTS[self.target][-1](self)

    def tensor(self, part: str) -> Tensor:
        """Read one of the tensors of the matrix, by the last part of its name."""
        if part not in self.parts:
            raise FormatError(f"{self.layer} is packed, but the tensor {self.layer}.{part} is missing.")
        found = self.parts[part]
        if found.dtype == "F8_E4M3":  # scales of nvfp4
            whole = load_slice(replace(found, dtype="U8")).view(torch.float8_e4m3fn)
        else:
            whole = load_slice(found)
        return whole if self.number is None else whole[self.number]

    def codes(self, words: Tensor, bits: int, columns: int) -> Tensor:
        """Unpack the codes of rows of 32-bit words, whose bits form one stream per row, lowest bits first.

        Args:
            words: shape `(rows, words)`.
            bits: bits of a code, 2 to 8.
            columns: number of codes of a row.

        Returns:
            `torch.uint8`, shape `(rows, columns)`.

        Raises:
            FormatError: the number of words is not that of the codes.
        """
        if words.shape[1] != -(-columns * bits // 32):
            raise self.contradiction(
                f"rows have {words.shape[1]} words of 32 bits, not those of {columns} codes of {bits} bits"
            )
        first = torch.arange(columns) * bits  # place of the lowest bit of each code in the stream
        word, shift = first // 32, first % 32
        following = (word + 1).clamp(max=words.shape[1] - 1)  # has the high bits of codes that are divided
        found = []
        for some in words.contiguous().view(torch.int32).split(max(1, _CHUNK // columns)):
            wide = some.long() & 0xFFFFFFFF
            both = wide[:, word] | wide[:, following] << 32
            found.append((both >> shift & (2**bits - 1)).to(torch.uint8))
        return torch.cat(found)

    def spread(self, scales: Tensor, group: int, columns: int) -> Tensor:
        """Repeat the scales of groups, shape `(rows, groups)`, for each of the columns of a group.

        Raises:
            FormatError: the number of groups is not that of the columns.
        """
        if scales.ndim != 2 or scales.shape[1] * group != columns:
            raise self.contradiction(
                f"scales have shape {list(scales.shape)}, but rows have {columns} inputs in groups of {group}"
            )
        return scales.float().repeat_interleave(group, dim=1)

    def contradiction(self, what: str) -> FormatError:
        """Return the error for tensors that are not those that config.json describes."""
        return FormatError(f"{self.layer} is not packed as config.json says: {what}.")


def written_tensors(folder: Path, target: str) -> dict[str, Callable[[], tuple[Tensor, str]]]:
    """Find the matrices and the other tensors in a folder; nothing is read before it is needed.

    Args:
        folder: the folder.
        target: name of the export target that wrote it, one of `LAYOUTS`.

    Returns:
        By name, a function that returns the tensor, and a description of its number format. A packed matrix
        has the name that it would have if it were dense, `LAYER.weight`. Matrices in MLX's stacks of experts
        have names such as `LAYER.weight[3]`.

    Raises:
        FormatError: a file is missing or damaged.
    """
    stored, config = read_headers(weight_files(folder)[0]), read_json(folder / "config.json")
    mark, names, _ = LAYOUTS[target]
    marks = {name.rpartition(".")[0] for name in stored if name.endswith(f".{mark}")}
    packed: dict[str, dict[str, Slice]] = {layer: {} for layer in marks}
    found: dict[str, Callable[[], tuple[Tensor, str]]] = {}
    for name, part in stored.items():
        layer, _, last = name.rpartition(".")
        if layer in packed and last in names:
            packed[layer][last] = part
        elif target == "mlx" and _STACK in name:
            found |= {f"{name}[{k}]": partial(_dense, part, k) for k in range(part.shape[0])}
        else:
            found[name] = partial(_dense, part, None)
    for layer, parts in packed.items():
        matrix = PackedMatrix(layer, parts, target, config)
        if target == "mlx" and _STACK in layer:
            for k in range(parts[mark].shape[0]):
                found[f"{layer}.weight[{k}]"] = matrix._replace(number=k).unpacked
        else:
            found[f"{layer}.weight"] = matrix.unpacked
    return found


def _dense(part: Slice, number: int | None) -> tuple[Tensor, str]:
    whole = load_slice(part)
    return whole if number is None else whole[number], part.dtype


def _mlx(matrix: PackedMatrix) -> tuple[Tensor, str]:
    """Unpack `scale * code + bias`."""
    entry = matrix.config.get("quantization") or {}
    own = entry.get(matrix.layer, entry)
    if not isinstance(own, dict) or not {"bits", "group_size"} <= own.keys():
        raise FormatError(f"{matrix.layer} is packed, but config.json has no bits and group_size for it.")
    bits, group = own["bits"], own["group_size"]
    scales, biases = matrix.tensor("scales"), matrix.tensor("biases")
    columns = scales.shape[-1] * group
    codes = matrix.codes(matrix.tensor("weight"), bits, columns)
    values = matrix.spread(scales, group, columns) * codes + matrix.spread(biases, group, columns)
    return values, f"{bits} bits, groups of {group}"


def _gptq(matrix: PackedMatrix) -> tuple[Tensor, str]:
    """Unpack `scale * (code - (zero + 1))`; codes are packed along the inputs, zeros along the outputs."""
    entry = matrix.config.get("quantization_config") or {}
    own = dict(entry)
    for pattern, changed in (entry.get("dynamic") or {}).items():  # the first that matches counts
        sign, _, expression = pattern.partition(":")
        if re.match(expression, matrix.layer):
            if sign == "-":
                raise FormatError(f"{matrix.layer} is packed, but config.json calls it dense ({pattern}).")
            own |= changed
            break
    if not {"bits", "group_size"} <= own.keys():
        raise FormatError(f"{matrix.layer} is packed, but config.json has no bits and group_size for it.")
    bits, words, scales = own["bits"], matrix.tensor("qweight"), matrix.tensor("scales").T
    columns, rows = words.shape[0] * 32 // bits, words.shape[1]
    group = columns if own["group_size"] == -1 else own["group_size"]
    if matrix.tensor("g_idx").tolist() != [column // group for column in range(columns)]:
        raise matrix.contradiction(f"g_idx is not that of {columns} inputs in groups of {group}")
    zeros = matrix.codes(matrix.tensor("qzeros"), bits, rows).T + 1.0
    points = matrix.codes(words.T, bits, columns) - matrix.spread(zeros, group, columns)
    return points * matrix.spread(scales, group, columns), f"{bits} bits, groups of {group}"


def _compressed_tensors(matrix: PackedMatrix) -> tuple[Tensor, str]:
    """Unpack integers with zero in the middle times scales, or pairs of 4-bit floating-point numbers."""
    entry = matrix.config.get("quantization_config") or {}
    groups = [
        x
        for x in (entry.get("config_groups") or {}).values()
        if any(_is_target(target, matrix.layer) for target in x["targets"])
    ]
    if not groups:
        raise FormatError(f"{matrix.layer} is packed, but config.json has no group for it.")
    weights, layout = groups[0]["weights"], groups[0]["format"]
    bits, group = weights["num_bits"], weights.get("group_size")
    packed, scales = matrix.tensor("weight_packed"), matrix.tensor("weight_scale")
    if layout in ("mxfp4-pack-quantized", "nvfp4-pack-quantized"):
        codes = torch.stack([packed & 15, packed >> 4], -1).flatten(1)  # the low bits come first
        if layout.startswith("mxfp4"):  # scales are powers of two, stored as exponents (E8M0)
            scales = torch.ldexp(torch.ones(scales.shape), scales.int() - 127)
        else:
            scales = scales.float() / matrix.tensor("weight_global_scale")
        values = torch.tensor(_E2M1)[codes.int()]
        return values * matrix.spread(scales, group, values.shape[1]), layout.partition("-")[0]
    if layout != "pack-quantized" or not weights["symmetric"]:
        raise TargetError(f"{matrix.layer} is packed in another layout ({layout}) than those that are known.")
    rows, columns = matrix.tensor("weight_shape").tolist()
    group = columns if weights["strategy"] == "channel" else group
    points = matrix.codes(packed, bits, columns) - 2.0 ** (bits - 1)
    if len(points) != rows:
        raise matrix.contradiction(f"{len(points)} rows are packed, but weight_shape says {rows}")
    return points * matrix.spread(scales, group, columns), f"{bits} bits, groups of {group}"


def _is_target(target: str, layer: str) -> bool:
    """Return True if a target of a group, which may be a regular expression, is the name of a layer."""
    prefix, _, expression = target.partition("re:")
    return target == layer or (not prefix and re.match(expression, layer) is not None)


#: For each target: the tensor that only packed matrices have, the names of all of their tensors, and the
#: function that unpacks them.
LAYOUTS: dict[str, tuple[str, tuple[str, ...], Callable[[PackedMatrix], tuple[Tensor, str]]]] = {
    "mlx": ("scales", ("weight", "scales", "biases"), _mlx),
    "gptq": ("qweight", ("qweight", "scales", "qzeros", "g_idx"), _gptq),
    "compressed-tensors": (
        "weight_packed",
        ("weight_packed", "weight_scale", "weight_shape", "weight_global_scale"),
        _compressed_tensors,
    ),
}
