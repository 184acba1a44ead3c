"""Export integer layers as a folder that `mlx-lm` can load.

In this format the weight of a linear layer or an embedding becomes three tensors: `weight`, codes as a stream
of bits for each row; and `scales` and `biases`, a number for each group of inputs. A weight is
`scale * code + bias`, so the code of zero becomes a bias `-scale * zero`. config.json lists the bits and the
group size of each layer.

Low-rank matrices that are added to integers become a LoRA adapter in the subfolder `lora`.
"""

import importlib.metadata
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2LMHeadModel, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tensornet._util import require
from tensornet.errors import TargetError
from tensornet.quantization import NumberFormat
from tensornet.quantization.menus import Menu
from tensornet_hf.checkpoint import read_json
from tensornet_hf.exporters.base import IntegerMatrix, LowRank, renamed_entries
from tensornet_hf.exporters.folder import (
    ADAPTER,
    Packed,
    PackedModel,
    Tensors,
    lay_out_packed,
    pack_rows,
    write_adapter,
)
from tensornet_hf.file_sink import DTYPES, Chunks, Files, Made, New, PlannedModel, tensor_bytes

#: Numbers of bits per code, and group sizes, that MLX supports.
BITS, GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)
#: Program that checks that mlx-lm can load a folder, without reading the weights. It runs in its own process,
#: because mlx-lm lowers the number of files that a process may open.
CHECK = """
import pathlib, sys
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model
try:
    model, _ = load_model(pathlib.Path(sys.argv[1]), lazy=True)
    for folder in sys.argv[2:]:
        load_adapters(model, folder)
except Exception as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


def _num_bytes(number_format: NumberFormat, shape: Sequence[int], dtype: torch.dtype) -> int:
    """Return the bytes of a matrix; integers take 32-bit words, and a scale and a bias for each group."""
    if number_format.bits is None:
        return number_format.nbytes(shape, dtype)
    rows, columns = shape
    words_per_row = math.ceil(columns * number_format.bits / 32)
    return rows * (4 * words_per_row + 2 * number_format.groups(columns) * dtype.itemsize)


#: Number formats that MLX stores exactly if the model has a 16-bit dtype.
MLX_MENU = Menu(
    (
        "float",
        "int8",
        "int6",
        "int5",
        "int4:g32",
        "int4",
        "int4:g128",
        "int3:g32",
        "int3",
        "int3:g128",
        "int2:g32:float8",
        "int2:float8",
    ),
    _num_bytes,
    whole_model=True,
)


def packed_kinds(model: PreTrainedModel) -> tuple[str, ...]:
    """Return the layer types that can be packed in this model (see `tensornet.nn.layer_kinds`)."""
    return ("linear", "embedding", "part", *(["conv1d"] if isinstance(model, GPT2LMHeadModel) else []))


def lay_out_mlx(planned: PlannedModel) -> Files:
    """Describe the files of a folder that `mlx-lm` can load; see `tensornet_hf.export`.

    A linear layer or an embedding is packed if it is stored as a single matrix of integers of 2, 3, 4, 5, 6
    or 8 bits, and its number of inputs is a multiple of the group size of 32, 64 or 128. Scales and biases
    have the dtype of the model if it represents their values exactly. Otherwise they are float32, and MLX
    computes in float32 from this layer on.

    Raises:
        TargetError: no layer can be packed, `networks="refuse"` forbids a layer, or mlx-lm cannot load this
            architecture.
        MissingDependencyError: mlx-lm is not installed.
    """
    require(("mlx_lm", "mlx"), extra="export", user="Writing for MLX")
    return lay_out_packed(
        planned,
        _pack,
        kinds=packed_kinds(planned.model),
        packs_tied=True,
        arrange=_names_of_gpt2 if isinstance(planned.model, GPT2LMHeadModel) else _joined_experts,
        complete=_complete,
        write_adapter=lambda found, folder: write_adapter(
            folder, "adapters.safetensors", *mlx_adapter(found.low_ranks)
        ),
    )


def _names_of_gpt2(found: PackedModel, tensors: Tensors) -> tuple[PackedModel, Tensors]:
    """Give the tensors and layers of a GPT-2 their names in mlx-lm, and transpose its dense matrices.

    mlx-lm transposes dense matrices under the names of the published GPT-2 ("h.0.attn..."). Under the names
    of its own model ("model.h.0.attn...") it expects all matrices as (out, in).
    """
    turned = {
        f"{name}.weight"
        for name, module in found.stock.named_modules()
        if isinstance(module, Conv1D) and name not in found.packed
    }

    def arranged(chunks: Mapping[str, Chunks]) -> dict[str, Chunks]:
        return {
            name_in_gpt2(name): partial(_transposed, x, *tensors.facts[name][:2]) if name in turned else x
            for name, x in chunks.items()
        }

    facts = {
        name_in_gpt2(name): (dtype, shape[::-1] if name in turned else shape, nbytes)
        for name, (dtype, shape, nbytes) in tensors.facts.items()
    }
    made = [
        Made(layers, tuple(map(name_in_gpt2, names)), partial(_made_and, arranged, make))
        for layers, names, make in tensors.made
    ]
    found = found._replace(
        packed={name_in_gpt2(x): y for x, y in found.packed.items()},
        dense={name_in_gpt2(x): y for x, y in found.dense.items()},
        low_ranks={name_in_gpt2(x): y for x, y in found.low_ranks.items()},
    )
    return found, Tensors(facts, made, arranged(tensors.copied))


def _made_and(
    change: Callable[[Mapping[str, Chunks]], dict[str, Chunks]],
    make: Callable[[New], Mapping[str, Chunks]],
    new: New,
) -> dict[str, Chunks]:
    return change(make(new))


def name_in_gpt2(name: str) -> str:
    """Return the name of a GPT-2 tensor or layer in mlx-lm."""
    return name.replace("transformer.", "model.", 1)


#: Checkpoint name of a layer of an expert, or of one of its tensors.
EXPERT = re.compile(r"(.*)\.experts\.(\d+)\.(\w+)(\.\w+)?")
#: Names of the layers of Mixtral's experts in MLX.
_PROJECTIONS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def name_in_stack(name: str) -> str:
    """Return the name that a layer of an expert, or one of its tensors, has in MLX's stack `switch_mlp`.

    Other names are returned unchanged.
    """
    if (match := EXPERT.fullmatch(name)) is None:
        return name
    parent, _, layer, tensor = match.groups()
    return f"{parent}.switch_mlp.{_PROJECTIONS.get(layer, layer)}{tensor or ''}"


def _joined_experts(found: PackedModel, tensors: Tensors) -> tuple[PackedModel, Tensors]:
    """Join the tensors of experts to the stacks of MLX; if none is packed, mlx-lm joins them itself."""
    packed = {name_in_stack(name): kind for name, kind in found.packed.items()}
    if packed == found.packed:
        return found, tensors
    members: dict[str, dict[int, str]] = {}
    for name in tensors.facts:
        match = EXPERT.fullmatch(name)
        members.setdefault(name_in_stack(name), {})[0 if match is None else int(match[2])] = name

    def joined(chunks: Mapping[str, Chunks]) -> dict[str, Chunks]:
        """Chain the bytes of the experts, in order."""
        stacks = {stack: [x for _, x in sorted(names.items())] for stack, names in members.items()}
        return {
            stack: partial(_chained, [chunks[x] for x in names])
            for stack, names in stacks.items()
            if names[0] in chunks
        }

    facts = {}
    for stack, names in members.items():
        dtype, shape, nbytes = tensors.facts[names[min(names)]]
        one = stack in tensors.facts
        facts[stack] = dtype, shape if one else (len(names), *shape), nbytes * len(names)
    made = [
        Made(layers, tuple(dict.fromkeys(map(name_in_stack, names))), partial(_made_and, joined, make))
        for layers, names, make in tensors.made
    ]
    return found._replace(packed=packed), Tensors(facts, made, joined(tensors.copied))


def _chained(parts: Sequence[Chunks]) -> Iterator[Any]:
    for part in parts:
        yield from part()


def _transposed(chunks: Chunks, dtype: str, shape: tuple[int, ...]) -> Iterator[Any]:
    data = bytearray().join(chunks())
    yield from tensor_bytes(torch.frombuffer(data, dtype=DTYPES[dtype]).reshape(shape).T)()


def _complete(found: PackedModel, folder: Path) -> None:
    """Complete config.json of a folder, and check that mlx-lm can load the folder.

    Raises:
        TargetError: mlx-lm cannot load this architecture.
    """
    formats = {name: NumberFormat.parse(kind) for name, kind in found.packed.items()}
    each = {name: {"group_size": x.group, "bits": x.bits} for name, x in formats.items()}
    default = max(each.values(), key=list(each.values()).count)
    file = folder / "config.json"
    config = {**_full_config(found.stock.config), **read_json(file), "quantization": {**default, **each}}
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    check = [sys.executable, "-c", CHECK, str(folder), *map(str, folder.glob(ADAPTER))]
    run = subprocess.run(check, capture_output=True, text=True, check=False)
    if run.returncode:
        raise TargetError(
            f"mlx-lm {importlib.metadata.version('mlx-lm')} cannot load this {type(found.stock).__name__}: "
            f"{run.stderr.strip()[-500:]} Export to gguf or compressed-tensors. A newer mlx-lm helps "
            "only if this one does not know the architecture."
        )


def mlx_adapter(low_ranks: Mapping[str, LowRank]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Convert low-rank parts of layers to the tensors and the configuration of an adapter for `mlx-lm`.

    All layers of such an adapter have the same rank, so factors of lower rank are padded with zeros.
    """
    rank = max(x.rank for x in low_ranks.values())
    tensors = {}
    for name, (left, right, _) in low_ranks.items():
        padding = rank - len(right)
        tensors[f"{name}.lora_a"] = torch.nn.functional.pad(right.T, (0, padding))
        tensors[f"{name}.lora_b"] = torch.nn.functional.pad(left.T, (0, 0, 0, padding))
    # Keys are full names of layers, which mlx-lm finds for any `num_layers`.
    parameters = {"rank": rank, "scale": 1.0, "dropout": 0.0, "keys": list(low_ranks)}
    return tensors, {"fine_tune_type": "lora", "num_layers": -1, "lora_parameters": parameters}


