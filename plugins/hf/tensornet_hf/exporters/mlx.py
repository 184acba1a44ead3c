"""Export integer layers as a folder that `mlx-lm` loads.

In that format the weight of a linear layer or an embedding becomes three tensors: `weight`, codes as one
stream of bits for each row; and `scales` and `biases`, two numbers for each group of inputs, so that a weight
is `scale * code + bias`. Our zero points (between two codes for int2) become biases `-scale * zero`. Bits and
groups of each layer are in config.json.
"""

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2LMHeadModel, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tensornet._util import require
from tensornet.errors import TargetError
from tensornet.quantization import NumberFormat
from tensornet_hf.checkpoint import check_free, read_json, weight_bytes
from tensornet_hf.exporters.base import ExportReport, IntegerMatrix, renamed_entries
from tensornet_hf.exporters.folder import Packed, model_folder, packed_model, words

#: Bits of codes and sizes of groups that MLX has.
BITS, GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)
#: Loads names and shapes of a folder, as mlx-lm does, without reading the numbers. It runs in a process of
#: its own, because mlx-lm lowers the number of files that a process may open.
CHECK = """
import pathlib, sys
from mlx_lm.utils import load_model
try:
    load_model(pathlib.Path(sys.argv[1]), lazy=True)
except Exception as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


def packed_kinds(model: PreTrainedModel) -> tuple[str, ...]:
    """List the kinds of layers that are packed, see `tensornet.nn.layer_kinds`."""
    return ("linear", "embedding", *(["conv1d"] if isinstance(model, GPT2LMHeadModel) else []))


@torch.no_grad()
def export_mlx(
    model: PreTrainedModel, destination: Path, *, source: Path | None = None, force: bool = False
) -> ExportReport:
    """Write a folder that `mlx-lm` loads; see `tensornet_hf.export`.

    A layer is packed if it is a linear layer or an embedding that is stored as one matrix of integers of 2,
    3, 4, 5, 6 or 8 bits, in groups of 32, 64 or 128 that divide the inputs. Scales and biases have the dtype
    of the model if that is exact, else float32; MLX then computes in float32 from this layer on.

    Args:
        model: a compressed model; it is not changed.
        destination: the new folder.
        source: folder whose tokenizer and other small files are copied.
        force: replace an existing model folder.

    Raises:
        DestinationError: it exists already, is the source, or cannot be written; no new files are left.
        TargetError: no layer can be packed, or mlx-lm cannot load this architecture.
        MissingDependencyError: mlx-lm is not installed.
    """
    require(("mlx_lm", "mlx"), extra="export", user="Writing for MLX")
    check_free(destination, force=force, sources=() if source is None else (source,))
    stock, state, packed, dense = packed_model(model, _pack, kinds=packed_kinds(model), packs_tied=True)
    if isinstance(model, GPT2LMHeadModel):
        # mlx-lm turns matrices of the GPT-2 that OpenAI published, without a head, to `(out, in)`, but not
        # packed ones. Those with the names of its own model it takes as they are.
        for name, module in stock.named_modules():
            if isinstance(module, Conv1D) and name not in packed:
                state[f"{name}.weight"] = state[f"{name}.weight"].T.contiguous()
        state = {x.replace("transformer.", "model.", 1): tensor for x, tensor in state.items()}
        packed, dense = (
            {x.replace("transformer.", "model.", 1): text for x, text in names.items()}
            for names in (packed, dense)
        )
    formats = {name: NumberFormat.parse(kind) for name, kind in packed.items()}
    each = {name: {"group_size": x.group, "bits": x.bits} for name, x in formats.items()}
    default = max(each.values(), key=list(each.values()).count)
    with model_folder(stock, state, destination, source=source, force=force) as folder:
        file = folder / "config.json"
        config = {**_full_config(stock.config), **read_json(file), "quantization": {**default, **each}}
        file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        found = subprocess.run(
            [sys.executable, "-c", CHECK, str(folder)], capture_output=True, text=True, check=False
        )
        if found.returncode:
            raise TargetError(
                f"mlx-lm {importlib.metadata.version('mlx-lm')} cannot load this {type(model).__name__}: "
                f"{found.stderr.strip()[-500:]} Update it, or export to another target."
            )
    return ExportReport(destination, packed, dense, weight_bytes(destination))


def _full_config(config: PreTrainedConfig) -> dict[str, Any]:
    """Collect what mlx-lm reads from config.json: also defaults, and entries that transformers 5 has renamed.

    transformers leaves out entries with its own defaults, and those of mlx-lm can be others.
    """
    entries: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
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
    """Make the tensors of one layer, or say why it is written dense."""
    codes, scales, zeros, number_format = matrix
    bits, group, columns = number_format.bits, number_format.group, codes.shape[1]
    if bits not in BITS or group not in GROUPS or number_format.table:
        return f"stored as {number_format.name}; MLX has 2, 3, 4, 5, 6 and 8 bits in groups of 32, 64 and 128"
    if columns % group:
        return f"groups of {group} do not divide {columns} inputs"
    exact = {"scales": scales.double(), "biases": -scales.double() * zeros}
    for kind in (dtype, torch.float32):
        tensors = {name: x.to(kind) for name, x in exact.items()}
        if all(torch.equal(tensors[name].double(), x) for name, x in exact.items()):
            return NumberFormat(bits, group), {"weight": words(codes, bits).view(torch.uint32), **tensors}
    return f"scales times zero points are not exact in {dtype} and float32"
