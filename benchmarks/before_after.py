"""Is the library slower than it was in another checkout?

    git worktree add ../before COMMIT
    python benchmarks/before_after.py ../before [--toy] [--rounds 7]

A decomposition (TT-SVD of 768 x 768 at bond 59), the forward pass of a layer that keeps its matrix (256
tokens), a training step of a layer (2,048 tokens), a search for topologies at 40 % of the parameters, and the
calibration of two blocks of SmolLM2's shapes on 12,288 tokens, with the model in float32, and in bfloat16
where the checkout offers that, by `autocast`. The checkouts run in their own processes, by turns; each gives
the median of its repeats in seconds of the processor. The ratio of the medians over all rounds is what
counts, above 1 where this checkout is slower; `noise` is what the same comparison says of this checkout
against itself. Writes `before_after.json`.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from harness import RECORDS, ROOT, record

#: Legs of the outputs and inputs, bond, and how often each question is asked in one process.
FULL: dict[str, Any] = {"out_dims": (12, 8, 8), "in_dims": (8, 8, 12), "max_bond": 59}
TOY: dict[str, Any] = {"out_dims": (2, 2, 3), "in_dims": (3, 2, 2), "max_bond": 3}
SIDES = ("before", "now", "now again")


def questions(toy: bool) -> dict[str, tuple[Callable[[], object], int]]:
    """List the timed functions and their repeats; use only names that both checkouts have."""
    import tensornet as tn
    from tensornet.topologies import mpo, topology_family

    topology, tokens = mpo(**(TOY if toy else FULL)), (4, 8) if toy else (256, 2048)
    rows, columns = topology.shape
    matrix = torch.randn(rows, columns)
    kept, trained = (tn.nn.TensorNetworkLinear(topology) for _ in range(2))
    kept.eval().strategy = "cached"
    x, gradient = torch.randn(tokens[0], columns), torch.randn(tokens[1], rows)
    inputs = torch.randn(tokens[1], columns, requires_grad=True)

    def forward() -> object:
        with torch.no_grad():
            return kept(x)

    def step() -> None:
        inputs.grad = None
        trained.zero_grad(set_to_none=True)
        trained(inputs).backward(gradient)

    def search() -> object:
        return tn.search_topology(topology.shape, param_ratio=0.4, tokens=(1, 64, 1024)).best("time")

    model, batches = blocks(toy)
    fast = {"autocast": torch.bfloat16} if "autocast" in inspect.signature(tn.calibrate).parameters else {}
    return {
        "decomposition": (lambda: topology_family("mpo").decompose_to(matrix, topology), 7),
        "cached forward": (forward, 200),
        "training step": (step, 15),
        "search at 40 %": (search, 2),
        "calibration": (lambda: tn.calibrate(model, batches), 1),
        "calibration, bfloat16": (lambda: tn.calibrate(model, batches, **fast), 1),
    }


def blocks(toy: bool) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """Build two blocks of SmolLM2's shapes with random weights, a fifteenth of its tokens, and batches."""
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = 3 if toy else 9
    config = LlamaConfig(
        hidden_size=24 if toy else 576,
        intermediate_size=48 if toy else 1536,
        num_attention_heads=heads,
        num_key_value_heads=heads // 3,
        num_hidden_layers=2,
        vocab_size=3277,
    )
    tokens = torch.randint(0, config.vocab_size, (2, 16) if toy else (24, 512))
    batches = [{"input_ids": row[None], "labels": row[None]} for row in tokens]
    return LlamaForCausalLM(config).eval(), batches


def one_side(toy: bool) -> dict[str, float]:
    """Return the median processor seconds of each question, timed in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found = {}
    for name, (ask, repeats) in questions(toy).items():
        ask()
        seconds = []
        for _ in range(repeats):
            start = time.process_time()
            ask()
            seconds.append(time.process_time() - start)
        found[name] = median(seconds)
    return found


def in_checkout(folder: Path, toy: bool) -> dict[str, float]:
    """Run `one_side` in a process that imports the library of a checkout."""
    command = [sys.executable, __file__, "--side", *(["--toy"] if toy else [])]
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{folder}:\n{done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(arguments: Sequence[str] | None = None) -> Path | None:
    """Compare two checkouts, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path, nargs="?", help="the other checkout")
    parser.add_argument("--side", action="store_true", help="only time the library that is imported")
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--records", type=Path, default=RECORDS)
    given = parser.parse_args(arguments)
    if given.side:
        print(json.dumps(one_side(given.toy)))
        return None
    if given.before is None or not (given.before / "tensornet").is_dir():
        parser.error("name another checkout of the project, such as one made by git worktree add")
    folders = dict(zip(SIDES, (given.before.resolve(), ROOT, ROOT), strict=True))
    times: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(given.rounds):
        for side, folder in folders.items():
            times[side].append(in_checkout(folder, given.toy))
    rows = []
    for name in times["now"][0]:
        before, now, again = (median(each[name] for each in times[side]) for side in SIDES)
        rows.append(
            {
                "question": name,
                "before_ms": round(1e3 * before, 3),
                "now_ms": round(1e3 * now, 3),
                "ratio": round(now / before, 3),
                "noise": round(again / now, 3),
                "rounds": given.rounds,
            }
        )
        print(rows[-1], flush=True)
    other = subprocess.run(
        ["git", "-C", str(folders["before"]), "rev-parse", "HEAD"], capture_output=True, text=True
    )
    return record("before_after", rows, folder=given.records, summary={"before": other.stdout.strip()})


if __name__ == "__main__":
    main()
