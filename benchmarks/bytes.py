"""How much does the loss increase at equal bytes: for one plan over formats and ranks, and for quantizers?

Every row is one model after calibration alone, all linear layers but the output head, at a number of bits
of a weight, scales included. `plan` chooses format and rank of every layer; `two-sided`, `one-sided` (GPTQ
by our code) and `nearest` use one format everywhere, integers in groups of 32 with 8-bit scales or of 64
with 16-bit ones, which are as large. Peers run as installed packages with their defaults, symmetric groups
of 64 (hqq: zero points, groups of 128, as many bytes). They write dequantized weights, and one judge
measures all. Calibration, validation and judged windows do not overlap, and are of different sources for
MiniLM and SmolLM2. `predicted` is the forecast of the plan by its moments alone, `validation` the rises that
correct it, measured on other text. SmolLM2 has its residual stream turned: the published file holds weights
on a 4-bit grid. Seconds are those of the processor, since the machine is shared; peak memory is of a whole
process. Rows that the record has are skipped, so that a run goes on where one ended.

    OMP_NUM_THREADS=1 python benchmarks/bytes.py [--toy] [--models gpt2 minilm smollm2] [--cache CACHE]
        [--peers ENVIRONMENT/bin/python] [--methods plan gptq] [--seeds 0 1 2]

The peers need an environment of their own: `pip install 'tensornet-torch[peers]'`. Writes `bytes.json`.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
import bytes_models
from bytes_models import Subject, judge, pooled, sample, tokens_of
from harness import RECORDS, provenance, record

import tensornet as tn
from tensornet.calibration.losses import losses_against
from tensornet.compression import check_loss, measure, prepare
from tensornet.compression.apply import MadeLayers
from tensornet.compression.sensitivity import INPUT_DAMPING, layer_weighting
from tensornet.linalg.weighted_svd import damped
from tensornet.nn.targets import LayerSelection, Target, find_targets
from tensornet.quantization import round_weight
from tensornet.quantization.moments import DENSE_ROW_DAMPING, ROW_DAMPING
from tensornet_hf.streaming import peak_memory

SIZES = (8.25, 6.25, 4.25, 3.25, 2.25)
PEERS = ("torchao", "hqq", "gptq", "autoround")
OURS = ("plan", "two-sided", "one-sided", "nearest")
#: Methods measured with every seed of calibration windows; the others look at no text, or take long.
SEEDED = ("plan", "two-sided", "one-sided", "gptq")
#: Formats of the methods that use one everywhere; all take the bits and a quarter.
UNIFORM = {"two-sided": "int{}:g32:float8", "one-sided": "int{}:g64", "nearest": "int{}:g64"}
#: The model runs in this dtype for moments of both sides, twice as fast.
AUTOCAST = torch.bfloat16
Row = dict[str, Any]


class Book:
    """Record file: rows measured so far, and rows still missing."""

    def __init__(self, folder: Path, subject: Subject, origin: Mapping[str, Any]) -> None:
        self.folder, self.subject, self.origin = folder, subject, origin

    def rows(self) -> list[Row]:
        """Read all rows from the file: another process may have added some."""
        path = self.folder / "bytes.json"
        return json.loads(path.read_text())["rows"] if path.is_file() else []

    def missing(self, method: str, seed: int, sizes: Sequence[float]) -> list[float]:
        """List the sizes at which a method has not been measured."""
        known = {(r["model"], r["method"], r["seed"], r["bits"]) for r in self.rows()}
        return [bits for bits in sizes if (self.subject.name, method, seed, bits) not in known]

    def add(self, method: str, seed: int, bits: float, **found: Any) -> None:
        """Append one row to the file."""
        row = {"model": self.subject.name, "method": method, "seed": seed, "bits": bits, **found}
        row |= {"unit": self.subject.unit, "threads": torch.get_num_threads(), **self.origin}
        print(row, flush=True)
        record("bytes", [*self.rows(), row], folder=self.folder, dtype="float32")


class Bench:
    """One model and its judge; calibration statistics are cached for each seed."""

    def __init__(self, subject: Subject, book: Book, work: Path | None, workers: int) -> None:
        self.subject, self.book, self.work, self.workers = subject, book, work, workers
        self.prepared: dict[int, tuple[nn.Module, tn.CalibrationStats, float]] = {}
        self.made: dict[float, MadeLayers] = {}

    @cached_property
    def judged(self) -> tuple[list[Tensor], Tensor, str | None]:
        """Dense model's outputs (encoders only), token losses and sample."""
        model = self.subject.load()
        dense = [pooled(model, x) for x in self.subject.judged] if self.subject.encoder else []
        return dense, judge(self.subject, model, dense), sample(self.subject, model)

    def statistics(self, seed: int) -> tuple[nn.Module, tn.CalibrationStats, float]:
        """Return a dense model, its moments for a seed, and the seconds that collecting them took."""
        if seed not in self.prepared:
            model = self.subject.load()
            stats, seconds = self.kept(f"moments-{seed}", lambda: self.calibrated(model, seed))
            self.prepared = {seed: (model, stats, seconds)}
        return self.prepared[seed]

    def calibrated(self, model: nn.Module, seed: int) -> tn.CalibrationStats:
        """Collect moments of inputs and gradients, with the model run in bfloat16."""
        return tn.calibrate(
            model,
            self.subject.calibration(seed),
            config=self.subject.layers,
            loss_fn=self.subject.losses,
            autocast=AUTOCAST,
        )

    def kept(self, name: str, make: Callable[[], Any]) -> tuple[Any, float]:
        """Return the result of a slow step and its processor seconds, from the working folder if kept."""
        path = None if self.work is None else self.work / f"{self.subject.name}-{name}.pt"
        if path is not None and path.is_file():
            return torch.load(path, weights_only=False)
        start = processor_seconds()
        found = make(), processor_seconds() - start
        if path is not None:
            torch.save(found, path)
        return found

    def rise(self, model: nn.Module) -> Row:
        """Measure the loss increase over the dense model with its standard error, and write a sample."""
        (dense, losses, written), _ = self.kept("judged", lambda: self.judged)
        rises = judge(self.subject, model, dense) - losses
        samples = {} if written is None else {"sample": sample(self.subject, model), "dense_sample": written}
        return samples | {
            "loss_increase": float(rises.mean()),
            "standard_error": float(rises.std() / len(rises) ** 0.5),
            "dense_loss": float(losses.mean()),
        }

    def plan(self, seed: int, sizes: Sequence[float]) -> None:
        """Measure plans at every size, and the validation losses that correct their forecast."""
        model, stats, calibrated = self.statistics(seed)
        config = tn.CompressionConfig(bits_per_weight=max(SIZES), **asdict(self.subject.layers))
        batches = self.subject.calibration(seed)
        made, planned = self.kept(f"verified-{seed}", lambda: self.plans(model, config, stats, batches))
        loss_fn = losses_against(model)
        for bits in sizes:
            (plan, verified), start = made[bits], processor_seconds()
            small = self.subject.load()
            tn.apply_plan(small, plan, stats, made=self.made.get(bits))
            seconds = processor_seconds() - start
            rises = {}
            for name, data in self.subject.validation.items():
                rises[name] = measure(small, model, data, loss_fn=loss_fn, source=name).to_dict()
            formats: dict[str, int] = {}
            for layer in plan:
                name = "float" if layer.topology is None else layer.storage.number_format.name
                if layer.topology is not None and layer.topology.family != "dense":
                    name = f"{layer.topology.family} {name}"
                formats[name] = formats.get(name, 0) + 1
            self.book.add(
                "plan",
                seed,
                bits,
                bits_per_weight=plan.bits_per_weight,
                **self.rise(small),
                predicted={"alone": plan.predicted_loss_increase},
                validation=rises,
                formats=formats,
                loss_check=None if plan.loss_check is None else plan.loss_check.to_dict(),
                seconds={
                    "calibrate": calibrated,
                    "plan": planned - sum(spent for _, spent in made.values()),
                    "verify": verified,
                    "round": seconds,
                },
                peak_mib=peak_mib(),
            )

    def plans(
        self,
        model: nn.Module,
        config: tn.CompressionConfig,
        stats: tn.CalibrationStats,
        batches: Sequence[Mapping[str, Tensor]],
    ) -> dict[float, tuple[tn.CompressionPlan, float]]:
        """Compute the plans of all sizes, each checked by itself, and the seconds that checking took.

        They include rounding the layers that are measured, which is not repeated.
        """
        prepared = prepare(model, config, stats)
        self.made = {bits: {} for bits in SIZES}
        made = {}
        for bits in SIZES:
            start = processor_seconds()
            alone = replace(prepared, made=self.made[bits])
            alone = check_loss(alone, model, stats, batches, bits_per_weight=bits)
            made[bits] = alone.plan(bits_per_weight=bits), processor_seconds() - start
        return made

    def uniform(self, method: str, seed: int, sizes: Sequence[float]) -> None:
        """Measure one format for all layers, rounded by this library."""
        for bits in sizes:
            name, model, calibrated, stats = UNIFORM[method].format(int(bits)), self.subject.load(), 0.0, None
            if method != "nearest":
                _, stats, calibrated = self.statistics(seed)
            start = time.process_time()
            for target in (x for x in find_targets(model, self.subject.layers) if not x.skip):
                options = rounding_options(method, target, stats)
                target.matrix.copy_(round_weight(target.matrix, name, **options).dequantize())
            rounded = time.process_time() - start
            self.book.add(
                method,
                seed,
                bits,
                bits_per_weight=float(int(bits) + 0.25),
                **self.rise(model),
                seconds={"calibrate": calibrated, "round": rounded},
                peak_mib=peak_mib(),
            )

    def peer(self, method: str, seed: int, sizes: Sequence[float], python: Path) -> None:
        """Measure an installed package, which runs in a process of its own."""
        from safetensors.torch import load_file, save_file

        script = Path(__file__).with_name("bytes_peers.py")
        with tempfile.TemporaryDirectory() as scratch:
            given = Path(scratch) / "calibration.safetensors"
            save_file(joined(self.subject.calibration(seed)), given)
            command = [str(python), str(script), str(self.subject.folder), str(given), scratch]
            command += ["--method", method, "--bits", *(str(int(bits)) for bits in sizes)]
            command += ["--encoder"] if self.subject.encoder else []
            done = subprocess.run(command, check=False, capture_output=True, text=True)
            for bits in sizes:
                said = Path(scratch) / f"{int(bits)}.json"
                if not said.is_file():
                    raise SystemExit(f"{method} ended early:\n{done.stderr[-2000:]}")
                found = json.loads(said.read_text())
                seconds, version = {"all": found["seconds"]}, found["version"]
                if "refused" in found:
                    self.book.add(
                        method, seed, bits, refused=found["refused"], version=version, seconds=seconds
                    )
                    continue
                model = self.subject.load()
                put(model, load_file(Path(scratch) / f"{int(bits)}.safetensors"), self.subject)
                self.book.add(
                    method,
                    seed,
                    bits,
                    bits_per_weight=int(bits) + 0.25,
                    **self.rise(model),
                    version=version,
                    seconds=seconds,
                    peak_mib=found["peak_mib"],
                )


