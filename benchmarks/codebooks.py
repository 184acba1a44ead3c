"""How much less does rounding with feedback increase the loss than llama.cpp's rounding to the same types?

    OMP_NUM_THREADS=1 python benchmarks/codebooks.py [--toy] [--types IQ3_S IQ2_S] [--narrow] [--plans]
        [--cache CACHE]

All matrices of all blocks of SmolLM2-135M, padded and rotated (`subjects.smollm2(wide=True)`), get the same
GGUF type. Padding leaves a quarter of the input directions unused, which favours feedback. With `--narrow`,
the model is not padded, and only the matrices whose rows fit the types are rounded (`down_proj`).

llama.cpp's own rounding (package `libgguf`) uses the mean square of every input as importance matrix. Ours
uses the whole second moments of the inputs, from the same tokens. Neither knows gradients, and embedding and
head keep their values. The loss is measured on held-out text from another source. `seconds` are processor
seconds of rounding.

With `--plans`, there is a plan of each type's size instead, with all formats of the menu `gguf`, gradients,
and the effort `fast`. Its seconds are those of the whole compression. Rows of the record are kept, unless
they are measured again. Writes `codebooks.json`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
import subjects
from harness import RECORDS, processor_seconds, provenance, record

import tensornet as tn
from tensornet.damping import DENSE_COLUMN_DAMPING
from tensornet.quantization import NumberFormat, round_weight
from tensornet_hf.evaluate import divergence

#: Number formats of GGUF types that are not called by the same name.
FORMATS = {"Q2_K": "int2:g16:s4:min", "Q3_K": "int3:g16:s6"}
TYPES = ("IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS")


def moments(model: nn.Module, names: Sequence[str], windows: Tensor) -> dict[str, Tensor]:
    """Compute the mean of `x x^T` over the inputs of each layer; layers with the same input share it."""
    sums: dict[str, Tensor] = {}
    seen: dict[int, tuple[Tensor, str]] = {}
    owners: dict[str, str] = {}

    def add(name: str, inputs: tuple[Tensor, ...]) -> None:
        (x,) = inputs
        same, owner = seen.get(id(x), (None, name))
        if same is not x:
            seen.clear()
            seen[id(x)], owner = (x, name), name
            flat = x.flatten(0, -2)
            sums[name] = sums.get(name, 0) + flat.T @ flat
        owners[name] = owner

    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, x, name=name: add(name, x))
        for name in names
    ]
    with torch.no_grad():
        for window in windows:
            model(input_ids=window[None])
            seen.clear()
    for hook in hooks:
        hook.remove()
    return {name: sums[owner] / windows.numel() for name, owner in owners.items()}


def by_llama_cpp(weight: Tensor, kind: str, columns: Tensor) -> Tensor:
    """Round a matrix by llama.cpp's quantizer."""
    import gguf
    import libgguf

    number = gguf.GGMLQuantizationType[kind]
    importance = columns.diagonal().float().contiguous().numpy()
    blocks = libgguf.quantize_rows(np.ascontiguousarray(weight.numpy()), int(number), importance)
    return torch.from_numpy(gguf.quants.dequantize(blocks, number).copy())


def by_us(weight: Tensor, kind: str, columns: Tensor) -> Tensor:
    """Round a matrix with feedback along its inputs."""
    name = FORMATS.get(kind, kind.lower())
    options: dict[str, Any] = {"rounding": "one_sided", "column_damping": DENSE_COLUMN_DAMPING, "refits": 0}
    return round_weight(weight, name, columns=columns, **options).dequantize()


def main(arguments: Sequence[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--toy", action="store_true", help="two blocks, few tokens, one type")
    parser.add_argument("--plans", action="store_true", help="measure plans of the same sizes instead")
    parser.add_argument("--narrow", action="store_true", help="do not pad the model")
    parser.add_argument("--types", nargs="+", default=TYPES, choices=(*TYPES, *FORMATS))
    parser.add_argument("--cache", type=Path, help="folder of models and texts, see subjects.py")
    parser.add_argument("--calibration", type=int, default=24, help="number of windows of 512 tokens")
    parser.add_argument("--judged", type=int, default=10, help="number of windows of 512 tokens")
    parser.add_argument("--records", type=Path, default=RECORDS)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if given.toy:
        dense, windows, judged = toy()
        given.types = given.types[:1]
    else:
        subject = subjects.smollm2(given.cache, given.calibration, given.judged, wide=not given.narrow)
        dense = subject.load()
        windows = torch.cat([batch["input_ids"] for batch in subject.calibration(0)])
        judged = torch.cat([batch["input_ids"] for batch in subject.judged])
    names = [
        name
        for name, module in dense.named_modules()
        if isinstance(module, nn.Linear) and not name.endswith("lm_head") and module.in_features % 256 == 0
    ]
    which = "toy" if given.toy else subject.name
    known = {} if given.plans else moments(dense, names, windows)
    originals = {name: dense.get_submodule(name).weight.detach().clone() for name in names}
    model, file = (toy()[0] if given.toy else subject.load()), given.records / "codebooks.json"
    rows: list[dict[str, Any]] = json.loads(file.read_text())["rows"] if file.is_file() else []
    methods = {"plan": None} if given.plans else {"llama.cpp": by_llama_cpp, "ours": by_us}
    for kind in given.types:
        for method, rounded in methods.items():
            bits = NumberFormat.parse(FORMATS.get(kind, kind.lower())).bits_per_weight((1, 256))
            start, facts = processor_seconds(), {}
            if rounded is None:
                model = toy()[0] if given.toy else subject.load()
                config = tn.CompressionConfig(
                    bits_per_weight=bits, formats="gguf", target_modules=names, effort="fast"
                )
                report = tn.compress(model, config, calibration=list(windows.split(2)), progress=False)
                formats = Counter(layer.storage.number_format.name for layer in report.plan)
                facts = {"formats": formats, "predicted": report.plan.predicted_loss_increase}
            else:
                with torch.no_grad():
                    for name, weight in originals.items():
                        model.get_submodule(name).weight.copy_(rounded(weight.float(), kind, known[name]))
            seconds = processor_seconds() - start
            found = divergence(model, dense, judged.flatten(), context=judged.shape[1], batch_size=2)
            rows = [x for x in rows if (x["model"], x["type"], x["method"]) != (which, kind, method)]
            rows.append(
                {
                    "model": which,
                    "type": kind,
                    "bits_per_weight": bits,
                    "method": method,
                    "loss_increase": found.loss_increase,
                    "kl": found.mean,
                    "same_top": found.same_top,
                    **facts,
                    "seconds": seconds,
                    "judged_tokens": judged.numel(),
                    "calibration_tokens": windows.numel(),
                    **{x: provenance()[x] for x in ("date", "commit", "dirty", "device", "threads")},
                }
            )
            print(kind, method, found.loss_increase, found.mean, f"{seconds:.0f} s", flush=True)
            record("codebooks", rows, folder=given.records)
    return file


def toy() -> tuple[Any, Tensor, Tensor]:
    """Return a random Llama model of two blocks, and random tokens for calibration and measurement."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.2,
    )
    tokens = torch.randint(3, 96, (6, 64))
    return LlamaForCausalLM(config).eval(), tokens[:4], tokens[4:]


if __name__ == "__main__":
    print(main())
