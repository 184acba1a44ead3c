"""How many tokens a second does a model of integer layers generate, compared with its dense model?

    python benchmarks/generation.py CACHE [--toy] [--threads 1 2] [--modes eager compiled tuned generate]

The model is SmolLM2-135M (see `subjects.py`) with its 210 linear layers in integers and all other layers
dense, prepared by `tn.nn.prepare_for_inference`. The weights are random integers, since speed does not depend
on their values. All variants (column `side`) compute in bfloat16, except one: the dense model in float32.
Ratios are to the dense model in bfloat16, which is timed in turn with the others. Processor time is
measured for one thread, otherwise wall time.

In the modes `eager`, `compiled` and `tuned`, a row is one pass of 1 token (as for generating), 16 tokens (as
for checking a draft) or 256 tokens (as for reading a prompt), without a KV cache and with the logits of the
last token. `int4` has 4.25 bits per weight in one format. `planned` has 4.25 bits in the mix of formats that
a plan chooses. The kernels use 4 bits for 3-bit formats, and two matrices of 4 bits for 5 and 6 bits.
`tuned` is compiled with Inductor's `freezing` and `max_autotune`, without its cache of graphs.

The mode `generate` is the loop of transformers: 48 new tokens after a prompt of 16, with a KV cache. Each
variant adds a change to the one before: linear layers in int4; embedding and head in int4 (`whole`); the step
of one token compiled (`th.load(..., inference="compiled")`).

Every row also has the bytes of the file and of the tensors in memory. Rows that are in the record are kept,
also those from other processors, so that an interrupted run can be continued.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from harness import (
    RECORDS,
    clock_for,
    held_bytes,
    paired_medians,
    provenance,
    record,
    rounds,
    with_threads,
)
from subjects import prepare_models
from torch import nn
from torch._inductor import config as inductor

import tensornet as tn
from tensornet.nn.embedding import MPOEmbedding
from tensornet.nn.linear import TensorNetworkLinear
from tensornet.nn.storage import PackedCore, Storage
from tensornet.quantization import NumberFormat
from tensornet.topologies import dense
from tensornet_hf.checkpoint import compile_generation

#: Number of layers in each format in a plan of SmolLM2 at 4.25 bits per weight, 210 in total.
PLANNED = {"int4": 125, "int3": 35, "int5": 31, "int6": 17, "int8": 2}
SIDES = ("float32", "bfloat16", "int4", "int8:row", "planned")
BASE = "bfloat16"
#: Variants in the mode `generate`, and the numbers of tokens of prompt and answer.
WHOLE, COMPILED = "int4 whole", "int4 whole, compiled"
GENERATING = (BASE, "int4", WHOLE, COMPILED)
PROMPT, NEW = 16, 48
#: Settings of Inductor in the mode `tuned`; users can set them by variables such as TORCHINDUCTOR_FREEZING=1.
TUNED = {"freezing": True, "max_autotune": True, "fx_graph_cache": False}
KEY = ("side", "mode", "threads", "tokens", "device")


def build(config: Any, side: str, folder: Path | None) -> nn.Module:
    """Build one variant of the model, see `SIDES` and `GENERATING`; weights are random without a folder."""
    from transformers import AutoModelForCausalLM

    if folder is None:
        model = AutoModelForCausalLM.from_config(config)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if side == "float32":
        return model.eval()
    model = model.bfloat16()
    if side != BASE:
        names = [name for name, x in model.named_modules() if isinstance(x, nn.Linear) and "layers" in name]
        for name, number_format in zip(names, formats(side, len(names)), strict=True):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, integers(model.get_submodule(name), number_format))
    if side in (WHOLE, COMPILED):
        head = integers(model.lm_head, "int4")
        table = MPOEmbedding(head.topology, storage=head.storage, device="meta")
        table.share_cores(head)
        model.lm_head, model.model.embed_tokens = head, table
    if side == COMPILED:
        compile_generation(model)
    return model.eval()


def formats(side: str, count: int) -> list[str]:
    """Return the number format of each of `count` layers; formats of a plan are in random order."""
    if side != "planned":
        return [side.split()[0]] * count
    found = [name for name, share in PLANNED.items() for _ in range(share)]
    random.Random(0).shuffle(found)
    return found[:count]


def integers(layer: nn.Linear, number_format: str) -> TensorNetworkLinear:
    """Build a bfloat16 layer of random integers in the shape of `layer`, to save the time of rounding."""
    topology = dense(out_features=layer.out_features, in_features=layer.in_features)
    storage = Storage(number_format=NumberFormat.parse(number_format))
    options: dict[str, Any] = {"bias": layer.bias is not None, "storage": storage, "device": "meta"}
    made = TensorNetworkLinear(topology, **options).bfloat16().to_empty(device="cpu")
    for core in (x for x in made.modules() if isinstance(x, PackedCore)):
        core.codes = torch.randint(0, 256, core.codes.shape, dtype=torch.uint8)
        kind = core.number_format.scales.dtype
        core.scales = (0.01 * torch.rand(core.scales.shape)).to(kind).view(core.scales.dtype)
    if made.bias is not None:
        nn.init.zeros_(made.bias)
    return made


def file_bytes(model: nn.Module) -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        tn.save_model(model, path)
        return path.stat().st_size


def passes(model: nn.Module, mode: str, tokens: int) -> Callable[[], object]:
    """Return a function that makes one forward pass of `tokens` tokens, or generates `tokens` tokens."""
    tn.nn.prepare_for_inference(model)
    if mode == "generate":
        prompt = torch.arange(PROMPT)[None] % 100
        wanted = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
        return lambda: model.generate(prompt, attention_mask=torch.ones_like(prompt), **wanted)
    if mode != "eager":
        model = torch.compile(model, dynamic=False)  # type: ignore[assignment]
    ids = torch.arange(tokens)[None] % 100
    return lambda: model(input_ids=ids, use_cache=False, logits_to_keep=1)


@torch.no_grad()
def measure(
    models: dict[str, nn.Module], mode: str, tokens: int, seconds: float, threads: int
) -> Iterator[dict[str, Any]]:
    """Time all variants of the model in turn, and yield one row for each."""
    torch._dynamo.reset()
    ways = {side: passes(model, mode, tokens) for side, model in models.items()}
    with inductor.patch(TUNED if mode == "tuned" else {}):
        for way in ways.values():
            way()  # the first call compiles
    times = paired_medians(ways, rounds(ways.values(), seconds), warmup=1, clock=clock_for(threads))
    for side, time in times.items():
        yield {
            "side": side,
            "mode": mode,
            "threads": threads,
            "tokens": tokens,
            "tokens_per_second": round(tokens / time.median, 1),
            "times_bfloat16": round(times[BASE].median / time.median, 3),
            "held_MiB": round(held_bytes(models[side]) / 2**20, 3),
            "repeats": time.repeats,
        }


def main(arguments: Sequence[str] | None = None) -> Path:
    from transformers import AutoConfig, LlamaConfig

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cache", type=Path, nargs="?", help="folder of models, see subjects.py")
    parser.add_argument("--toy", action="store_true", help="a tiny random model")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 256])
    parser.add_argument("--modes", nargs="+", default=["eager", "compiled", "generate"])
    parser.add_argument("--sides", nargs="+", help="variants to measure (default: all)")
    parser.add_argument("--seconds", type=float, default=20.0, help="about this long for each comparison")
    parser.add_argument("--records", type=Path, default=RECORDS)
    given = parser.parse_args(arguments)
    if given.toy:
        given.threads, given.tokens, given.modes, given.seconds = [1], [1, 16], ["eager", "generate"], 0.01
        given.sides = [*SIDES, WHOLE]  # without the compiled variant, which takes too long
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 128}
    folder = None if given.toy else prepare_models(given.cache)[0]
    config = (
        LlamaConfig(**small, num_attention_heads=2) if folder is None else AutoConfig.from_pretrained(folder)
    )
    path = given.records / "generation.json"
    known = json.loads(path.read_text())["rows"] if path.is_file() else []
    rows = {tuple(row[key] for key in KEY): row for row in known}
    sides = {mode: GENERATING if mode == "generate" else SIDES for mode in given.modes}
    if given.sides:
        sides = {mode: [side for side in own if side in given.sides] for mode, own in sides.items()}
    models = {
        side: build(config, side, folder) for side in dict.fromkeys(x for own in sides.values() for x in own)
    }
    origin = {key: provenance()[key] for key in ("device", "date", "commit", "dirty", "load")}
    sizes = {side: round(file_bytes(model) / 2**20, 3) for side, model in models.items()}

    def work(threads: int) -> list[dict[str, Any]]:
        for mode in given.modes:
            for tokens in [NEW] if mode == "generate" else given.tokens:
                wanted = [(side, mode, threads, tokens, origin["device"]) for side in sides[mode]]
                if all(key in rows for key in wanted):
                    continue
                own = {side: models[side] for side in sides[mode]}
                for row in measure(own, mode, tokens, given.seconds, threads):
                    row |= {"file_MiB": sizes[row["side"]], **origin}
                    rows[tuple(row[key] for key in KEY)] = row
                    print(row, flush=True)
                gc.collect()
                write(rows.values(), given.records)
        return []

    with_threads(given.threads, work)
    return write(rows.values(), given.records)


def write(rows: Any, folder: Path) -> Path:
    """Write the record, with a summary of the speed of each variant relative to the dense model."""
    found = list(rows)
    summary = {
        ", ".join(
            (row["side"], f"{row['tokens']} tokens", row["mode"], f"threads: {row['threads']}", row["device"])
        ): row["times_bfloat16"]
        for row in found
        if row["side"] not in ("float32", BASE)
    }
    return record("generation", found, folder=folder, dtype="bfloat16", summary=summary)


if __name__ == "__main__":
    print(main())
