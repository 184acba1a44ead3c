"""How much do models trained from scratch lose when their feed-forward networks are stored in few bits?

    python benchmarks/scratch_formats.py TEXTS [--state FOLDER] [--rows ...]

Takes the averaged weights of every run in the state folder of `moe_from_scratch.py` and rounds them to
nearest, with scales searched group by group: the cores that experts share alone (`center`), or all matrices.
Biases, routers and what is no feed-forward network stay in float32. Nothing is trained afterwards.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tensornet_moe as tm
from tensornet.nn.encoding import Storage
from tensornet.quantization import NumberFormat, round_weight

sys.path.insert(0, str(Path(__file__).parent))
from harness import RECORDS, record
from moe_from_scratch import CACHE, Recipe, Run, feed_forward_parameters
from scratch_rows import Dense, Sizes
from scratch_table import ROWS
from scratch_text import Corpus, corpus_of, load_corpus

FORMATS = ("int8", "int4")


def stored_banks(model: nn.Module) -> list[tm.SharedCoreExperts]:
    """Collect the banks that own cores, each once."""
    return [module for module in model.modules() if isinstance(module, tm.SharedCoreExperts)]


@torch.no_grad()
def rounded(model: nn.Module, number_format: str, *, center: bool) -> tuple[nn.Module, int]:
    """Round a copy of a model; return it and the bytes saved in its feed-forward networks.

    Args:
        model: built by `scratch_rows.build`.
        number_format: such as `"int4"`.
        center: only the cores that experts share.
    """
    made, saved = copy.deepcopy(model), 0
    for bank in stored_banks(made):
        before = bank.num_bytes
        names = [name for name in bank.topology.core_names if not center or name in bank.shared]
        if names:
            parsed = NumberFormat.parse(number_format)
            bank.quantize(Storage(core_formats=tuple((name, parsed) for name in names)))
        saved += before - bank.num_bytes
    for module in made.modules():
        if isinstance(module, Dense) and not center:
            for linear in (module.up, module.down):
                found = round_weight(linear.weight, number_format)
                saved += linear.weight.nbytes - found.nbytes
                linear.weight.copy_(found.dequantize())
    return made, saved


def lines_of(run: Run, corpus: Corpus) -> Iterator[dict[str, Any]]:
    """Judge the averaged weights of a run in every format."""
    recipe, row = run.recipe, run.row
    run._exchange()
    shared = any(bank.shared_parameters() and row.kind != "tied" for bank in stored_banks(run.model))
    size = 4 * feed_forward_parameters(run.model, run.architecture.networks)
    cases = [(name, center) for name in FORMATS for center in (True, False) if shared or not center]
    for name, center in [("float", False), *cases]:
        model, saved = (run.model, 0) if name == "float" else rounded(run.model, name, center=center)
        loss, _ = run.evaluate(model)
        yield {
            "row": row.name,
            "layers": run.sizes.layers,
            "tokens": run.tokens,
            "format": f"{name}, center" if center else name,
            "feed_forward_bytes": size - saved,
            "loss": loss,
            "seed": run.seed,
            "rate": recipe.rate,
            "corpus": corpus.fingerprint,
        }


def main(arguments: Sequence[str] | None = None) -> Path:
    """Judge every stored run, write the record, return its path."""
    options = parse(arguments)
    torch.set_num_threads(1)
    lines: list[dict[str, Any]] = []
    for path in sorted(options.state.glob("*.json")):
        stored = json.loads(path.read_text())
        if not stored["history"] or (options.rows and stored["row"]["name"] not in options.rows):
            continue
        sizes, recipe = Sizes(**stored["sizes"]), Recipe(**stored["recipe"])
        if options.toy:
            corpus = corpus_of(options.texts.read_text(encoding="utf-8"), vocabulary=sizes.vocabulary)
        else:
            corpus = load_corpus(options.texts, options.state / "text", vocabulary=sizes.vocabulary)
        row = ROWS[stored["row"]["name"]]
        architecture = stored.get("architecture", "gpt2")
        run = Run(row, sizes, recipe, corpus, stored["seed"], folder=options.state, architecture=architecture)
        for line in lines_of(run, corpus):
            print(
                f"{line['row']:40} {line['format']:14} {line['feed_forward_bytes']:9} {line['loss']:.4f}",
                flush=True,
            )
            lines.append(line)
    return record("scratch_formats", lines, folder=options.out, threads=1)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("texts", type=Path, help="as for moe_from_scratch.py")
    parser.add_argument("--state", type=Path, default=CACHE, help="folder of runs")
    parser.add_argument("--out", type=Path, default=RECORDS, help="folder of the record")
    parser.add_argument("--rows", nargs="+", choices=tuple(ROWS), metavar="ROW", help="all if left out")
    parser.add_argument("--toy", action="store_true", help="states of a toy run, to test the script")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
