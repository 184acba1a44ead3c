"""How much do plans of formats and ranks increase the loss, compared with quantizers at equal bytes?

Every row is a model compressed with calibration but without training: all linear layers except the output
head have the given number of bits per weight, scales included. The methods of this library are configurations
of the same pipeline. `plan` chooses the format of every layer; `thorough-plan` does so with
`effort="thorough"`, and may choose ranks too. `two-sided`, `one-sided` (as GPTQ) and `nearest` use one format
for all layers: integers in groups of 32 with 8-bit scales, or in groups of 64 with 16-bit scales (both take
the same bytes). Peers are installed packages with default options and symmetric groups of 64 (hqq: zero
points and groups of 128, which take the same bytes). They write dequantized weights, and all methods are
judged on the same windows. Calibration, validation and judged windows do not overlap; for MiniLM and SmolLM2
they come from different sources.

`predicted` is the predicted loss increase of the plan, `validation` the measured one on other text. SmolLM2
is rotated, since the weights of the published file lie on a 4-bit grid; `rotated` names the rotated parts (in
rows without it only the residual stream is rotated). Seconds are processor seconds, since the machine is
shared; peak memory is that of the whole process. Rows that are in the record are skipped, so that an
interrupted run can be continued.

    OMP_NUM_THREADS=1 python benchmarks/bytes.py [--toy] [--models gpt2 minilm smollm2] [--cache CACHE]
        [--peers ENVIRONMENT/bin/python] [--methods plan gptq] [--seeds 0 1 2]

The peers need a separate environment: `pip install 'tensornet-torch[peers]'`. Writes `bytes.json`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
import subjects
from harness import RECORDS, peak_mib, processor_seconds, provenance, record
from subjects import Batches, Subject, tokens_of

import tensornet as tn
from tensornet.calibration.losses import losses_against, pooled
from tensornet.compression import Survey, measure, record_losses
from tensornet.compression.loss_increase import RecordedLosses
from tensornet.nn.extension import ProvidedData
from tensornet.nn.targets import LayerSelection, find_targets

SIZES = (8.25, 6.25, 4.25, 3.25, 2.25)
PEERS = ("torchao", "hqq", "gptq", "autoround")
#: Options of the configuration for each method; `{}` in a format is replaced by the number of bits.
OURS: dict[str, dict[str, Any]] = {
    "plan": {},
    "thorough-plan": {"effort": "thorough"},
    "two-sided": {"formats": ("int{}:g32:float8",)},
    "one-sided": {"formats": ("int{}:g64",), "method": "gptq"},
    "nearest": {"formats": ("int{}:g64",), "method": "nearest"},
}
PLANS = ("plan", "thorough-plan")
#: Methods measured with every seed of the calibration windows. The others use no text, or take too long.
SEEDED = (*PLANS, "two-sided", "one-sided", "gptq")
Row = dict[str, Any]


class Book:
    """File with the record of one model; rows are added when they are measured."""

    def __init__(self, folder: Path, subject: Subject, origin: Mapping[str, Any]) -> None:
        self.folder, self.subject, self.origin = folder, subject, origin

    def rows(self) -> list[Row]:
        """Read all rows from the file again, since another process may have added some."""
        path = self.folder / "bytes.json"
        return json.loads(path.read_text())["rows"] if path.is_file() else []

    def missing(self, method: str, seed: int, sizes: Sequence[float]) -> list[float]:
        """List the sizes that were not measured yet with this method and seed."""
        known = {(r["model"], r["method"], r["seed"], r["bits"]) for r in self.rows()}
        return [bits for bits in sizes if (self.subject.name, method, seed, bits) not in known]

    def add(self, method: str, seed: int, bits: float, **found: Any) -> None:
        row = {"model": self.subject.name, "method": method, "seed": seed, "bits": bits, **found}
        row |= {"unit": self.subject.unit, **self.origin}
        print(row, flush=True)
        record("bytes", [*self.rows(), row], folder=self.folder, dtype="float32")


class Bench:
    """Measures one model at every size with every method.

    Args:
        subject: the model and its texts.
        book: receives the rows.
    """

    def __init__(self, subject: Subject, book: Book) -> None:
        self.subject, self.book = subject, book
        self.dense = subject.load()
        self.sample = subject.sample(self.dense)
        self.recorded = self.judged()

    def judged(self) -> RecordedLosses:
        """Record the dense model's losses on the windows for testing.

        For encoders, the loss of any model is the cosine distance of its outputs to the dense model's.
        """
        loss_fn = None
        if self.subject.encoder:

            def loss_fn(model: nn.Module, batch: Any) -> Tensor:
                with torch.no_grad():
                    wanted = pooled(self.dense(**batch), batch)
                return 1 - nn.functional.cosine_similarity(pooled(model(**batch), batch), wanted)

        found = record_losses(self.dense, self.subject.judged, loss_fn=loss_fn, source="judged", tokens=None)
        assert found is not None
        return found

    def loss_increase(self, model: nn.Module) -> Row:
        """Measure the loss increase over the dense model with its standard error, and generate a sample."""
        found = measure(model, self.recorded)
        row = {"loss_increase": found.mean, "standard_error": found.stderr, "dense_loss": found.dense_loss}
        if self.sample is not None:
            row |= {"sample": self.subject.sample(model), "dense_sample": self.sample}
        return row if found.kl_mean is None else row | {"kl": found.kl_mean}

    def ours(self, method: str, seed: int, sizes: Sequence[float]) -> None:
        """Measure a method of this library at every size; plans are also measured on validation text."""
        data = ProvidedData(self.subject.calibration(seed), "calibration text", self.subject.losses)
        survey: Survey | None = None
        for bits in sizes:
            options = dict(OURS[method])
            if "formats" in options:
                names = (name.format(int(bits)) for name in options["formats"])
                options |= {"formats": tuple(names), "topology": "dense"}
            config = tn.CompressionConfig(bits_per_weight=bits, **asdict(self.subject.layers), **options)
            start, small = processor_seconds(), self.subject.load()
            if method in PLANS and survey is None:  # one survey serves all sizes
                survey = tn.survey(self.dense, data.batches, config, loss_fn=data.loss_fn)
            planned = processor_seconds()
            text = None if method == "nearest" else data
            plan = tn.compress(small, config, calibration=text, survey=survey, progress=False).plan
            seconds = {"survey": planned - start, "compress": processor_seconds() - planned}
            row: Row = {"seconds": seconds, "peak_mib": peak_mib()}
            if method in PLANS:
                row |= self.forecast(plan, small)
            row |= {"bits_per_weight": plan.bits_per_weight, **self.loss_increase(small)}
            self.book.add(method, seed, bits, **row)

    def forecast(self, plan: tn.CompressionPlan, small: nn.Module) -> Row:
        """Return a plan's formats, predicted loss increase, and increase measured on validation texts."""
        loss_fn = losses_against(self.dense)
        formats: Counter[str] = Counter()
        for layer in plan:
            dense = layer.topology is None or layer.topology.family == "dense"
            name = "float" if layer.topology is None else layer.storage.number_format.name
            formats[name if dense else f"{layer.topology.family} {name}"] += 1
        return {
            "predicted": {"alone": plan.predicted_loss_increase},
            "validation": {
                name: asdict(measure(small, self.dense, data, loss_fn=loss_fn, source=name))
                for name, data in self.subject.validation.items()
            },
            "formats": dict(formats),
        }

    def peer(self, method: str, seed: int, sizes: Sequence[float], python: Path) -> None:
        """Measure another package (`method`) at every size, in a process of the interpreter `python`."""
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
                row: Row = {"version": found["version"], "seconds": {"all": found["seconds"]}}
                if "refused" in found:
                    row["refused"] = found["refused"]
                else:
                    model = self.subject.load()
                    put(model, load_file(Path(scratch) / f"{int(bits)}.safetensors"), self.subject)
                    row |= {"bits_per_weight": int(bits) + 0.25, "peak_mib": found["peak_mib"]}
                    row |= self.loss_increase(model)
                self.book.add(method, seed, bits, **row)


