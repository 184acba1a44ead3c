"""How much do our plans and llama.cpp's presets increase the loss, in GGUF files of equal bytes?

    OMP_NUM_THREADS=1 python benchmarks/gguf_files.py [--toy] [--models gpt2 smollm2] [--cache CACHE]
        [--tools LLAMA_CPP/build/bin] [--work FOLDER] [--steps files speed]

Presets are made by `llama-quantize` with an importance matrix of `llama-imatrix`, from the same calibration
text as our plans. For every preset there is a plan with `formats="gguf"` whose `max_bytes` is the size of the
preset's file, and there is one plan for three quarters of the bytes of Q4_K_M. Plans include the embedding
and the output head. transformers dequantizes every file. All files are judged on one held-out text, from
a source that calibration does not use, by the loss increase over the dense model and the KL divergence, with
standard errors over tokens. `predicted` is the predicted loss increase of the plan.

The step `speed` measures the tokens per second of every file with `llama-bench` on one thread, in turn, and
their ratio to those of the preset of the same size. llama.cpp rounds activations to 8 bits, so
`llama-perplexity` measures the divergence of its outputs from those of the same weights in float32.

The residual stream of SmolLM2 is rotated, since the weights of the published file lie on a 4-bit grid.
`smollm2-wide` is the same model, padded with zeros before rotation such that its rows are multiples of 256,
as K types need. With `--fast` plans do not use Q5_0 and IQ4 (rows `fast plan`). Without `--tools` only plans
are measured, for the sizes `--megabytes`. Seconds are processor seconds. Rows in the record and files in the
work folder are not made again.

The tools come from the source package of `llama-cpp-python`: run `cmake -B build -DLLAMA_CURL=OFF`, then
`cmake --build build` in its folder `vendor/llama.cpp`. Writes `gguf_files.json`.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).parent))
import subjects
from harness import RECORDS, peak_mib, processor_seconds, provenance, record
from subjects import Subject, tokens_of

import tensornet as tn
import tensornet_hf as th
from tensornet.compression import PriceList, price
from tensornet_hf.checkpoint import load_gguf
from tensornet_hf.compress import for_target
from tensornet_hf.evaluate import divergence

PRESETS = ("Q8_0", "Q4_K_M", "Q4_0", "IQ4_XS", "IQ3_S", "Q2_K")
#: A preset, and the budget of an additional plan as a fraction of the preset's bytes.
POPULAR, SHARE = "Q4_K_M", 0.75
#: For the picture: presets whose names are left of their points, and titles of the models.
SMALLEST = ("IQ3_S", "Q2_K")
TITLES = {
    "gpt2": "embedded GPT-2",
    "smollm2": "SmolLM2-135M, rotated",
    "smollm2-wide": "SmolLM2-135M, padded to 768",
}
STEPS = ("files", "others", "speed")
#: Style and label of each method in the picture.
STYLES = {
    "plan": ("o-", "tensornet, one plan"),
    "llama-quantize": ("s", "llama.cpp, with importance matrix"),
    "other": ("^", "other tools"),
}
Row = dict[str, Any]


class Bench:
    """Makes and measures the files of one model.

    Args:
        subject: the model and its texts.
        given: options of the command line.
    """

    def __init__(self, subject: Subject, given: argparse.Namespace) -> None:
        self.subject, self.given = subject, given
        self.work = given.work / subject.name
        self.work.mkdir(parents=True, exist_ok=True)
        file = given.records / "gguf_files.json"
        self.rows: list[Row] = json.loads(file.read_text())["rows"] if file.is_file() else []
        self.tokens = torch.cat([batch["input_ids"].flatten() for batch in subject.judged])
        self.context = subject.judged[0]["input_ids"].shape[1]
        self.dense = subject.load()
        self.prices: PriceList | None = None
        self.prefix = "fast plan " if given.fast else "plan "

    def row(self, name: str) -> Row | None:
        """Find the row of a file by its name; None if it was not measured."""
        return next((x for x in self.rows if (x["model"], x["name"]) == (self.subject.name, name)), None)

    def write(self) -> Path:
        return record("gguf_files", self.rows, folder=self.given.records)

    def tool(self, name: str, *arguments: object) -> str:
        command = [str(self.given.tools / name), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stdout[-1000:]}\n{done.stderr[-2000:]}")
        return done.stdout + done.stderr

    def judge(self, name: str, file: Path, **facts: Any) -> None:
        """Measure a file on the test windows, and add a row with the results and `facts` to the record."""
        found = divergence(load_gguf(file), self.dense, self.tokens, context=self.context)
        origin = {x: provenance()[x] for x in ("date", "commit", "dirty", "device", "load", "threads")}
        size, weights = file.stat().st_size, sum(p.numel() for p in self.dense.parameters() if p.ndim > 1)
        row = {
            "model": self.subject.name,
            "name": name,
            "bytes": size,
            "bits_per_weight": 8 * size / weights,
            "loss_increase": found.loss_increase,
            "kl": found.mean,
            "kl_median": found.median,
            "kl_99": found.percentile_99,
            "same_top": found.same_top,
            "perplexity": found.perplexity.perplexity,
            **facts,
            "judged_tokens": len(self.tokens),
            "calibration_tokens": tokens_of(self.subject.calibration(0)),
            **origin,
        }
        self.rows.append(row)
        self.write()
        print(name, size, found.loss_increase, found.mean, flush=True)

    def presets(self) -> None:
        """Write the file of every preset of llama.cpp, and measure its loss."""
        dense, matrix, text = (self.work / x for x in ("dense.gguf", "importance.gguf", "text.txt"))
        if not dense.is_file():
            th.export(self.dense, dense, source=self.subject.folder)
        if not matrix.is_file():
            tokenizer = AutoTokenizer.from_pretrained(self.subject.folder)
            windows = [x for batch in self.subject.calibration(0) for x in batch["input_ids"]]
            text.write_text(tokenizer.decode(torch.cat(windows), skip_special_tokens=True))
            self.tool("llama-imatrix", "-m", dense, "-f", text, "-o", matrix, "-c", self.context, "-t", 1)
        for name in self.given.presets:
            file = self.work / f"{name}.gguf"
            if not file.is_file():
                self.tool("llama-quantize", "--imatrix", matrix, dense, file, name, 1)
            if self.row(name) is None:
                self.judge(name, file, method="llama-quantize")

    def plans(self) -> None:
        """Write a plan's file for each given size and for the size of each preset, and measure its loss."""
        sizes = {f"{x:g} MB": round(1e6 * x) for x in self.given.megabytes}
        if self.given.tools is not None:
            sizes |= {x: (self.work / f"{x}.gguf").stat().st_size for x in self.given.presets}
            if POPULAR in sizes:
                sizes[f"{SHARE:g} {POPULAR}"] = round(SHARE * sizes[POPULAR])
        done: list[int] = []
        for name, size in sizes.items():
            if any(abs(size / x - 1) < 0.002 for x in done):
                continue
            done.append(size)
            if self.row(f"{self.prefix}{name}") is None:
                self.plan(f"{self.prefix}{name}", size)

    def plan(self, name: str, size: int) -> None:
        """Write the file of the plan for one size, and measure its loss."""
        subject = self.subject
        formats = "gguf-fast" if self.given.fast else "gguf"
        asked = tn.CompressionConfig(max_bytes=size, formats=formats, effort="thorough")
        config = for_target("gguf", asked, self.dense, subject.folder)
        seconds = {}
        start = processor_seconds()
        stats = self.statistics(config)
        if self.prices is None:
            seconds["calibrate"], start = processor_seconds() - start, processor_seconds()
            self.prices = price(self.dense, config, stats)
            seconds["prepare"] = processor_seconds() - start
        plan = self.prices.plan(max_bytes=config.max_bytes)
        small, start = subject.load(), processor_seconds()
        tn.apply_plan(small, plan, stats)
        seconds["round"], start = processor_seconds() - start, processor_seconds()
        file = self.work / f"{name.replace(' ', '-')}.gguf"
        report = th.export(small, file, source=subject.folder, force=True)
        seconds["export"] = processor_seconds() - start
        facts = {
            "method": self.prefix.strip(),
            "asked_bytes": size,
            "predicted": plan.predicted_loss_increase,
            "types": dict(Counter(report.packed.values())),
            "seconds": seconds,
            "peak_mib": peak_mib(),
        }
        self.judge(name, file, **facts)

    def statistics(self, config: tn.CompressionConfig) -> tn.CalibrationStats:
        """Collect calibration statistics, or read them from the work folder."""
        file = self.work / "moments.safetensors"
        if file.is_file():
            return tn.CalibrationStats.load(file)
        batches = self.subject.calibration(0)
        options: dict[str, Any] = {"autocast": torch.bfloat16, "tokens": tokens_of(batches)}
        stats = tn.calibrate(self.dense, batches, config=config, **options)
        stats.save(file)
        return stats

    def speed(self) -> None:
        """Measure `own_divergence` and llama.cpp's tokens per second for the files of plans and presets."""
        pairs = {
            row["name"]: row["name"].removeprefix(self.prefix)
            for row in self.rows
            if row["model"] == self.subject.name
            and row["name"].removeprefix(self.prefix) in self.given.presets
        }
        files = {name: self.work / f"{name.replace(' ', '-')}.gguf" for name in pairs}
        rates: dict[str, dict[str, list[float]]] = {x: {"generated": [], "read": []} for x in files}
        for _ in range(self.given.repeats):
            for name, file in files.items():
                said = self.tool(
                    "llama-bench", "-m", file, "-t", 1, "-p", 256, "-n", 64, "-r", 1, "-o", "json"
                )
                for test in json.loads(said[said.index("[") : said.rindex("]") + 1]):
                    rates[name]["generated" if test["n_gen"] else "read"].append(test["avg_ts"])
        for name, preset in pairs.items():
            row = self.row(name)
            assert row is not None
            for kind, values in rates[name].items():
                row[f"{kind}_per_second"] = statistics.median(values)
                ratios = [a / b for a, b in zip(values, rates[preset][kind], strict=True)]
                row[f"{kind}_over_preset"] = statistics.median(ratios)
            row["own_kl"] = self.own_divergence(files[name])
            self.write()

    def own_divergence(self, file: Path) -> float:
        """Measure the KL divergence of a file in llama.cpp from the same weights stored in float32."""
        text = self.work / "judged.txt"
        if not text.is_file():
            tokenizer = AutoTokenizer.from_pretrained(self.subject.folder)
            text.write_text(tokenizer.decode(self.tokens, skip_special_tokens=True))
        with tempfile.TemporaryDirectory(dir=self.work) as scratch:
            wide, logits = Path(scratch) / "wide.gguf", Path(scratch) / "logits"
            self.tool("llama-quantize", "--allow-requantize", file, wide, "F32", 1)
            how = ("-f", text, "-c", self.context, "--chunks", 6, "-t", 1, "--kl-divergence-base", logits)
            self.tool("llama-perplexity", "-m", wide, *how)
            said = self.tool("llama-perplexity", "-m", file, *how, "--kl-divergence")
        return float(re.search(r"Mean\s+KLD:\s+([-\d.e]+)", said)[1])  # type: ignore[index]


