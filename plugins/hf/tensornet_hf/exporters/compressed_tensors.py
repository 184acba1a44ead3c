"""Export integer layers as a compressed-tensors checkpoint, which transformers and vLLM can load.

In this format the weight of a linear layer becomes three tensors: `weight_packed`, codes of 2 to 8 bits as a
stream of bits for each row; `weight_scale`, a scale for each group of inputs; and `weight_shape`. Layers in
`mxfp4` and `nvfp4` have pairs of 4-bit numbers instead, and no shape. `nvfp4` also has a scale of the whole
matrix, which is 1 here. The package unpacks both to bfloat16. The configuration lists the layers of each
number format as a group. transformers cannot load packed embeddings.

In exported layers, the middle code always means zero. In int2 zero lies between two codes, so int2 becomes
int3; levels of a table become integers of 8 bits.
"""

import re
from collections.abc import Hashable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tensornet.errors import TargetError
from tensornet.nn.module import NetworkModule
from tensornet.quantization import NumberFormat
from tensornet.quantization.formats import FP4, FP4_LEVELS
from tensornet.quantization.menus import Menu
from tensornet_hf.exporters.base import IntegerMatrix, LowRank
from tensornet_hf.exporters.folder import (
    Packed,
    PackedModel,
    dense_matrices,
    lay_out_packed,
    pack_rows,
    write_adapter,
)
from tensornet_hf.file_sink import Files, PlannedModel

#: Layer types that are packed (see `tensornet.nn.layer_kinds`).
KINDS = ("linear", "part")
#: Sets of layers that vLLM fuses if they have the same parent module, so these need the same number format;
#: the last name is that of the fused layer.
_FUSED = (("q_proj", "k_proj", "v_proj", "qkv_proj"), ("gate_proj", "up_proj", "gate_up_proj"))
#: Regular expression for the names of experts' layers.
EXPERTS = r"re:.*\.experts\..*"


def _group(name: str, stack: str) -> Hashable:
    """Return a key that is equal for layers that need the same number format (see `Menu`).

    transformers unpacks all experts of a model in one number format.
    """
    if ".experts." in stack:
        return EXPERTS
    parent, _, child = name.rpartition(".")
    return stack or (parent, fused_names(child))


def fused_names(child: str) -> tuple[str, ...]:
    """Return the names of the layers that vLLM fuses with a layer, and of the result, or its own name."""
    return next((x for x in _FUSED if child in x), (child,))


#: Number formats that can be packed.
COMPRESSED_TENSORS_MENU = Menu(
    ("float", "int8", "int8:g128", "int6", "int5", "int4:g32", "int4", "int4:g128", "int3:g32"),
    on_request=tuple(FP4),
    group=_group,
)
#: How compressed-tensors calls the layout of integers, and that of other formats.
_LAYOUTS = {"mxfp4": "mxfp4-pack-quantized", "nvfp4": "nvfp4-pack-quantized"}
_PACKED, _MIXED = "pack-quantized", "mixed-precision"


def lay_out_compressed_tensors(planned: PlannedModel) -> Files:
    """Describe the files of a folder that transformers can load with the package `compressed-tensors`.

    A layer is packed if all of these conditions are true:

    - It replaces an `nn.Linear`, and is stored as a single matrix of integers.
    - Its group size divides the number of inputs, or each row has one scale.
    - Its scales are exact in the model's dtype.

    vLLM reads this format too if the projections that it fuses (query, key and value; gate and up) have the
    same number format, and if it has kernels for the format (see the menu "vllm").

    Raises:
        TargetError: no layer can be packed, or `networks="refuse"` forbids a layer; or only some of the
            experts can be packed, or not all of them have the same number format.
    """

    def check(found: PackedModel) -> None:
        check_experts(found, reader="transformers", target="compressed-tensors")
        found.stock.config.quantization_config = quantization_entry(found.packed, dense_matrices(found))

    return lay_out_packed(
        planned,
        _pack,
        kinds=KINDS,
        check=check,
        write_adapter=partial(write_peft_adapter, planned),
    )


def write_peft_adapter(planned: PlannedModel, found: PackedModel, folder: Path) -> None:
    """Write the low-rank parts of the layers of a model as a PEFT LoRA adapter."""
    parts = planned.model.named_modules()
    dtypes = {name: layer.dtype for name, layer in parts if isinstance(layer, NetworkModule)}
    write_adapter(folder, "adapter_model.safetensors", *peft_adapter(found.low_ranks, dtypes))


def check_experts(found: PackedModel, *, reader: str, target: str) -> None:
    """Raise TargetError if some experts are packed, but not all of them in one number format.

    Args:
        found: the packed model.
        reader: name of the program that needs this.
        target: name of the export target.
    """
    packed = {name: kind for name, kind in found.packed.items() if ".experts." in name}
    formats = sorted(set(packed.values()))
    dense = [name for name, x in found.state.items() if ".experts." in name and x.ndim == 3]
    if packed and (len(formats) > 1 or dense):
        others = [*formats[1:], *(f"{name} (dense: {why})" for name, why in list(found.dense.items())[:1])]
        raise TargetError(
            f"{reader} loads packed experts only if all matrices of all experts have one number format, "
            f"but this model has {formats[0]} and {', '.join(others) or dense[0]}. Plan it for this target "
            f"(CompressionConfig(formats={target!r})), leave all experts dense "
            "(exclude_modules='*experts*'), or export to gguf."
        )


