"""Export integer layers as a folder in GPTQ's format, which ONNX Runtime GenAI and vLLM can load.

The weight of a linear layer of `rows` outputs and `columns` inputs becomes four tensors:

- `qweight`: codes of 4 or 8 bits in 32-bit words along the inputs, shape `(columns * bits / 32, rows)`.
- `scales`: float16, a scale for each group of inputs, shape `(columns / group, rows)`.
- `qzeros`: the code of zero minus one, in 32-bit words along the outputs.
- `g_idx`: the group of each input, shape `(columns,)`.

The code of GPTQ (Frantar et al., ICLR 2023) stored layers so; the folder does not say how they were rounded.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from tensornet.quantization import NumberFormat
from tensornet_hf.exporters.base import IntegerMatrix
from tensornet_hf.exporters.compressed_tensors import (
    COMPRESSED_TENSORS_MENU,
    check_experts,
    fused_names,
    write_peft_adapter,
)
from tensornet_hf.exporters.folder import Packed, PackedModel, dense_matrices, lay_out_packed, pack_rows
from tensornet_hf.file_sink import Files, PlannedModel

#: Layer types that are packed (see `tensornet.nn.layer_kinds`).
KINDS = ("linear", "part")
#: Numbers of bits that a code may have.
BITS = (4, 8)


def _num_bytes(number_format: NumberFormat, shape: Sequence[int], dtype: torch.dtype) -> int:
    """Compute the bytes of codes, of the scales and zeros of groups, and of the groups of the inputs."""
    if number_format.bits is None:
        return number_format.nbytes(shape, dtype)
    rows, columns = shape
    groups, bits = number_format.groups(columns), number_format.bits
    return (rows * columns * bits + groups * rows * (16 + bits)) // 8 + 4 * columns


#: Number formats that can be packed. ONNX Runtime GenAI needs each linear layer of a block packed, so plans
#: leave none of them dense.
GPTQ_MENU = replace(
    COMPRESSED_TENSORS_MENU,
    formats=("int8", "int8:g128", "int4:g32", "int4", "int4:g128"),
    on_request=(),
    num_bytes=_num_bytes,
)


def lay_out_gptq(planned: PlannedModel) -> Files:
    """Describe the files of a folder in GPTQ's format.

    A layer is packed if all of these conditions are true:

    - It replaces an `nn.Linear`, and is stored as a single matrix of integers.
    - Its group size divides the number of inputs, or each row has one scale; its number of outputs is a
      multiple of 8.
    - Its scales are exact in float16.

    Raises:
        TargetError: no layer can be packed, or `networks="refuse"` forbids a layer; or only some of the
            experts can be packed, or not all of them have the same number format.
    """

    def check(found: PackedModel) -> None:
        check_experts(found, reader="vLLM", target="gptq")
        found.stock.config.quantization_config = quantization_entry(found.packed, dense_matrices(found))

    adapter = partial(write_peft_adapter, planned)
    return lay_out_packed(planned, _pack, kinds=KINDS, check=check, write_adapter=adapter)


def quantization_entry(packed: Mapping[str, str], dense: Sequence[str]) -> dict[str, Any]:
    """Build the `quantization_config` of a folder.

    Args:
        packed: number format of each packed layer by name.
        dense: names of other layers that have a matrix.

    Returns:
        The most frequent number of bits and group size, and under `dynamic` regular expressions for layers
        with others ("+:") or with dense weights ("-:"). Runtimes match them from the start of the name of a
        layer or of one of its tensors. vLLM asks for the layer into which it fuses query, key and value, or
        gate and up, and for all experts of a block at once.
    """
    kinds: dict[str, tuple[int, int] | None] = {name: None for name in dense if name != "lm_head"}
    for name, stored in packed.items():
        found = NumberFormat.parse(stored)
        assert found.bits is not None
        kinds[name] = found.bits, -1 if found.group is None else found.group
    together: dict[str, set[tuple[int, int] | None]] = {}
    for name, kind in kinds.items():
        together.setdefault(_pattern(name), set()).add(kind)
    # Layers that vLLM would fuse, but that are stored in different ways, have an entry each.
    patterns = {
        _pattern(name) if len(together[_pattern(name)]) == 1 else re.escape(name) + r"(\.|$)": kind
        for name, kind in kinds.items()
    }
    usual = Counter(kind for kind in patterns.values() if kind is not None).most_common(1)[0][0]
    dynamic: dict[str, dict[str, int]] = {
        f"+:{pattern}": {"bits": kind[0], "group_size": kind[1]}
        for pattern, kind in sorted(patterns.items())
        if kind is not None and kind != usual
    }
    dynamic |= {f"-:{pattern}": {} for pattern, kind in patterns.items() if kind is None}
    return {
        "quant_method": "gptq",
        "bits": usual[0],
        "group_size": usual[1],
        "sym": True,
        "desc_act": False,
        "checkpoint_format": "gptq",
        "lm_head": "lm_head" in packed,
        "dynamic": dynamic,
    }


def _pattern(name: str) -> str:
    """Return a regular expression for a layer and for those that vLLM fuses it with."""
    if ".experts." in name:
        return re.escape(name.partition(".experts.")[0]) + r"\.experts(\.|$)"
    parent, dot, child = name.rpartition(".")
    names = "|".join(map(re.escape, fused_names(child)))
    return re.escape(parent + dot) + rf"({names})(\.|$)"


def _pack(matrix: IntegerMatrix, dtype: torch.dtype) -> Packed | str:
    """Return the number format and tensors of a packed layer, or the reason why it cannot be packed."""
    group = matrix.number_format.group
    if matrix.number_format.minima is not None:
        return "its groups have minima, which are not multiples of their scales"
    points, scales = matrix.points, matrix.scales
    rows, columns = points.shape
    group = columns if group is None else group
    if columns % group or columns % 8:
        return f"groups of {group}, in words of 8 codes, do not divide {columns} inputs"
    if rows % 8:
        return f"words of 8 codes do not divide {rows} outputs"
    if torch.any(points % 1):  # halve the scale, so that the half-integers of int2 become odd integers
        points, scales = 2 * points, scales / 2
    least, most = int(points.min()), int(points.max())
    bits = next((x for x in BITS if -(2 ** (x - 1)) <= least and most < 2 ** (x - 1)), None)
    if bits is None:
        return f"its weights are {least} to {most} times the scale, more than 8 bits allow (-128 to 127)"
    stored = scales.to(torch.float16)
    if not torch.equal(stored.to(scales.dtype), scales):
        return "its scales are not exact in float16"
    zero = 2 ** (bits - 1)
    tensors = {
        "qweight": pack_rows((points + zero).to(torch.uint8), bits).T.contiguous(),
        "qzeros": pack_rows(torch.full((columns // group, rows), zero - 1, dtype=torch.uint8), bits),
        "scales": stored.T.contiguous(),
        "g_idx": torch.arange(columns, dtype=torch.int32) // group,
    }
    name = "row" if matrix.number_format.group is None else f"g{group}"
    return NumberFormat.parse(f"int{bits}:{name}"), tensors
