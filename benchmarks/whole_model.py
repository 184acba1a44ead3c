"""How well does a language model work at a quarter or a fifth of its bytes, embeddings and head included?

SmolLM2-135M-Instruct with its residual stream turned (see `bytes_models.turn`; its head then differs from its
embedding, and both count), as files of a share of its bytes in bfloat16. Calibrated on the Python tutorials,
judged on the Debian handbook. Then refitted in closed form to the inputs that each layer really gets, with 24
other windows of the tutorials and 24 of the PostgreSQL manual, and healed on that manual for ten minutes of a
processor: the dense model is distilled into the integers and the gains of norms, with `--parameters vectors`
into the gains alone.
`perplexity_ratio` is to the dense model's. Rows that the record has are skipped. Writes `whole_model.json`.

    OMP_NUM_THREADS=1 python benchmarks/whole_model.py CACHE [--toy] [--shares 0.25 0.2] [--work FOLDER]
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
from bytes_models import Batches, Subject, judge, sample, tokens_of, windows
from harness import RECORDS, record
from real_data import read_text, token_windows

import tensornet as tn
from tensornet.compression import prepare
from tensornet.compression.config import DEFAULT_FORMATS
from tensornet.healing import refine
from tensornet.nn.targets import LayerSelection

Row = dict[str, Any]


class Bench:
    """One model, its texts, and statistics that rows share."""

    def __init__(
        self, subject: Subject, refitting: Batches, training: Callable[[], Batches], given: argparse.Namespace
    ) -> None:
        self.subject, self.refitting, self.training, self.given = subject, refitting, training, given
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
        """Measure the model at a byte ratio: rounded, refitted, healed."""
        plan = self.kept("plans-" + "-".join(map(str, self.given.shares)), self.plans)[share]
        row: Row = {"share": share, "budget_bytes": int(share * 2 * self.params)}
        row["formats"] = dict(Counter(layer.storage.number_format.name for layer in plan if layer.topology))
        row["predicted"] = plan.predicted_loss_increase
        row["calibration_tokens"] = tokens_of(self.subject.calibration(0))

        def rounded(small: nn.Module) -> Row:
            tn.apply_plan(small, plan, self.kept("moments", self.statistics), progress=False)
            return {}

        def refined(small: nn.Module) -> Row:
            stats = self.kept("moments", self.statistics)
            fitted = refine(small, self.dense, self.refitting, stats, autocast=torch.bfloat16)
            return {"refine_kept": fitted.kept}

        def healed(small: nn.Module) -> Row:
            made = tn.heal(
                small,
                self.dense,
                self.training(),
                steps=10_000,
                parameters=self.given.parameters,
                max_seconds=self.given.heal_seconds,
                clock=time.process_time,
                autocast=torch.bfloat16,
            )
            return {"heal_steps": made.steps, "trained": self.given.parameters}

        small = self.subject.load()
        stages = {"": "rounded", "refined": "refined", "healed": f"{self.given.parameters}-healed"}
        for (after, name), step in zip(stages.items(), (rounded, refined, healed), strict=True):
            small, found = self.stage(f"{share}-{name}", small, step)
            row |= found
            yield {**row, "after": after, **self.judged(small)}

    def stage(self, name: str, model: nn.Module, step: Callable[[nn.Module], Row]) -> tuple[nn.Module, Row]:
        """Return the model after one step and what the step tells, from the working folder if it is there."""
        path = self.given.work and self.given.work / f"{self.subject.name}-whole-{name}.safetensors"
        told = path and path.with_suffix(".json")
        if told and told.is_file():
            return tn.load_model(self.subject.load(), path), json.loads(told.read_text())
        start = time.process_time()
        found = step(model)
        found[f"{name.rpartition('-')[2]}_seconds"] = time.process_time() - start
        if path and told:
            tn.save_model(model, path)
            told.write_text(json.dumps(found))
        return model, found

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


def training(cache: Path, subject: Subject, length: int, rows: int) -> Batches:
    """Return batches of windows of the PostgreSQL manual, in random order."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(subject.folder)
    found = token_windows(tokenizer, read_text(cache / "texts", "training"), length=length)
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))
    return windows(found[order], rows)


def refitting(cache: Path, subject: Subject) -> Batches:
    """Return calibration windows of a second seed by turns with as many of the PostgreSQL manual."""
    near = subject.calibration(1)
    rows, length = near[0]["input_ids"].shape
    far = training(cache, subject, length, rows)[: len(near)]
    return [batch for pair in zip(near, far, strict=True) for batch in pair]


def main(arguments: Sequence[str] | None = None) -> Path:
    """Measure the rows that are missing, and add each to the record at once."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cache", type=Path, nargs="?")
    parser.add_argument(
        "--toy", action="store_true", help="the embedded model, few windows, three seconds of healing"
    )
    parser.add_argument("--shares", nargs="+", type=float, default=[0.25, 0.2])
    parser.add_argument("--calibration", type=int, default=72, help="windows of 512 tokens")
    parser.add_argument("--heal-seconds", type=float, default=600.0)
    parser.add_argument("--parameters", choices=("vectors", "codes"), default="codes")
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--work", type=Path, help="folder for the moments")
    given = parser.parse_args(arguments)
    if given.toy:
        given.heal_seconds, subject = 3.0, bytes_models.gpt2(count=8, limit=8_000)
        bench = Bench(subject, subject.calibration(1), lambda: subject.calibration(1), given)
    else:
        subject = bytes_models.smollm2(given.cache, calibration=given.calibration)
        fewer = bytes_models.smollm2(given.cache, calibration=24)
        texts = refitting(given.cache, fewer)
        bench = Bench(subject, texts, lambda: training(given.cache, subject, 256, 2), given)
    path = given.records / "whole_model.json"
    for share in given.shares:
        known = json.loads(path.read_text())["rows"] if path.is_file() else []
        if any(row["share"] == share and row.get("trained") == given.parameters for row in known):
            continue
        # What comes before healing is made again; rows of other trained parameters stay.
        kept = [row for row in known if row["share"] != share or "trained" in row]
        for row in bench.rows(share):
            kept.append({"model": subject.name, **row})
            print(kept[-1], flush=True)
            record("whole_model", kept, folder=given.records, dtype="float32")
    return path


if __name__ == "__main__":
    print(main())