def peft_adapter(
    low_ranks: Mapping[str, LowRank], dtypes: Mapping[str, torch.dtype]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Convert low-rank parts of layers to the tensors and the configuration of a PEFT LoRA adapter.

    Args:
        low_ranks: low-rank part of each layer by name.
        dtypes: dtype of each layer by name. A factor is stored in this dtype if the conversion is exact,
            otherwise in float32.
    """
    tensors = {}
    for name, (left, right, _) in low_ranks.items():
        for part, factor in (("lora_A", right), ("lora_B", left)):
            short = factor.to(dtypes[name])
            exact = torch.equal(short.to(factor.dtype), factor)
            tensors[f"base_model.model.{name}.{part}.weight"] = short if exact else factor
    # PEFT multiplies the product of a layer's factors by the alpha / rank of the layer. vLLM uses
    # `lora_alpha / r` for all layers, and takes ranks from the shapes. If alpha equals the rank, both are 1.
    ranks = {name: x.rank for name, x in low_ranks.items()}
    config = {
        "peft_type": "LORA",
        "inference_mode": True,
        "target_modules": list(ranks),
        "r": max(ranks.values()),
        "lora_alpha": max(ranks.values()),
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
    }
    return tensors, config


def quantization_entry(packed: Mapping[str, str], dense: Sequence[str]) -> dict[str, Any]:
    """Build the `quantization_config` of a checkpoint.

    Args:
        packed: number format of each packed layer by name.
        dense: names of other layers that have a matrix. vLLM needs them listed; SGLang takes a plain name for
            a part of names, so each becomes a whole pattern.
    """
    # transformers recognizes the group of the experts by a regular expression.
    targets: dict[tuple[str, bool], list[str]] = {}
    for layer, used in sorted(packed.items()):
        targets.setdefault((used, ".experts." in layer), []).append(layer)
    groups = {}
    for number, (name, experts) in enumerate(sorted(targets)):
        found = NumberFormat.parse(name)
        weights: dict[str, Any] = {"num_bits": found.bits, "type": "int", "symmetric": True}
        weights["strategy"] = "channel" if found.group is None else "group"
        if found.group is not None:
            weights["group_size"] = found.group
        if name in FP4:
            weights["type"] = "float"
            scales = {"mxfp4": ("group", "torch.uint8"), "nvfp4": ("tensor_group", "torch.float8_e4m3fn")}
            weights["strategy"], weights["scale_dtype"] = scales[name]
        groups[f"group_{number}"] = {
            "targets": [EXPERTS] if experts else targets[name, experts],
            "weights": weights,
            "format": _LAYOUTS.get(name, _PACKED),
        }
    layouts = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": layouts.pop() if len(layouts) == 1 else _MIXED,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [f"re:^{re.escape(name)}$" for name in dense],
    }


def _pack(matrix: IntegerMatrix, dtype: torch.dtype) -> Packed | str:
    """Return the number format and tensors of a packed layer, or the reason why it cannot be packed."""
    bits, group = matrix.number_format.bits, matrix.number_format.group
    assert bits is not None
    points, scales = matrix.points, matrix.scales
    rows, columns = points.shape
    if group is not None and columns % group:
        return f"groups of {group} do not divide {columns} inputs"
    if matrix.number_format.minima is not None:
        return "its groups have minima, which compressed-tensors has not"
    if (name := matrix.number_format.name) in FP4:
        if dtype != torch.bfloat16:
            return f"compressed-tensors unpacks {name} to bfloat16, but the model has {dtype}"
        signed = matrix.codes.to(torch.int8) - len(FP4_LEVELS) // 2
        codes = torch.where(signed < 0, 8 - signed, signed).to(torch.uint8)
        stored = (2 * scales).to(matrix.number_format.scales.dtype)  # the levels are twice the values
        tensors = {"weight_packed": codes[:, ::2] | codes[:, 1::2] << 4}
        if name == "mxfp4":
            return matrix.number_format, {**tensors, "weight_scale": stored.view(torch.uint8)}
        return matrix.number_format, {**tensors, "weight_scale": stored, "weight_global_scale": torch.ones(1)}
    if torch.any(points % 1):  # halve the scale, so that the half-integers of int2 become odd integers
        points, scales = 2 * points, scales / 2
    # Integers with zero in the middle may need more bits than the codes.
    least, most = int(points.min()), int(points.max())
    while least < -(2 ** (bits - 1)) or most >= 2 ** (bits - 1):
        bits += 1
    if bits > 8:
        return f"its weights are {least} to {most} times the scale, more than 8 bits allow (-128 to 127)"
    scale = scales.to(dtype)
    if not torch.equal(scale.to(scales.dtype), scales):
        return f"scales are not exact in {dtype}"
    tensors = {
        "weight_packed": pack_rows((points + 2 ** (bits - 1)).to(torch.uint8), bits),
        "weight_scale": scale,
        "weight_shape": torch.tensor([rows, columns]),
    }
    return NumberFormat.parse(f"int{bits}:{'row' if group is None else f'g{group}'}"), tensors
