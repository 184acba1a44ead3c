"""Which mixtures pay off when a small model is trained from scratch, and what may their experts share?

    python benchmarks/moe_from_scratch.py TEXTS [--state FOLDER] [--rows ...] [--tokens 8] [--seeds 0 1]

A small GPT-2 is trained from scratch on several texts (`scratch_tasks.py`), once for every row: dense, or
with one of the mixtures of `scratch_rows.py`. For a seed, all rows get the same batches. The learning rate is
constant after a warm-up, and the loss is that of a running average of the weights over about the last tenth
of the steps. So one run gives the loss at every number of tokens, and any run can be continued with more
tokens. With the first seed, every rate is tried for `--chosen-at` million tokens; the rate with the lowest
loss on the tuning part is then used for all seeds. Every row states the bytes of all parameters, the seconds
of training, and the floating-point operations per token.

Runs can be resumed at any step: the state folder contains the weights, optimizer, average, generator and step
of each run, and batches depend only on seed and step. A run whose configuration differs from the stored one
ends with an error. With `--minutes` the script stops after this time; the same command continues. The record
`moe_from_scratch.json` has all runs, including unfinished ones.

With `--few-bits 8.25 4.25` the models of finished runs are compressed to these bits per weight, and the
record `moe_in_few_bits.json` has their bytes and losses. `--picture FILE` draws both records.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import tensornet as tn
import tensornet_moe as tm
from tensornet_hf.embedded import heldout_text

sys.path.insert(0, str(Path(__file__).parent))
from harness import RECORDS, record
from scratch_rows import ROWS, Row, Sizes
from scratch_tasks import Corpus, build_gpt2, corpus_of, cross_entropy, gpt2_networks, load_corpus

CACHE = Path(__file__).resolve().parents[1] / ".cache" / "benchmarks" / "moe_from_scratch"
MILLION = 1_000_000
#: Numbers of tokens, in millions, after which a run is judged.
JUDGED_AT = (0.5, 1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64)


@dataclass(frozen=True)
class Recipe:
    """Options of training that all rows share.

    Args:
        windows: number of windows in a batch.
        rate: learning rate of AdamW after the warm-up.
        warmup: number of steps of the warm-up.
        weight_decay: weight decay of matrices.
        average: the weights are averaged over about the last fraction `1 / average` of all steps so far.
        judge_windows: number of windows for testing; half as many are for tuning.
    """

    windows: int = 32
    rate: float = 3e-3
    warmup: int = 100
    weight_decay: float = 0.01
    average: int = 10
    judge_windows: int = 512


class Run:
    """Training run of one row, learning rate and seed, which is saved regularly and can be resumed.

    Args:
        row, sizes, recipe, corpus, seed: the configuration.
        folder: folder in which the state is stored.
    """

    def __init__(
        self, row: Row, sizes: Sizes, recipe: Recipe, corpus: Corpus, seed: int, *, folder: Path
    ) -> None:
        self.row, self.sizes, self.recipe, self.corpus, self.seed = row, sizes, recipe, corpus, seed
        self.configuration = {
            "row": json.loads(json.dumps(dataclasses.asdict(row))),
            "sizes": dataclasses.asdict(sizes),
            "recipe": dataclasses.asdict(recipe),
            "seed": seed,
            "corpus": corpus.fingerprint,
        }
        name = "".join(c if c.isalnum() else "_" for c in row.name)
        self.file = folder / f"{name}-w{sizes.width}x{sizes.layers}-rate{recipe.rate:g}-seed{seed}.pt"
        torch.manual_seed(seed)
        self.model = build_gpt2(row, sizes, seed).train()
        self.optimizer = optimizer_of(self.model, row, recipe)
        self.mask: tm.GradientMask | None = None
        if "mask" in row.options:
            self.mask = tm.GradientMask(self.model, p=row.options["mask"], seed=seed).attach(self.optimizer)
        self.mean = [p.detach().clone() for p in self.model.parameters()]
        self.step = 0
        self.history: list[dict[str, Any]] = []
        self.seconds = 0.0
        self.flops_of_a_step = 0
        if self.file.is_file():
            self._resume()

    @property
    def tokens(self) -> int:
        """Number of training tokens so far."""
        return self.step * self.recipe.windows * self.sizes.context

    def train(self, tokens: int, *, deadline: float, checkpoint_every: float = 60.0) -> bool:
        """Train up to a number of tokens; return False if the deadline was reached first.

        Args:
            tokens: total number of tokens.
            deadline: time at which to stop, by `time.monotonic`.
            checkpoint_every: seconds between two writes of the state.
        """
        marks = {self._steps(at * MILLION) for at in JUDGED_AT} | {self._steps(tokens)}
        started, saved = time.process_time(), time.monotonic()
        while self.tokens < tokens:
            self._train_step()
            if self.step in marks:
                self.seconds += time.process_time() - started
                self._judge()
                self.save()
                started, saved = time.process_time(), time.monotonic()
            elif time.monotonic() - saved > checkpoint_every or time.monotonic() > deadline:
                now = time.process_time()
                self.seconds, started = self.seconds + now - started, now
                self.save()
                saved = time.monotonic()
            if time.monotonic() > deadline:
                return self.tokens >= tokens
        return True

    def save(self) -> None:
        """Write the state. An interruption leaves the earlier file intact."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        part = self.file.with_suffix(".part")
        torch.save(
            {
                "configuration": self.configuration,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "mask": None if self.mask is None else self.mask.state_dict(),
                "mean": self.mean,
                "generator": torch.get_rng_state(),
                "step": self.step,
                "history": self.history,
                "seconds": self.seconds,
                "flops_of_a_step": self.flops_of_a_step,
            },
            part,
        )
        os.replace(part, self.file)
        self.file.with_suffix(".json").write_text(json.dumps(self.summary(), indent=1) + "\n")

    def tune_loss(self, tokens: int) -> float:
        """Return the tuning loss of the first evaluation after at least `tokens` tokens of training."""
        return next(float(point["tune_loss"]) for point in self.history if point["tokens"] >= tokens)

    def summary(self) -> dict[str, Any]:
        parameters = sum(p.numel() for p in self.model.parameters())
        return {
            **self.configuration,
            "tokens": self.tokens,
            "parameters": parameters,
            "expert_parameters": feed_forward_parameters(self.model),
            "bytes": 4 * parameters,
            "flops_per_token": self.flops_of_a_step / (self.recipe.windows * self.sizes.context),
            "seconds": self.seconds,
            "history": self.history,
        }

    def _resume(self) -> None:
        state = torch.load(self.file)
        if state["configuration"] != self.configuration:
            differing = {
                key: (state["configuration"].get(key), value)
                for key, value in self.configuration.items()
                if state["configuration"].get(key) != value
            }
            raise SystemExit(
                f"{self.file} was made with another configuration: {differing} (stored, requested). Move the "
                "file away, or use the stored configuration."
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.mask is not None:
            self.mask.load_state_dict(state["mask"])
        self.mean = state["mean"]
        torch.set_rng_state(state["generator"])
        self.step, self.history, self.seconds = state["step"], state["history"], state["seconds"]
        self.flops_of_a_step = state["flops_of_a_step"]

    def _steps(self, tokens: float) -> int:
        return math.ceil(tokens / (self.recipe.windows * self.sizes.context))

    def _train_step(self) -> None:
        recipe = self.recipe
        batch = self.corpus.batch(
            self.step, windows=recipe.windows, context=self.sizes.context, seed=self.seed
        )
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * min(1.0, (self.step + 1) / recipe.warmup)
        if self.flops_of_a_step == 0 and self.step == 20:  # routers now distribute tokens over all experts
            with FlopCounterMode(display=False) as counter:
                self._loss(batch).backward()
            self.flops_of_a_step = counter.get_total_flops()
        else:
            self._loss(batch).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        weight = (recipe.average + 1) / (self.step + recipe.average + 1)
        with torch.no_grad():
            torch._foreach_lerp_(self.mean, list(self.model.parameters()), weight)

    def _loss(self, batch: Tensor) -> Tensor:
        loss = cross_entropy(self.model, batch)
        return loss + tm.collect_aux_losses(self.model).total if self.row.experts else loss

    def _judge(self) -> None:
        """Measure averaged weights on the tuning and test parts, and the latest weights on the test part."""
        last_loss, _ = self.evaluate()
        self._exchange()
        tune_loss, _ = self.evaluate("tune")
        loss, entropy = self.evaluate()
        self._exchange()
        point = {
            "tokens": self.tokens,
            "loss": loss,
            "tune_loss": tune_loss,
            "last_loss": last_loss,
            "entropy": entropy,
            "seconds": self.seconds,
            "flops": self.flops_of_a_step * self.step,
        }
        self.history.append(point)
        spread = "" if entropy is None else f" entropy {entropy:.3f}"
        print(
            f"{self.row.name:28} seed {self.seed} rate {self.recipe.rate:<7g} {self.tokens / MILLION:6.2f}M "
            f"loss {loss:.4f} (last {last_loss:.4f}, tune {tune_loss:.4f}){spread} "
            f"{self.tokens / max(self.seconds, 1e-9):.0f} tokens/s",
            flush=True,
        )

    def evaluate(self, part: str = "test") -> tuple[float, float | None]:
        """Evaluate the model on a part of the text; see the function `evaluate`."""
        limit = self.recipe.judge_windows // (2 if part == "tune" else 1)
        windows = self.corpus.windows(part, context=self.sizes.context, limit=limit)
        return evaluate(self.model, windows, self.recipe.windows)

    def _exchange(self) -> None:
        """Swap the weights with their average."""
        with torch.no_grad():
            for parameter, mean in zip(self.model.parameters(), self.mean, strict=True):
                kept = parameter.detach().clone()
                parameter.copy_(mean)
                mean.copy_(kept)


@torch.no_grad()
def evaluate(model: nn.Module, windows: Tensor, batch: int) -> tuple[float, float | None]:
    """Compute the mean loss of a token, and the mean relative entropy of the expert load of all layers.

    The relative entropy is 1 if all experts get equally many tokens; it is None without mixtures.
    """
    layers = [m for m in model.modules() if isinstance(m, tm.SharedCoreMoE)]
    loads: list[Tensor] = [torch.zeros(m.num_experts) for m in layers]
    total = 0.0
    model.eval()
    for part in windows.split(batch):
        total += float(cross_entropy(model, part)) * len(part)
        for load, layer in zip(loads, layers, strict=True):
            assert layer.stats is not None
            load += layer.stats.load
    model.train()
    if not layers:
        return total / len(windows), None
    entropies = [float(torch.special.entr(load / load.sum()).sum()) / math.log(len(load)) for load in loads]
    return total / len(windows), statistics.mean(entropies)


def in_few_bits(run: Run, bits: Sequence[float]) -> Iterator[dict[str, Any]]:
    """Compress the model of a run, with averaged weights, to several sizes, and measure each loss.

    Args:
        run: a finished run.
        bits: bits per weight of each size, scales included.

    Yields:
        Rows with the bytes of the whole model and its loss, first in float32, then for each size.
    """
    run._exchange()
    weights = {name: value.detach().clone() for name, value in run.model.state_dict().items()}
    run._exchange()
    context = run.sizes.context
    pieces = [run.corpus.batch(k, windows=32, context=context, seed=run.seed) for k in range(8)]
    batches = [piece[:, :-1].long() for piece in pieces]
    for number in (None, *bits):
        model = build_gpt2(run.row, run.sizes, run.seed)
        model.load_state_dict(weights)
        size = 4 * sum(p.numel() for p in model.parameters())
        if number is not None:
            config = tn.CompressionConfig(bits_per_weight=number, target_modules="all")
            size = tn.compress(model, config, calibration=batches, progress=False).model_bytes_after
        windows = run.corpus.windows("test", context=context, limit=run.recipe.judge_windows)
        loss, _ = evaluate(model, windows, run.recipe.windows)
        yield {
            "row": run.row.name,
            "seed": run.seed,
            "rate": run.recipe.rate,
            "tokens": run.tokens,
            "bits": number,
            "bytes": size,
            "loss": loss,
            "flops_per_token": run.summary()["flops_per_token"],
        }


def picture(records: Path, file: Path) -> None:
    """Make two plots: loss minus that of the dense model over training tokens, and loss over bytes."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    runs = json.loads((records / "moe_from_scratch.json").read_text())["rows"]
    small = json.loads((records / "moe_in_few_bits.json").read_text())["rows"]
    seed, longest = min(run["seed"] for run in runs), max(run["tokens"] for run in runs)
    done = {r["row"]["name"]: r["history"] for r in runs if (r["seed"], r["tokens"]) == (seed, longest)}
    dense = {point["tokens"]: point["loss"] for point in done["dense"]}
    figure = Figure(figsize=(9.2, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, (name, history) in enumerate(sorted(done.items(), key=lambda x: x[1][-1]["loss"])):
        style: dict[str, Any] = {"color": f"C{number % 10}", "marker": "os^"[number // 10], "markersize": 4}
        style["linestyle"] = "--" if name.startswith("dense") else "-"
        shown = [point for point in history if point["tokens"] in dense]
        losses = [point["loss"] - dense[point["tokens"]] for point in shown]
        left.plot([point["tokens"] / MILLION for point in shown], losses, label=name, **style)
        found = [x for x in small if (x["row"], x["seed"]) == (name, seed)]
        found.sort(key=lambda x: x["bytes"])
        right.plot([x["bytes"] / 1000 for x in found], [x["loss"] for x in found], label=name, **style)
    left.set(xlabel="million tokens", ylabel="loss minus that of the dense model, nats")
    right.set(xscale="log", xlabel="model in int4, int8 and float32, KB", ylabel="held-out loss, nats")
    marks = [2**k * 125 for k in range(1, 7)]
    right.set_xticks(marks, labels=[f"{mark:,}" for mark in marks])
    right.minorticks_off()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "moe"}):
        figure.savefig(file, metadata={"Date": None})


def feed_forward_parameters(model: nn.Module) -> int:
    """Count the parameters of all feed-forward networks, including pools but not routers."""
    routers = {id(p) for m in model.modules() if isinstance(m, tm.Router) for p in m.parameters()}
    parts = gpt2_networks(model) + [m for name, m in model.named_children() if name == "owner"]
    found = {id(p): p for part in parts for p in part.parameters() if id(p) not in routers}
    return sum(p.numel() for p in found.values())


def optimizer_of(model: nn.Module, row: Row, recipe: Recipe) -> torch.optim.Optimizer:
    """Make an AdamW optimizer; vectors have no weight decay. For learning rates see `Row.root_rates`."""
    groups = []
    for group in tm.parameter_groups(model, lr=recipe.rate):
        rate = group["lr"] if row.root_rates else recipe.rate
        matrices = [p for p in group["params"] if p.ndim > 1]
        vectors = [p for p in group["params"] if p.ndim <= 1]
        for found, decay in ((matrices, recipe.weight_decay), (vectors, 0.0)):
            if found:
                groups.append({"params": found, "lr": rate, "peak": rate, "weight_decay": decay})
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def toy_sizes() -> Sizes:
    """Return the sizes of a model that is trained in a second."""
    return Sizes(width=80, hidden=320, layers=2, heads=5, context=8, vocabulary=300)


def main(arguments: Sequence[str] | None = None) -> Path | None:
    """Make the missing runs and write the record; return its path, or None if time ran out first."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("texts", type=Path, nargs="?", help="folder of the unpacked packages")
    parser.add_argument("--state", type=Path, default=CACHE, help="folder of the runs")
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--name", default="moe_from_scratch", help="name of the record")
    parser.add_argument("--rows", nargs="+", choices=tuple(ROWS), default=tuple(ROWS), metavar="ROW")
    parser.add_argument("--rates", nargs="+", type=float, default=[3e-3, 6e-3, 12e-3])
    parser.add_argument("--chosen-at", type=float, default=2.0, help="million tokens with each rate")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument(
        "--tokens", type=float, default=8.0, help="million tokens for each row and seed, at its best rate"
    )
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after this time")
    parser.add_argument("--width", type=int, default=80)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=5)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=16, help="number of windows in a batch")
    parser.add_argument("--few-bits", nargs="+", type=float, help="bits per weight to compress models to")
    parser.add_argument("--picture", type=Path, help="draw the records to this file and train nothing")
    parser.add_argument("--toy", action="store_true", help="three tiny models on the embedded text")
    given = parser.parse_args(arguments)
    if given.picture is not None:
        picture(given.records, given.picture)
        return Path(given.picture)
    torch.set_num_threads(1)
    if given.toy:
        sizes, recipe = toy_sizes(), Recipe(windows=4, warmup=2, judge_windows=8)
        corpus = corpus_of(heldout_text(), vocabulary=sizes.vocabulary)
        given.rows, given.tokens = ("dense", "pool, half", "MPOE, mask 0.5"), 0.0001
    else:
        shape = {"layers": given.layers, "heads": given.heads, "vocabulary": given.vocabulary}
        sizes = Sizes(width=given.width, hidden=4 * given.width, context=given.context, **shape)
        recipe = Recipe(windows=given.windows)
        corpus = load_corpus(given.texts, given.state / "text", vocabulary=sizes.vocabulary)
    deadline = time.monotonic() + 60 * given.minutes
    small: list[dict[str, Any]] = []
    for name in given.rows:

        def start(rate: float, seed: int, row: Row = ROWS[name]) -> Run:
            with_rate = dataclasses.replace(recipe, rate=rate)
            return Run(row, sizes, with_rate, corpus, seed, folder=given.state)

        first = [start(rate, given.seeds[0]) for rate in given.rates]
        chosen_at = round(min(given.chosen_at, given.tokens) * MILLION)
        if not all(run.train(chosen_at, deadline=deadline) for run in first):
            return None
        best = min(first, key=lambda run: run.tune_loss(chosen_at)).recipe.rate
        for seed in given.seeds:
            run = start(best, seed)
            if not run.train(round(given.tokens * MILLION), deadline=deadline):
                return None
            if given.few_bits:
                found = [*in_few_bits(run, given.few_bits)]
                print(*found, sep="\n", flush=True)
                small += found
    if given.few_bits:
        return record("moe_in_few_bits", small, folder=given.records)
    lines = [json.loads(path.read_text()) for path in sorted(given.state.glob("*.json"))]
    return record(given.name, lines, folder=given.records)


if __name__ == "__main__":
    main()
