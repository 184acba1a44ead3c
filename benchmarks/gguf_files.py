"""How much of our small loss in GGUF files is due to the plan, and how much to the rounding?

    OMP_NUM_THREADS=1 python benchmarks/gguf_files.py [--toy] [--models gpt2 smollm2] [--cache CACHE]
        [--tools LLAMA_CPP/bin] [--work FOLDER] [--steps files recipes llama.cpp speed]

For each preset of llama.cpp there are files of the same size: the types of the preset or those of a plan,
each rounded by `llama-quantize` with an importance matrix or by this library. The plan that `llama-quantize`
rounds is a recipe, planned for its rounding (`th.plan_recipe`). One more plan has three quarters of the bytes
of Q4_K_M. Importance matrix and plans read the same calibration text. Plans include the embedding and the
output head.

transformers dequantizes every file. All files are judged on one held-out text, from a source that
calibration does not use, by the loss increase over the dense model and the KL divergence, with standard
errors over tokens. The step `llama.cpp` judges all files again by `llama-perplexity --kl-divergence` against
the dense file; it tokenizes the held-out text itself, and counts the second half of each window.

The step `speed` measures the tokens per second of plans and recipes with `llama-bench` on one thread, in turn
with the preset of the same size; the ratios are medians.

The residual stream of SmolLM2 is rotated, since the weights of the published file lie on a 4-bit grid.
`smollm2-wide` is the same model, padded with zeros before rotation such that its rows are multiples of 256,
as K types need. Without `--tools` only plans are measured, for the sizes `--megabytes`. Seconds are processor
seconds. Rows in the record and files in the work folder are not made again.

The tools come from llama.cpp, or from packages of it such as Debian's llama.cpp-tools and
llama.cpp-tools-extra. Writes `gguf_files.json` and, with `--picture`, tables in `gguf_files.md`.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).parent))
import subjects
from harness import RECORDS, cell, peak_mib, processor_seconds, provenance, record, table
from subjects import Subject, tokens_of

import tensornet as tn
import tensornet_hf as th
from tensornet_hf.checkpoint import load_gguf
from tensornet_hf.evaluate import divergence
from tensornet_hf.exporters.gguf import find_places
from tensornet_hf.recipes import IMATRIX_METADATA

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
STEPS = ("files", "recipes", "others", "llama.cpp", "speed")
#: Style and label of the files, by who chose their types and what rounded their weights.
STYLES = {
    ("preset", "llama-quantize"): ("C1s", "preset, rounded by llama-quantize"),
    ("preset", "tensornet"): ("C1o", "preset, rounded by tensornet"),
    ("recipe", "llama-quantize"): ("C0s--", "plan, rounded by llama-quantize"),
    ("plan", "tensornet"): ("C0o-", "plan, rounded by tensornet"),
    ("preset", "other"): ("C2^", "other tools"),
}
#: Files whose types are planned for their rounding.
CHOSEN = (("plan", "tensornet"), ("recipe", "llama-quantize"))
#: Files whose points have the name of the preset.
NAMED = (("preset", "llama-quantize"), ("preset", "other"))
#: What `llama-perplexity` says about a file.
SAID = {
    "loss_increase": r"Mean ln\(PPL\(Q\)/PPL\(base\)\)",
    "kl": r"Mean\s+KLD",
    "kl_99_9": r"99\.9%\s+KLD",
    "same_top": r"Same top p",
}
#: Number format of each type.
FORMATS = {
    "Q8_0": "int8:g32:float16",
    "Q6_K": "int6:g16:s8",
    "Q5_K": "int5:g32:s6:min",
    "Q5_0": "int5:g32:float16",
    "Q4_K": "int4:g32:s6:min",
    "Q4_0": "int4:g32:float16",
    "IQ4_NL": "nl4:g32:float16",
    "IQ4_XS": "nl4:g32:s6",
    "Q3_K": "int3:g16:s6",
    "Q2_K": "int2:g16:s4:min",
    **{x: x.lower() for x in ("IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS")},
}
Row = dict[str, Any]


class Remembered(nn.Module):
    """A model that runs only once on each batch, since many files are compared with it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.known: dict[bytes, Any] = {}

    def forward(self, input_ids: Tensor) -> Any:
        key = input_ids.numpy().tobytes()
        if key not in self.known:
            self.known[key] = self.model(input_ids=input_ids)
        return self.known[key]


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
        self.remembered = Remembered(self.dense)
        self.text = self.work / "text.txt"
        if not self.text.is_file():
            windows = [x for batch in subject.calibration(0) for x in batch["input_ids"]]
            self.text.write_text(self.decode(torch.cat(windows)))
        self.options = th.CompressOptions(
            calibration=self.text,
            survey=self.work / f"{given.effort}-{given.formats}.survey",
            export="gguf",
            force=True,
        )

    def decode(self, tokens: Tensor) -> str:
        tokenizer = AutoTokenizer.from_pretrained(self.subject.folder)
        return tokenizer.decode(tokens, skip_special_tokens=True)

    def row(self, file: Path) -> Row | None:
        """Find the row of a file; None if it was not measured."""
        return next((x for x in self.rows if (x["model"], x["name"]) == (self.subject.name, file.stem)), None)

    def file(self, name: str) -> Path:
        """Return the file of a name, such as `plan Q4_K_M`."""
        return self.work / f"{name}.gguf"

    def write(self) -> Path:
        return record("gguf_files", self.rows, folder=self.given.records)

    def tool(self, name: str, *arguments: object) -> str:
        command = [str(self.given.tools / name), *map(str, arguments)]
        with tempfile.TemporaryFile("w+") as out:  # into a pipe, the last lines may be lost at exit
            done = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, check=False)
            out.seek(0)
            said = out.read()
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{said[-2000:]}")
        return said

    def judge(self, file: Path, size: str, types: str, rounding: str, **facts: Any) -> None:
        """Measure a file on the test windows, and add a row with the results and `facts` to the record.

        Args:
            file: the GGUF file.
            size: preset that has this size.
            types: who chose the types: preset, plan, or recipe.
            rounding: program that rounded the weights.
        """
        found = divergence(load_gguf(file), self.remembered, self.tokens, context=self.context, batch_size=2)
        origin = {x: provenance()[x] for x in ("date", "commit", "dirty", "device", "load", "threads")}
        weights = sum(p.numel() for p in self.dense.parameters() if p.ndim > 1)
        row = {
            "model": self.subject.name,
            "name": file.stem,
            "size": size,
            "types": types,
            "rounding": rounding,
            "bytes": file.stat().st_size,
            "bits_per_weight": 8 * file.stat().st_size / weights,
            "loss_increase": found.loss_increase,
            "kl": found.mean,
            "kl_median": found.median,
            "kl_99": found.percentile_99,
            "kl_99_9": found.percentile_99_9,
            "same_top": found.same_top,
            "perplexity": found.perplexity.perplexity,
            "counts": dict(Counter(types_of(file).values())),
            **facts,
            "judged_tokens": len(self.tokens),
            "calibration_tokens": tokens_of(self.subject.calibration(0)),
            **origin,
        }
        self.rows.append(row)
        self.write()
        print(file.stem, row["bytes"], found.loss_increase, found.mean, flush=True)

    def dense_file(self) -> Path:
        """Write the dense model as a GGUF file."""
        file = self.file("dense")
        if not file.is_file():
            th.export(self.dense, file, source=self.subject.folder)
        return file

    def importance(self) -> Path:
        """Collect the importance matrix of llama.cpp on the calibration text."""
        file = self.work / "importance.gguf"
        if not file.is_file():
            how = ("-f", self.text, "-o", file, "-c", self.context, "-t", 1)
            self.tool("llama-imatrix", "-m", self.dense_file(), *how)
        return file

    def quantize(self, file: Path, kind: str, *options: object) -> None:
        """Write a file by `llama-quantize`."""
        how = ("--imatrix", self.importance(), *options)
        self.tool("llama-quantize", *how, self.dense_file(), file, kind, 1)

    def presets(self) -> None:
        """Write the file of every preset, and one with the same types that this library rounds."""
        for name in self.given.presets:
            file, ours = self.file(name), self.file(f"{name} rounded by tensornet")
            if not file.is_file():
                self.quantize(file, name)
            if self.row(file) is None:
                self.judge(file, name, "preset", "llama-quantize")
            unknown = set(types_of(file, matrices=True).values()) - FORMATS.keys()
            if unknown:
                print(f"{name} has types that we do not round to: {unknown}", flush=True)
            elif self.row(ours) is None:
                self.round_types(ours, types_of(file))
                self.judge(ours, name, "preset", "tensornet")

    def round_types(self, file: Path, types: Mapping[str, str]) -> None:
        """Round the weights of a file to given types by this library."""
        config = tn.CompressionConfig(
            max_bytes=self.dense_file().stat().st_size, formats=self.given.formats, effort=self.given.effort
        )
        plan = th.plan_folder(self.subject.folder, config, self.options)
        _, _, places = find_places(self.dense, self.subject.folder, [x.name for x in plan])
        for tensor, place in places.items():
            for layer in place.layers:
                plan = plan.replace_layer(layer, None, FORMATS[types[tensor]])
        th.compress_folder(self.subject.folder, file, plan, self.options)
        written = types_of(file)
        wrong = {x: (written[x], types[x]) for x in places if written[x] != types[x]}
        if wrong:
            raise SystemExit(f"{file}: other types than asked for: {wrong}")

    def plans(self) -> None:
        """Write a plan's file for each given size, those of all presets and three quarters of Q4_K_M."""
        sizes = {f"{x:g} MB": round(1e6 * x) for x in self.given.megabytes}
        if self.given.tools is not None:
            sizes |= {x: self.file(x).stat().st_size for x in self.given.presets}
        if POPULAR in sizes:
            sizes[f"{SHARE:g} {POPULAR}"] = round(SHARE * sizes[POPULAR])
        done: list[int] = []
        for name, size in sizes.items():
            if any(abs(size / x - 1) < 0.002 for x in done):
                continue
            done.append(size)
            file = self.file(f"{self.prefix} {name}")
            if self.row(file) is None:
                self.plan(file, name, size)
            if "recipes" in self.given.steps and self.given.tools is not None and self.prefix == "plan":
                self.recipe(name, size)

    @property
    def prefix(self) -> str:
        """Name of the plans: `plan`, with the effort and the menu unless they are the defaults."""
        words = ("thorough",) * (self.given.effort == "thorough") + ("fast",) * (self.given.formats != "gguf")
        return " ".join((*words, "plan"))

    def plan(self, file: Path, name: str, size: int) -> None:
        """Write the file of the plan for one size, and measure its loss."""
        config = tn.CompressionConfig(max_bytes=size, formats=self.given.formats, effort=self.given.effort)
        start = processor_seconds()
        done = th.compress_folder(self.subject.folder, file, config, self.options)
        plan = done.plan
        facts = {
            "effort": self.given.effort,
            "formats": self.given.formats,
            "asked_bytes": size,
            "predicted": plan.predicted_loss_increase,
            "seconds": processor_seconds() - start,
            "peak_mib": peak_mib(),
        }
        self.judge(file, name, "plan", "tensornet", **facts)

    def recipe(self, name: str, size: int) -> None:
        """Plan the types of a file for the rounding of `llama-quantize`, and let it write the file."""
        file = self.file(f"recipe {name}")
        if self.row(file) is not None:
            return
        recipe = th.plan_recipe(
            self.subject.folder,
            max_bytes=size,
            calibration=self.options.calibration,
            imatrix=self.importance(),
            survey=self.work / "recipe.survey",
        )
        recipe.save(file.with_suffix(".txt"))
        words = shlex.split(recipe.command(str(file.with_suffix(".txt")), str(self.importance())))
        *words, dense, _, kind = words
        assert dense == "model-bf16.gguf"
        self.tool(*words, "--dry-run", self.dense_file(), kind)
        self.tool(*words, self.dense_file(), file, kind, 1)
        written = types_of(file)
        wrong = {x: (written[x], kind) for x, kind in recipe.types.items() if written[x] != kind}
        if wrong:
            raise SystemExit(f"{file}: llama-quantize chose other types: {wrong}")
        if not 0 <= recipe.num_bytes - file.stat().st_size <= IMATRIX_METADATA:
            raise SystemExit(f"{file}: {file.stat().st_size} bytes, but {recipe.num_bytes} were planned")
        self.judge(file, name, "recipe", "llama-quantize", predicted=recipe.predicted)

    def judge_by_llama_cpp(self) -> None:
        """Judge all files by `llama-perplexity`, against the predictions of the dense file."""
        text = self.work / "judged.txt"
        if not text.is_file():
            text.write_text(self.decode(self.tokens))
        logits = self.work / "dense.logits"
        how = ("-f", text, "-c", self.context, "-t", 1, "--kl-divergence-base", logits)
        for row in (x for x in self.rows if x["model"] == self.subject.name and "llama_cpp" not in x):
            if not self.file(row["name"]).is_file():
                continue
            if not logits.is_file():
                self.tool("llama-perplexity", "-m", self.dense_file(), *how)
            said = self.tool("llama-perplexity", "-m", self.file(row["name"]), *how, "--kl-divergence")
            row["llama_cpp"] = {key: numbers(said, label) for key, label in SAID.items()}
            self.write()
            print(row["name"], row["llama_cpp"], flush=True)
        logits.unlink(missing_ok=True)

    def speed(self) -> None:
        """Measure tokens per second of plans and recipes, each in turn with the preset of the same size."""
        for row in self.rows:
            file, preset = self.file(row["name"]), self.file(row["size"])
            mine = row["model"] == self.subject.name and (row["types"], row["rounding"]) in CHOSEN
            if not mine or "generated_ratios" in row or not (file.is_file() and preset.is_file()):
                continue
            pairs = [(self.rates(file), self.rates(preset)) for _ in range(self.given.repeats)]
            for kind in ("generated", "read"):
                ratios = [ours[kind] / theirs[kind] for ours, theirs in pairs]
                row[f"{kind}_per_second"] = statistics.median(ours[kind] for ours, _ in pairs)
                row[f"{kind}_over_preset"] = statistics.median(ratios)
                row[f"{kind}_ratios"] = ratios
            row["speed_device"] = provenance()["device"]
            self.write()
            print(row["name"], row["generated_over_preset"], row["read_over_preset"], flush=True)

    def rates(self, file: Path) -> dict[str, float]:
        """Measure how many tokens per second `llama-bench` generates and reads."""
        said = self.tool("llama-bench", "-m", file, "-t", 1, "-p", 256, "-n", 64, "-r", 1, "-o", "json")
        tests = json.loads(said[said.index("[") : said.rindex("]") + 1])
        return {"generated" if test["n_gen"] else "read": test["avg_ts"] for test in tests}


