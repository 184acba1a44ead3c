"""How many bytes does a token read from disk, by what experts share, and how fast is generation from disk?

    python benchmarks/experts_on_disk.py TEXTS [--folder FOLDER] [--toy]

TEXTS is the folder of the quotations of `mpoe_tasks.py`. There are two kinds of rows:

- `bytes`: the package's GPT-2 becomes a mixture of eight experts, and is fine-tuned on quotations as in
  `mpoe_vs_switch.py`, at the rate that was best there for Switch and MPOE. Experts are rounded to int4, and
  the bytes read for a token are counted by `tm.describe(resident="shared")` on the routing of the test text:
  without a cache, and with a cache of a quarter of all matrices.
- `speed`: a mixture of random weights in int4 is loaded, the pages of its file are dropped from the page
  cache, and it generates from disk. `read_bytes` is what was read from disk during generation, as counted by
  Linux.

Writes the record `experts_on_disk.json`.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import tensornet_hf as th
import tensornet_moe as tm

sys.path.insert(0, str(Path(__file__).parent))
from harness import RECORDS, record, table
from mpoe_tasks import LanguageModelling, divided, read_quotations
from mpoe_vs_switch import BALANCE, Row, build, judge, optimizer_of, stepper

from tensornet_hf.embedded import heldout_text
from tensornet_moe.experts_on_disk import banks_of

RATE = 3e-3
#: What experts share: options of `tensornet_hf.upcycle`, or a row of `mpoe_vs_switch.py`.
FORMS: dict[str, dict[str, Any] | Row] = {
    "private": Row("Switch", ends=None),
    "pool of half as many for all layers": {"share": "none", "experts": 16, "pool": "all"},
    "shared center, ends with two legs": Row("MPOE"),
    "shared center, ends with one leg": {"share": "center", "experts": 8},
}


def quantize(model: nn.Module) -> None:
    """Round the cores of all experts to int4."""
    for bank in [x for x in model.modules() if isinstance(x, tm.SharedCoreExperts)]:
        bank.quantize("int4")


def matrix_bytes(model: nn.Module) -> int:
    """Count the bytes of all expert matrices of a model in the dtype in which they are applied."""
    layers = [x for x in model.modules() if isinstance(x, tm.SharedCoreMoE)]
    banks = {id(bank): bank for layer in layers for bank in banks_of(layer)}.values()
    return sum(x.num_experts * x.out_features * x.in_features * x.dtype.itemsize for x in banks)


def count_bytes(task: LanguageModelling, form: str, steps: int, seed: int) -> dict[str, Any]:
    """Train one form, round it to int4, and count the bytes that a token reads."""
    options = FORMS[form]
    start = time.process_time()
    if isinstance(options, Row):
        model = build(task, options, seed=seed)
    else:
        model = task.model()
        th.upcycle(model, router="switch", balance_coef=BALANCE, seed=seed, **options)
    optimizer = optimizer_of(model.train(), Row(form), RATE, steps)
    step = stepper(model, optimizer, task.batches(seed))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda k: min((k + 1) / max(steps // 10, 1), 1 - k / steps)
    )
    for _ in range(steps):
        step()
        schedule.step()
    test = task.judge("test")
    row: dict[str, Any] = {"kind": "bytes", "form": form, "seed": seed, "loss": judge(model, test)["loss"]}
    quantize(model)
    row["loss_int4"] = judge(model, test)["loss"]
    batches = [batch["input_ids"] for batch, _ in test]
    for name, share in (("alone", 0.0), ("cached", 0.25)):
        size = int(share * matrix_bytes(model))
        read = tm.describe(model.eval(), resident="shared", batches=batches, cache_bytes=size).read
        assert read is not None
        row |= {f"bytes_read_{name}": read.per_token, f"hits_{name}": read.hits}
        row |= {"resident": read.resident, "private": read.private}
    return row | {"seconds": time.process_time() - start}


def save_random(form: str, sizes: dict[str, Any], experts: int, folder: Path) -> None:
    """Save a mixture of random weights in int4; its experts are private, or share a center."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=512, num_attention_heads=8))
    share = "none" if form == "private" else "center"
    th.upcycle(model, share=share, experts=experts, top_k=2, router="topk")
    quantize(model)
    th.save(model, folder)


def generate(folder: Path, cache: int, tokens: int) -> dict[str, Any]:
    """Load a model, drop its file from the page cache, and generate from disk."""
    model: Any = th.load(folder, experts_cache=cache)
    ids = torch.arange(8)[None]
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    before, start, own = disk_reads(), time.perf_counter(), time.process_time()
    made = model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
    seconds, own = time.perf_counter() - start, time.process_time() - own
    assert made.shape[1] == 8 + tokens
    del model
    gc.collect()  # pages of files that are still mapped cannot be dropped
    return {
        "tokens_per_second": tokens / seconds,
        "processor_seconds": own,
        "read_bytes": disk_reads() - before,
    }


def disk_reads() -> int:
    """Return the bytes that this process has read from disk so far."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def measure_speed(
    folder: Path, sizes: dict[str, Any], experts: int, *, tokens: int, repeats: int
) -> list[dict[str, Any]]:
    """Measure tokens per second of private experts and of those with a shared center, in turn."""
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for form in ("private", "shared center"):
        save_random(form, sizes, experts, folder / form)
    matrices = (
        4 * 3 * experts * sizes["num_hidden_layers"] * sizes["hidden_size"] * sizes["intermediate_size"]
    )
    for _ in range(repeats):
        for form in ("private", "shared center"):
            for cache in (0, matrices // 4):
                found.setdefault((form, cache), []).append(generate(folder / form, cache, tokens))
    rows = []
    for (form, cache), results in found.items():
        row = {"kind": "speed", "form": form, "cache": cache}
        row |= {key: statistics.median(x[key] for x in results) for key in results[0]}
        file = folder / form / "model.safetensors"
        rows.append({**row, "file": file.stat().st_size, "runs": results})
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("texts", type=Path, nargs="?", help="folder of quotations")
    parser.add_argument("--folder", type=Path, help="folder for models (default: a temporary one)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--toy", action="store_true", help="a few steps on verses of the embedded text")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    if given.texts is None and not given.toy:
        parser.error("TEXTS is needed")
    quotations = divided(heldout_text().split("\n")) if given.toy else read_quotations(given.texts)
    sizes = {"train_size": 260, "judge_size": 260, "batch": 2}
    steps, seeds = 1, [0]
    shape, experts = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}, 4
    if not given.toy:
        sizes = {"train_size": 48_000, "judge_size": 16_000, "batch": 4}
        steps, seeds = 160, given.seeds
        shape, experts = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4}, 32
    task = LanguageModelling(quotations, **sizes)
    rows = [count_bytes(task, form, steps, seed) for seed in seeds for form in FORMS]
    print(table(rows))
    with tempfile.TemporaryDirectory() as made:
        folder = given.folder or Path(made)
        tokens, repeats = (2, 1) if given.toy else (32, 5)
        speeds = measure_speed(folder, shape, experts, tokens=tokens, repeats=repeats)
    print(table([{k: v for k, v in row.items() if k != "runs"} for row in speeds]))
    record("experts_on_disk", [*rows, *speeds], folder=given.records)


if __name__ == "__main__":
    main()