def picture(rows: Sequence[Row], names: Sequence[str], file: Path) -> None:
    """Draw the KL divergence over the bits per weight of the file, plans as a line and presets as points."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(names), 3.6), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        some = sorted((x for x in rows if x["model"] == name), key=lambda x: x["bits_per_weight"])
        for method, (style, label) in STYLES.items():
            found = [x for x in some if x["method"] == method]
            if not found:
                continue
            bits, kl = ([x["bits_per_weight"] for x in found], [x["kl"][0] for x in found])
            axes.plot(bits, kl, style, label=label, markersize=5, linewidth=1.5)
            for row in found if method != "plan" else ():
                place, left = (row["bits_per_weight"], row["kl"][0]), row["name"] in SMALLEST
                height = -7 if row["name"].startswith("IQ") else 0  # its point is just below another one
                offset, side = ((-6, height), "right") if left else ((6, height), "left")
                axes.annotate(row["name"], place, offset, textcoords="offset points", ha=side, fontsize=9)
        axes.set(yscale="log", xlabel="bits of the file for a weight", ylabel="KL divergence, nats a token")
        axes.set_title(TITLES.get(name, name))
        axes.grid(alpha=0.3)
        axes.margins(x=0.14)
        axes.legend(fontsize=9, loc="lower left")
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "gguf"}):
        figure.savefig(file, metadata={"Date": None})


def models(given: argparse.Namespace) -> dict[str, Any]:
    if given.toy:
        return {"gpt2": lambda: subjects.gpt2(count=8, limit=8_000)}
    return {
        "gpt2": subjects.gpt2,
        "smollm2": lambda: subjects.smollm2(given.cache, calibration=48),
        "smollm2-wide": lambda: subjects.smollm2(given.cache, calibration=48, wide=True),
    }


def main(arguments: Sequence[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--toy", action="store_true", help="one size of the embedded model, few tokens")
    parser.add_argument("--models", nargs="+", default=["gpt2", "smollm2"])
    parser.add_argument("--cache", type=Path, help="folder of models and texts, see subjects.py")
    parser.add_argument("--tools", type=Path, help="folder of llama.cpp's programs")
    parser.add_argument("--presets", nargs="+", default=PRESETS, help="presets of llama-quantize")
    parser.add_argument("--megabytes", nargs="*", type=float, default=[], help="further sizes of plans")
    parser.add_argument("--steps", nargs="+", default=STEPS, choices=STEPS)
    parser.add_argument(
        "--others", nargs="*", default=[], metavar="NAME=FILE", help="GGUF files of other tools"
    )
    parser.add_argument("--picture", type=Path, help="draw the record to this file and measure nothing")
    parser.add_argument(
        "--fast", action="store_true", help="plans without Q5_0 and IQ4, whose kernels are slow"
    )
    parser.add_argument("--repeats", type=int, default=5, help="number of runs of llama-bench")
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--work", type=Path, default=Path("gguf-work"), help="folder for the GGUF files")
    given = parser.parse_args(arguments)
    if given.toy:
        given.models, given.megabytes, given.steps = ["gpt2"], [0.7], ["files"]
        given.work = given.records / "gguf-work"
    file = given.records / "gguf_files.json"
    if given.picture is not None:
        picture(json.loads(file.read_text())["rows"], given.models, given.picture)
        return Path(given.picture)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name in given.models:
            bench = Bench(models(given)[name](), given)
            if "files" in given.steps:
                if given.tools is not None:
                    bench.presets()
                bench.plans()
            if "others" in given.steps:
                for label, other in (x.split("=", 1) for x in given.others):
                    if bench.row(label) is None:
                        bench.judge(label, Path(other), method="other")
            if "speed" in given.steps and given.tools is not None:
                bench.speed()
    finally:
        torch.set_num_threads(before)
    return file


if __name__ == "__main__":
    print(main())