def types_of(file: Path, *, matrices: bool = False) -> dict[str, str]:
    """Read the type of each tensor of a GGUF file, or of each matrix that is not stored as float32."""
    from gguf import GGUFReader

    found = {x.name: x.tensor_type.name for x in GGUFReader(file).tensors}
    return {name: kind for name, kind in found.items() if kind != "F32"} if matrices else found


def numbers(said: str, label: str) -> tuple[float, float | None]:
    """Find the number after a label in the output of `llama-perplexity`, with its standard error."""
    found = re.search(rf"{label}\s*:\s*([-\d.e+]+)(?:\s*±\s*([-\d.e+]+))?", said)
    if found is None:
        raise SystemExit(f"llama-perplexity did not print {label!r}: {said[-1000:]}")
    return float(found[1]), None if found[2] is None else float(found[2])


def picture(rows: Sequence[Row], names: Sequence[str], file: Path) -> None:
    """Draw the KL divergence over the bits per weight of the file; the same types have the same color."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(names), 4.2), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        some = sorted((x for x in rows if x["model"] == name), key=lambda x: x["bits_per_weight"])
        effort = "fast" if any(x.get("effort") == "fast" for x in some) else "thorough"
        shown = (effort, "gguf")  # not the rows of other menus
        for (types, rounding), (style, label) in STYLES.items():
            those = [x for x in some if (x["types"], x["rounding"]) == (types, rounding)]
            found = [x for x in those if "effort" not in x or (x["effort"], x["formats"]) == shown]
            if not found:
                continue
            bits, kl = ([x["bits_per_weight"] for x in found], [x["kl"][0] for x in found])
            axes.plot(bits, kl, style, label=label, markersize=5, linewidth=1.5)
            for row in found if (types, rounding) in NAMED else ():
                place, left = (row["bits_per_weight"], row["kl"][0]), row["size"] in SMALLEST
                text = row["name"].split()[0] if rounding == "other" else row["size"]
                height = -7 if row["size"].startswith("IQ") else 0  # its point is just below another one
                offset, side = ((-6, height), "right") if left else ((6, height), "left")
                axes.annotate(text, place, offset, textcoords="offset points", ha=side, fontsize=9)
        axes.set(yscale="log", xlabel="bits of the file for a weight", ylabel="KL divergence, nats a token")
        axes.set_title(TITLES.get(name, name))
        axes.grid(alpha=0.3)
        axes.margins(x=0.33)
        axes.legend(fontsize=8, loc="lower left")
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "gguf"}):
        figure.savefig(file, metadata={"Date": None})


def bars(rows: Sequence[Row], name: str, file: Path) -> None:
    """Draw the loss increases of files of equal size as bars: presets, other tools, and the plan."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 2.5), layout="constrained")
    for axes, size in zip(figure.subplots(1, 2), (POPULAR, "Q2_K"), strict=True):
        same = [x for x in rows if x["model"] == name and x["size"] == size]
        shown = {}
        for row in same:
            if (row["types"], row["rounding"]) == ("preset", "llama-quantize"):
                shown[f"llama.cpp {size}"] = row
            elif row["rounding"] == "other":
                shown[row["name"].split()[0]] = row
            elif (row["types"], row.get("effort"), row.get("formats")) == ("plan", "fast", "gguf"):
                shown["tensornet"] = row
        ordered = sorted(shown, key=lambda label: shown[label]["loss_increase"][0])
        values = [shown[label]["loss_increase"][0] for label in ordered]
        colors = ["C0" if label == "tensornet" else "0.7" for label in ordered]
        drawn = axes.barh(ordered, values, color=colors, height=0.6)
        axes.bar_label(drawn, [f"{value:.3f}" for value in values], padding=4)
        axes.set(
            title=f"files of {min(x['bytes'] for x in same) / 1e6:.0f} MB",
            xlabel="loss increase, nats per token",
        )
        axes.spines[["top", "right"]].set_visible(False)
        axes.set(ylim=(-0.6, 2.6))  # bars of equal height, whatever their number
        axes.margins(x=0.3)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "gguf"}):
        figure.savefig(file, metadata={"Date": None})


