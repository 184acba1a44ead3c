"""How well does a language model work at a quarter or a fifth of its bytes, embeddings and head included?

    OMP_NUM_THREADS=1 python benchmarks/whole_model.py CACHE [--toy] [--shares 0.25 0.2] [--work FOLDER]

SmolLM2-135M-Instruct with its residual stream turned (see `bytes_models.turn`; its head then differs from its
embedding, and both count), as files of a share of its bytes in bfloat16. Calibrated on the Python tutorials,
judged on the Debian handbook, healed on the PostgreSQL manual for ten minutes of a processor: the dense model
is distilled into scales, norms and cores, the integers stay. `perplexity_ratio` is to the dense model's. Rows
that the record has are skipped. Writes `whole_model.json`.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
import bytes_models
from bytes_models import Batches, Subject, judge, sample, windows
from harness import RECORDS, record
from real_data import read_text, token_windows

import tensornet as tn
from tensornet.compression import prepare
from tensornet.compression.config import DEFAULT_FORMATS
from tensornet.nn.targets import LayerSelection

Row = dict[str, Any]


class Bench:
    """One model, its texts, and statistics that rows share."""

    def __init__(self, subject: Subject, training: Callable[[], Batches], given: argparse.Namespace) -> None:
        self.subject, self.training, self.given = subject, training, given
        self.dense = subject.load()
        self.layers = "all"  # the output head and the embedding too
        self.params = sum(p.numel() for p in self.dense.parameters())
        self.dense_losses = self.kept("dense", lambda: judge(subject, self.dense, []))

    def kept(self, name: str, make: Callable[[], Any]) -> Any:
        """Return the result of a slow step, read from the working folder if it is there."""
        if self.given.work is None:
            return make()
        path = self.given.work / f"{self.subject.name}-whole-{name}.pt"
        if not path.is_file():
            torch.save(make(), path)
        return torch.load(path, weights_only=False)

    def statistics(self) -> tn.CalibrationStats:
        """Collect moments of all layers, with the model run in bfloat16."""
        return tn.calibrate(
            self.dense,
            self.subject.calibration(0),
            config=LayerSelection(target_modules=self.layers),
            autocast=torch.bfloat16,
            progress=False,
        )

    def plans(self) -> dict[float, tn.CompressionPlan]:
        """Compute the plan of each byte ratio; candidates are computed once."""
        sizes = {share: int(share * 2 * self.params) for share in self.given.shares}
        config = tn.CompressionConfig(
            max_bytes=max(sizes.values()), formats=DEFAULT_FORMATS, target_modules=self.layers
        )
        prepared = prepare(self.dense, config, self.kept("moments", self.statistics))
        return {share: prepared.plan(max_bytes=size) for share, size in sizes.items()}

    def rows(self, share: float) -> Iterator[Row]:
        """Measure the model at a byte ratio, compressed only and then healed."""
        plan = self.kept("plans-" + "-".join(map(str, self.given.shares)), self.plans)[share]
        stats, small = self.kept("moments", self.statistics), self.subject.load()
        start = time.process_time()
        tn.apply_plan(small, plan, stats, progress=False)
        row = {"share": share, "budget_bytes": int(share * 2 * self.params)}
        row["round_seconds"] = time.process_time() - start
        del stats
        row["formats"] = dict(Counter(layer.storage.number_format.name for layer in plan if layer.topology))
        yield {**row, "after": "", "predicted": plan.predicted_loss_increase, **self.judged(small)}
        healed = tn.heal(
            small,
            self.dense,
            self.training(),
            steps=10_000,
            max_seconds=self.given.heal_seconds,
            clock=time.process_time,
            autocast=torch.bfloat16,
        )
        row |= {"heal_seconds": healed.seconds, "heal_steps": healed.steps}
        yield {**row, "after": "healed", **self.judged(small)}

    def judged(self, model: nn.Module) -> Row:
        """Measure the loss increase over the dense model, the size of the file, and a sample."""
        losses = judge(self.subject, model, [])
        rise = float((losses - self.dense_losses).mean())
        with tempfile.TemporaryDirectory() as folder:
            tn.save_model(model, Path(folder) / "model.safetensors")
            size = (Path(folder) / "model.safetensors").stat().st_size
        return {
            "loss_increase": rise,
            "perplexity": math.exp(float(losses.mean())),
            "perplexity_ratio": math.exp(rise),
            "file_bytes": size,
            "sample": sample(self.subject, model),
        }


def training(cache: Path, subject: Subject) -> Batches:
    """Return windows of 256 tokens of the PostgreSQL manual, in random order."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(subject.folder)
    found = token_windows(tokenizer, read_text(cache / "texts", "training"), length=256)
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))
    return windows(found[order], 2)


def main(arguments: Sequence[str] | None = None) -> Path:
    """Measure the rows that are missing, and add each to the record at once."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cache", type=Path, nargs="?")
    parser.add_argument(
        "--toy", action="store_true", help="the embedded model, few windows, a second of healing"
    )
    parser.add_argument("--shares", nargs="+", type=float, default=[0.25, 0.2])
    parser.add_argument("--heal-seconds", type=float, default=600.0)
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--work", type=Path, help="folder for the moments")
    given = parser.parse_args(arguments)
    if given.toy:
        given.heal_seconds, subject = 1.0, bytes_models.gpt2(count=8, limit=8_000)
        bench = Bench(subject, lambda: subject.calibration(1), given)
    else:
        subject = bytes_models.smollm2(given.cache)
        bench = Bench(subject, lambda: training(given.cache, subject), given)
    path = given.records / "whole_model.json"
    for share in given.shares:
        known = json.loads(path.read_text())["rows"] if path.is_file() else []
        if any(row["share"] == share and row["after"] == "healed" for row in known):
            continue
        kept = [row for row in known if row["share"] != share]
        for row in bench.rows(share):
            kept.append({"model": subject.name, **row})
            print(kept[-1], flush=True)
            record("whole_model", kept, folder=given.records, dtype="float32")
    return path


if __name__ == "__main__":
    print(main())