def processor_seconds() -> float:
    """Return the processor seconds that this process and its children have used."""
    used = (resource.getrusage(x) for x in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(x.ru_utime + x.ru_stime for x in used)


def peak_mib() -> int:
    """Return the peak memory of this process so far in MiB, the model and its texts included."""
    return peak_memory() // 2**20


def rounding_options(method: str, target: Target, stats: tn.CalibrationStats | None) -> dict[str, Any]:
    """Build the arguments of `round_weight` for one of the uniform methods."""
    if stats is None:
        return {"rounding": "nearest", "refits": 0}
    if method == "one-sided":
        return {"rounding": "one_sided", "columns": damped(stats.columns[target.names[0]], INPUT_DAMPING)}
    found = layer_weighting(target, "curvature", stats, ROW_DAMPING)
    if found is None:
        raise SystemExit(f"no gradient reaches {target.name}")
    return {"rows": found.rows, "columns": found.columns, "row_damping": DENSE_ROW_DAMPING}


def joined(batches: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Concatenate all windows into one tensor for each argument, shorter ones padded."""
    length = max(batch["input_ids"].shape[1] for batch in batches)
    return {
        name: torch.cat(
            [nn.functional.pad(batch[name], (0, length - batch[name].shape[1])) for batch in batches]
        )
        for name in ("input_ids", "attention_mask")
    }


@torch.no_grad()
def put(model: nn.Module, weights: Mapping[str, Tensor], subject: Subject) -> None:
    """Copy weights `(out, in)` into a dense model; layers that are not targeted keep theirs.

    Raises:
        SystemExit: a targeted layer has none.
    """
    targets = {x.name: x.matrix for x in find_targets(model, subject.layers) if not x.skip}
    if missing := sorted(targets.keys() - weights.keys()):
        raise SystemExit(f"a peer left out {missing}")
    for name, matrix in targets.items():
        matrix.copy_(weights[name])


def subjects(given: argparse.Namespace) -> dict[str, Callable[[], Subject]]:
    """Return functions that make the models, by name."""
    if given.toy:
        layers = LayerSelection(target_modules=("h.3.attn.c_proj", "h.2.attn.c_proj"))
        return {"gpt2": lambda: bytes_models.gpt2(count=8, limit=8_000, layers=layers)}
    return {
        "gpt2": bytes_models.gpt2,
        "minilm": lambda: bytes_models.minilm(given.cache),
        "smollm2": lambda: bytes_models.smollm2(given.cache),
    }


def run(subject: Subject, given: argparse.Namespace) -> None:
    """Measure all missing rows of one model."""
    origin = {key: provenance()[key] for key in ("date", "commit", "dirty", "device", "load")}
    origin["calibration_tokens"] = tokens_of(subject.calibration(0))
    origin["judged_tokens"] = tokens_of(subject.judged)
    book = Book(given.records, subject, origin)
    bench = None
    for seed in given.seeds if subject.name == "gpt2" else given.seeds[:1]:
        for method in given.methods:
            if method not in SEEDED and seed != given.seeds[0]:
                continue
            sizes = book.missing(method, seed, given.sizes)
            if not sizes or (method in PEERS and given.peers is None):
                continue
            bench = bench or Bench(subject, book, given.work, given.workers)
            if method == "plan":
                bench.plan(seed, sizes)
            elif method in PEERS:
                bench.peer(method, seed, sizes, given.peers)
            else:
                bench.uniform(method, seed, sizes)


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run what is missing and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--toy", action="store_true", help="two sizes of the embedded model, few tokens")
    parser.add_argument("--models", nargs="+", default=["gpt2", "minilm", "smollm2"])
    parser.add_argument("--methods", nargs="+", default=[*OURS, *PEERS], choices=[*OURS, *PEERS])
    parser.add_argument("--sizes", nargs="+", type=float, default=list(SIZES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--cache", type=Path, help="folder of `real_data.py`")
    parser.add_argument("--peers", type=Path, help="Python with the extra `peers`; without it no peers")
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--work", type=Path, help="folder for moments and plans that several runs share")
    parser.add_argument("--workers", type=int, default=1, help="processes that plan")
    given = parser.parse_args(arguments)
    if given.toy:
        given.models, given.sizes, given.seeds = ["gpt2"], [4.25, 3.25], [0]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name in given.models:
            run(subjects(given)[name](), given)
    finally:
        torch.set_num_threads(before)
    return given.records / "bytes.json"


if __name__ == "__main__":
    print(main())
