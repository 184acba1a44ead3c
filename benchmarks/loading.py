"""How much of the time of `th.load` does the library itself take, here and in another checkout?

    git worktree add ../before COMMIT
    python benchmarks/loading.py ../before [--toy] [--rounds 5]

A random Llama of 30 blocks whose 210 linear layers are chains of three sites of a few shapes, written by the
other checkout. Beside it transformers alone loads a dense model of as many parameters (their number decides,
not their size). The checkouts run in their own processes, by turns; each gives the medians of its repeats in
seconds of the processor, and the first load of the process. The library's own part is what `th.load` takes
above transformers alone. Writes `loading.json`.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).parent))
from harness import RECORDS, ROOT, record

SIDES = ("before", "now")
#: What is timed in a process, by the name in the record.
QUESTIONS = ("first th.load", "th.load", "transformers alone", "own part of th.load")


def write_models(folder: Path, blocks: int) -> None:
    """Write a compressed model, and a dense one with as many parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    import tensornet as tn
    import tensornet_hf  # noqa: F401  # registers how compressed models are saved

    def llama(blocks: int) -> LlamaForCausalLM:
        sizes = {"hidden_size": 72, "intermediate_size": 192, "vocab_size": 64}
        heads = {"num_attention_heads": 3, "num_key_value_heads": 1}
        return LlamaForCausalLM(LlamaConfig(num_hidden_layers=blocks, **sizes, **heads))

    torch.manual_seed(0)
    model = llama(blocks)
    dense = len(list(model.parameters()))
    config = tn.CompressionConfig(topology="mpo", sites=3, max_bond=6, objective="weight")
    tn.compress(model, config, progress=False)
    model.save_pretrained(folder / "compressed")
    each = (dense - len(list(llama(0).parameters()))) // blocks
    more = len(list(model.parameters())) - dense
    llama(blocks + round(more / each)).save_pretrained(folder / "dense")


def one_side(folder: Path, repeats: int) -> dict[str, float]:
    """Return the median processor seconds of each question, timed in this process."""
    from transformers import LlamaForCausalLM
    from transformers.utils import logging

    import tensornet_hf as th

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    def seconds(load: Callable[[Path], object], name: str) -> float:
        gc.collect()
        start = time.process_time()
        load(folder / name)
        return time.process_time() - start

    alone = LlamaForCausalLM.from_pretrained
    seconds(alone, "dense")  # what transformers imports when it loads the first model
    found = {"first th.load": seconds(th.load, "compressed")}
    pairs = [(seconds(th.load, "compressed"), seconds(alone, "dense")) for _ in range(repeats)]
    found["th.load"], found["transformers alone"] = (median(each) for each in zip(*pairs, strict=True))
    return found | {"own part of th.load": median(ours - theirs for ours, theirs in pairs)}


def in_checkout(checkout: Path, *arguments: str) -> str:
    """Run this script with the library of a checkout, and return the last line that it prints."""
    packages = (checkout, checkout / "plugins" / "moe", checkout / "plugins" / "hf")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, packages)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{checkout}:\n{done.stderr[-2000:]}")
    return done.stdout.splitlines()[-1]


def compare(before: Path, folder: Path, rounds: int, repeats: int) -> list[dict[str, object]]:
    """Time both checkouts in turn, and collect the medians in rows."""
    checkouts = dict(zip(SIDES, (before, ROOT), strict=True))
    times: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(rounds):
        for side, checkout in checkouts.items():
            answer = in_checkout(checkout, "--side", str(folder), "--repeats", str(repeats))
            times[side].append(json.loads(answer))
    rows: list[dict[str, object]] = []
    for name in QUESTIONS:
        medians = {side: median(each[name] for each in times[side]) for side in SIDES}
        ratio = round(medians["before"] / medians["now"], 2)
        milliseconds = {f"{side}_ms": round(1e3 * x, 1) for side, x in medians.items()}
        rows.append({"question": name, **milliseconds, "times_faster": ratio, "rounds": rounds})
        print(rows[-1], flush=True)
    return rows


def main(arguments: Sequence[str] | None = None) -> Path | None:
    """Compare two checkouts, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path, nargs="?", help="the other checkout")
    parser.add_argument("--write", type=Path, help="only write the models, with the library that is imported")
    parser.add_argument("--side", type=Path, help="only time the library that is imported, on these models")
    parser.add_argument("--toy", action="store_true", help="two blocks, two repeats")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--records", type=Path, default=RECORDS)
    given = parser.parse_args(arguments)
    blocks, repeats = (2, 2) if given.toy else (30, given.repeats)
    if given.write is not None:
        write_models(given.write, blocks)
        print("written")
        return None
    if given.side is not None:
        print(json.dumps(one_side(given.side, repeats)))
        return None
    if given.before is None or not (given.before / "plugins" / "hf").is_dir():
        parser.error("name another checkout of the project, such as one made by git worktree add")
    before = given.before.resolve()
    with tempfile.TemporaryDirectory() as folder:
        in_checkout(before, "--write", folder, *(["--toy"] if given.toy else []))
        rows = compare(before, Path(folder), given.rounds, repeats)
    commit = subprocess.run(["git", "-C", str(before), "rev-parse", "HEAD"], capture_output=True, text=True)
    summary = {"before": commit.stdout.strip(), "linear layers": 7 * blocks}
    return record("loading", rows, folder=given.records, summary=summary)


if __name__ == "__main__":
    main()