def joined(batches: Batches) -> dict[str, Tensor]:
    """Concatenate the batches into one tensor for each argument, with padding to the longest batch."""
    length = max(batch["input_ids"].shape[1] for batch in batches)

    def padded(x: Tensor) -> Tensor:
        return nn.functional.pad(x, (0, length - x.shape[1]))

    return {x: torch.cat([padded(batch[x]) for batch in batches]) for x in ("input_ids", "attention_mask")}


@torch.no_grad()
def put(model: nn.Module, weights: Mapping[str, Tensor], subject: Subject) -> None:
    """Copy weights `(out, in)`, given by name, into the targeted layers of a dense model.

    Raises:
        SystemExit: there is no weight for a targeted layer.
    """
    targets = {x.name: x.matrix for x in find_targets(model, subject.layers) if not x.skip}
    if missing := sorted(targets.keys() - weights.keys()):
        raise SystemExit(f"a peer left out {missing}")
    for name, matrix in targets.items():
        matrix.copy_(weights[name])


def models(given: argparse.Namespace) -> dict[str, Callable[[], Subject]]:
    if given.toy:
        few = LayerSelection(target_modules=("h.3.attn.c_proj", "h.2.attn.c_proj"))
        return {"gpt2": lambda: subjects.gpt2(count=8, limit=8_000, layers=few)}
    return {
        "gpt2": subjects.gpt2,
        "minilm": lambda: subjects.minilm(given.cache),
        "smollm2": lambda: subjects.smollm2(given.cache),
    }


def run(subject: Subject, given: argparse.Namespace) -> None:
    origin = {key: provenance()[key] for key in ("date", "commit", "dirty", "device", "load", "threads")}
    origin["calibration_tokens"] = tokens_of(subject.calibration(0))
    origin["judged_tokens"] = tokens_of(subject.judged)
    if subject.rotated is not None:
        origin["rotated"] = subject.rotated
    book, bench = Book(given.records, subject, origin), None
    for seed in given.seeds if subject.name == "gpt2" else given.seeds[:1]:
        for method in given.methods:
            if method not in SEEDED and seed != given.seeds[0]:
                continue
            sizes = book.missing(method, seed, given.sizes)
            if not sizes or (method in PEERS and given.peers is None):
                continue
            bench = bench or Bench(subject, book)
            if method in PEERS:
                bench.peer(method, seed, sizes, given.peers)
            else:
                bench.ours(method, seed, sizes)


def main(arguments: Sequence[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--toy", action="store_true", help="two sizes of the embedded model, few tokens")
    parser.add_argument("--models", nargs="+", default=["gpt2", "minilm", "smollm2"])
    parser.add_argument("--methods", nargs="+", default=[*OURS, *PEERS], choices=[*OURS, *PEERS])
    parser.add_argument("--sizes", nargs="+", type=float, default=list(SIZES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--cache", type=Path, help="folder of models and texts, see subjects.py")
    parser.add_argument("--peers", type=Path, help="Python with the extra `peers`; without it, no peers")
    parser.add_argument("--records", type=Path, default=RECORDS)
    given = parser.parse_args(arguments)
    if given.toy:
        given.models, given.sizes, given.seeds = ["gpt2"], [4.25, 3.25], [0]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name in given.models:
            run(models(given)[name](), given)
    finally:
        torch.set_num_threads(before)
    return given.records / "bytes.json"


if __name__ == "__main__":
    print(main())
