"""Quantize a model with an installed package, and write dequantized weights to a file for each bit width.

`bytes.py` calls this script with the Python of an environment that has the extra `peers`. The script does not
import tensornet, which may need a newer version of transformers than that environment has.
`CALIBRATION.safetensors` contains `input_ids` and `attention_mask`, both of shape `(windows, length)`.
`Conv1D` layers are converted to `nn.Linear` first, since no package supports them.

    python benchmarks/bytes_peers.py FOLDER CALIBRATION.safetensors DESTINATION --method gptq --bits 4 3
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Weights = dict[str, Tensor]


def peak_mib() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) // 1024


def as_linear(model: nn.Module) -> nn.Module:
    """Convert the `Conv1D` layers of GPT-2 to `nn.Linear`."""
    from transformers.pytorch_utils import Conv1D

    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            made = nn.Linear(*module.weight.shape, bias=True)
            made.weight = nn.Parameter(module.weight.detach().T.contiguous())
            made.bias = module.bias
            model.set_submodule(name, made)
    return model


def linear_layers(model: Any) -> dict[str, Any]:
    """Return all linear layers except the output head, by name."""
    head = model.get_output_embeddings()
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}


def gptq(model: Any, data: Weights, bits: int, tokenizer: Any) -> Weights:
    """Quantize with GPTQ of llmcompressor, in symmetric groups of 64 (static order and damping 0.01)."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier

    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64}
    recipe = GPTQModifier(
        config_groups={"group_0": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"]
    )
    oneshot(
        model=model,
        dataset=Dataset.from_dict({name: x.tolist() for name, x in data.items()}),
        recipe=recipe,
        max_seq_length=data["input_ids"].shape[1],
        num_calibration_samples=len(data["input_ids"]),
        batch_size=16,
        processor=tokenizer,
    )
    return {n: m.weight for n, m in linear_layers(model).items()}


def torchao(model: Any, data: Weights, bits: int, tokenizer: Any) -> Weights:
    """Round weights to nearest with torchao, in symmetric groups of 64."""
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    config = IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{bits}"), granularity=PerGroup(64))
    chosen = {id(m) for m in linear_layers(model).values()}
    quantize_(model, config, filter_fn=lambda module, name: id(module) in chosen)
    return {n: m.weight.dequantize() for n, m in linear_layers(model).items()}


def hqq(model: Any, data: Weights, bits: int, tokenizer: Any) -> Weights:
    """Quantize with HQQ in groups of 128 with zero points.

    The number of bytes is the same as for groups of 64 without zero points.
    """
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    found = {}
    for name, layer in linear_layers(model).items():
        config = BaseQuantizeConfig(nbits=bits, group_size=128, axis=1)
        found[name] = HQQLinear(
            layer, config, compute_dtype=torch.float32, device="cpu", del_orig=False
        ).dequantize()
    return found


def autoround(model: Any, data: Weights, bits: int, tokenizer: Any) -> Weights:
    """Quantize with AutoRound and its default of 200 iterations, in symmetric groups of 64."""
    from auto_round import AutoRound

    rows = [{name: x[k : k + 1] for name, x in data.items()} for k in range(min(128, len(data["input_ids"])))]
    made = AutoRound(
        model,
        tokenizer,
        bits=bits,
        group_size=64,
        sym=True,
        iters=200,
        nsamples=len(rows),
        seqlen=data["input_ids"].shape[1],
        dataset=rows,
        batch_size=8,
        enable_torch_compile=False,
        device_map="cpu",
    ).quantize()
    model = made[0] if isinstance(made, tuple) else made
    return {n: getattr(m, "orig_layer", m).weight for n, m in linear_layers(model).items()}


METHODS: dict[str, Callable[[Any, Weights, int, Any], Weights]] = {
    "gptq": gptq,
    "torchao": torchao,
    "hqq": hqq,
    "autoround": autoround,
}


PACKAGES = {"gptq": "llmcompressor", "torchao": "torchao", "hqq": "hqq", "autoround": "auto-round"}


def main() -> None:
    """Quantize to each number of bits, and write an error to `BITS.json` without ending the script."""
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("destination", type=Path)
    parser.add_argument("--method", choices=METHODS)
    parser.add_argument("--bits", type=int, nargs="+")
    parser.add_argument("--encoder", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    kind = AutoModel if given.encoder else AutoModelForCausalLM
    tokenizer = AutoTokenizer.from_pretrained(given.folder)
    for bits in given.bits:
        torch.manual_seed(0)
        model = as_linear(kind.from_pretrained(given.folder, dtype=torch.float32)).eval()
        start, said = time.process_time(), {"version": importlib.metadata.version(PACKAGES[given.method])}
        try:
            found = METHODS[given.method](model, load_file(given.calibration), bits, tokenizer)
        except Exception as error:
            traceback.print_exc()
            said["refused"] = (
                f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
            )
        else:
            tensors = {n: x.detach().to(torch.float32).contiguous() for n, x in found.items()}
            save_file(tensors, given.destination / f"{bits}.safetensors")
        said["seconds"] = round(time.process_time() - start, 1)
        said["peak_mib"] = peak_mib()
        (given.destination / f"{bits}.json").write_text(json.dumps(said))
        print(given.method, bits, said, flush=True)


if __name__ == "__main__":
    main()