def page(rows: Sequence[Row]) -> str:
    """Format the files of each model as a Markdown table, by decreasing size."""
    parts = [
        "# Files for llama.cpp",
        "The record of `benchmarks/gguf_files.py`, in nats per token, MB and percent.",
    ]
    for name in dict.fromkeys(x["model"] for x in rows):
        some = sorted((x for x in rows if x["model"] == name), key=lambda x: -x["bytes"])
        parts += [f"## {TITLES.get(name, name)}", table([cells(x) for x in some])]
    return "\n\n".join(parts) + "\n"


def cells(row: Row) -> dict[str, str]:
    """Format the results of one file, those of `llama-perplexity` in columns of their own."""
    found = {"file": row["name"], "MB": f"{row['bytes'] / 1e6:.1f}", "bits": f"{row['bits_per_weight']:.2f}"}
    ours = {**row, "same_top": [100 * x for x in row["same_top"]]}
    for judge, results in (("", ours), (" by llama.cpp", row.get("llama_cpp", {}))):
        for key in SAID:
            numbers = [x for x in results.get(key, ()) if x is not None]
            found[key + judge] = " ± ".join(f"{x:.{1 if key == 'same_top' else 4}f}" for x in numbers)
    for kind in ("generated", "read"):
        found[f"{kind} over preset"] = cell(row.get(f"{kind}_over_preset"))
    return found


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
    parser.add_argument(
        "--picture", type=Path, help="draw the record to this file, write its tables, and measure nothing"
    )
    parser.add_argument("--bars", type=Path, help="draw two sizes of the first model, and measure nothing")
    parser.add_argument("--formats", default="gguf", help="menu of number formats of the plans")
    parser.add_argument("--effort", default="fast", choices=("fast", "thorough"))
    parser.add_argument("--repeats", type=int, default=5, help="number of runs of llama-bench")
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--work", type=Path, default=Path("gguf-work"), help="folder for the GGUF files")
    given = parser.parse_args(arguments)
    if given.toy:
        given.models, given.megabytes, given.steps = ["gpt2"], [0.7], ["files"]
        given.work = given.records / "gguf-work"
    file = given.records / "gguf_files.json"
    if given.bars is not None:
        bars(json.loads(file.read_text())["rows"], given.models[0], given.bars)
        return Path(given.bars)
    if given.picture is not None:
        rows = json.loads(file.read_text())["rows"]
        picture(rows, given.models, given.picture)
        file.with_suffix(".md").write_text(page(rows))
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
                    if bench.row(bench.file(label)) is None:
                        shutil.copy(other, bench.file(label))
                        bench.judge(bench.file(label), label.split()[-1], "preset", "other")
            if "llama.cpp" in given.steps and given.tools is not None:
                bench.judge_by_llama_cpp()
            if "speed" in given.steps and given.tools is not None:
                bench.speed()
    finally:
        torch.set_num_threads(before)
    return file


if __name__ == "__main__":
    print(main())