def _full_config(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the entries of config.json that mlx-lm reads, with default values and under their old names.

    transformers omits entries that have its default values, but the defaults of mlx-lm can differ.
    transformers 5 has also renamed some entries.
    """
    entries: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    entries.pop("_name_or_path", None)  # the path of the dense model on this machine
    rope = entries.get("rope_parameters") or {}
    full = rope.get("full_attention", rope)
    for name in ("rope_theta", "partial_rotary_factor"):
        if name in full:
            entries[name] = full[name]
    if "rope_theta" in full:
        entries["rotary_emb_base"] = full["rope_theta"]  # the name in GPT-NeoX
    if full.get("rope_type", "default") != "default":
        entries["rope_scaling"] = {**full, "type": full["rope_type"]}
    if "sliding_attention" in rope:
        entries["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    return entries | renamed_entries(config)


def _pack(matrix: IntegerMatrix, dtype: torch.dtype) -> Packed | str:
    """Return the number format and tensors of a packed layer, or the reason why it cannot be packed."""
    codes, scales, zeros, number_format = matrix.codes, matrix.scales, matrix.zeros, matrix.number_format
    bits, group, columns = number_format.bits, number_format.group, codes.shape[1]
    if bits not in BITS or group not in GROUPS or not number_format.points.equal_steps:
        return f"stored as {number_format.name}; MLX has 2, 3, 4, 5, 6 and 8 bits in groups of 32, 64 and 128"
    if columns % group:
        return f"groups of {group} do not divide {columns} inputs"
    biases = -scales.double() * zeros if matrix.minima is None else -matrix.minima.double()
    exact = {"scales": scales.double(), "biases": biases}
    for kind in (dtype, torch.float32):
        tensors = {name: x.to(kind) for name, x in exact.items()}
        if all(torch.equal(tensors[name].double(), x) for name, x in exact.items()):
            return NumberFormat.parse(f"int{bits}:g{group}"), {
                "weight": pack_rows(codes, bits).view(torch.uint32),
                **tensors,
            }
    return f"scales and biases are not exact in {dtype} and float32"
