"""Do specialists that share cores reach the losses of LoRA adapters with fewer bytes?

There are nine domains and one small trunk: the package's GPT-2, trained further on general
documentation for 1,500 steps. Eight domains are learned, then a ninth. Each row is one way to do so:

    python benchmarks/specialists.py --cache CACHE --row "LoRA of rank 8"
    python benchmarks/specialists.py --cache CACHE --model smollm2 --steps 48 --row ends
    python benchmarks/specialists.py --cache CACHE --report
    python benchmarks/specialists.py --cache CACHE --speed

`CACHE/texts` contains the unpacked packages `postgresql-doc-17`, `python3.13-doc`, `debian-handbook`,
`fortunes` and `linux-doc-6.12` (see `subjects.py`). Python, Perl and C come from the machine. Each rate is
chosen on three domains, after a third of the steps. The loss of a domain is the mean cross entropy on 48
windows from its last tenth, in nats per token. All rows train equally many steps for each domain. SmolLM2
(`CACHE/smollm2`) runs under autocast to bfloat16, on half of the judged windows, and no specialist is chosen
by the text.
"""

from __future__ import annotations

import argparse
import json
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import tensornet_hf as th
import tensornet_moe as tm
from tensornet_hf.embedded import calibration_text, gpt2_path, heldout_text

sys.path.insert(0, str(Path(__file__).parent))
import harness
import subjects

CONTEXT, BATCH, JUDGED, CHARACTERS = 128, 4, 48, 1_500_000
DOMAINS = ("scripture", "kernel", "library", "postgresql", "handbook", "fortunes", "python", "perl")
NINTH = "c"
#: Domains on which rates are chosen.
TUNED = ("kernel", "fortunes", "python")
HTML = {
    "kernel": [f"linux-doc-6.12/html/{x}" for x in ("admin-guide", "filesystems")],
    "library": ["python3.13/html/library"],
    "postgresql": ["postgresql-doc-17/html"],
    "handbook": ["debian-handbook/html/en-US"],
    "german": ["debian-handbook/html/de-DE"],
    "general": [
        *(f"linux-doc-6.12/html/{x}" for x in ("networking", "process", "driver-api")),
        *(f"python3.13/html/{x}" for x in ("howto", "tutorial", "faq", "whatsnew")),
    ],
}


@dataclass(frozen=True)
class Trunk:
    """A model that specialists change: its folder in the cache, and the settings that depend on it."""

    folder: str
    targets: tuple[str, ...]
    transposed: bool = False
    precision: torch.dtype | None = None
    judged: int = JUDGED
    routed: bool = True
    slower: float = 1.0  # factor of the rates that are tried


TRUNKS = {
    "gpt2": Trunk("specialists-trunk", ("c_attn", "c_proj", "c_fc"), transposed=True),
    "smollm2": Trunk(
        "smollm2",
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        precision=torch.bfloat16,
        judged=JUDGED // 2,
        routed=False,
        slower=0.3,
    ),
}


def read_domain(cache: Path, name: str) -> str:
    """Read up to `CHARACTERS` characters of a domain."""
    share = cache / "texts" / "usr" / "share"
    if name == "scripture":
        texts: Iterator[str] = iter([calibration_text(), heldout_text()])
    elif name in HTML:
        pages = [p for x in HTML[name] for p in sorted((share / "doc" / x).rglob("*.html"))]
        texts = (subjects.plain_text(p.read_text(errors="replace")) for p in pages)
    else:
        places = {
            "fortunes": (share / "games" / "fortunes", "*.u8"),
            "python": (Path(sysconfig.get_path("stdlib")), "*.py"),
            "perl": (Path("/usr/share/perl"), "*.pm"),
            "c": (Path(torch.__file__).parent / "include" / "ATen", "*.h"),
        }
        folder, pattern = places[name]
        texts = (p.read_text(errors="replace") for p in sorted(folder.rglob(pattern)) if p.is_file())
    found, size = [], 0
    for text in texts:
        found.append(text)
        size += len(text)
        if size > CHARACTERS:
            break
    if size < 100_000:
        raise SystemExit(f"{size} characters of {name!r}; see the docstring of {Path(__file__).name}")
    return "\n\n".join(found)[:CHARACTERS]


def windows(cache: Path, name: str, model: str = "gpt2") -> tuple[Tensor, Tensor]:
    """Return windows for training and judging, shape `(windows, CONTEXT)`; the last tenth is judged."""
    of = "" if model == "gpt2" else f"{model}-"
    kept, judged = cache / f"specialists-{of}{name}.pt", TRUNKS[model].judged
    if not kept.exists():
        tokenizer = AutoTokenizer.from_pretrained(gpt2_path() if model == "gpt2" else cache / model)
        torch.save(subjects.token_windows(tokenizer, read_domain(cache, name), length=CONTEXT), kept)
    ids = torch.load(kept)
    first = len(ids) - len(ids) // 10
    held = ids[first:]
    return ids[:first], held[torch.linspace(0, len(held) - 1, min(judged, len(held))).long()]


def toy_windows() -> dict[str, tuple[Tensor, Tensor]]:
    """Return windows like those of `windows`, for a run of seconds: parts of the package's text."""
    ids = subjects.token_windows(AutoTokenizer.from_pretrained(gpt2_path()), heldout_text(), length=16)
    parts = ids.split(32)
    return {name: (parts[k][:20], parts[k][20:]) for k, name in enumerate((*DOMAINS, NINTH))}


class Trial:
    """Trunk, texts and settings of a row; without a cache, a toy."""

    def __init__(self, cache: Path | None, steps: int, seed: int, model: str = "gpt2") -> None:
        self.cache, self.steps, self.seed, self.model = cache, steps, seed, model
        self.form = TRUNKS[model]
        domains = (*DOMAINS, NINTH)
        self.texts = toy_windows() if cache is None else {x: windows(cache, x, model) for x in domains}

    def precision(self) -> AbstractContextManager[Any]:
        """Return the context in which the model runs."""
        dtype = self.form.precision
        return nullcontext() if dtype is None else torch.autocast("cpu", dtype)

    def trunk(self) -> Any:
        """Load SmolLM2 or the package's GPT-2; the latter is trained further on general documentation."""
        if self.cache is None:
            return AutoModelForCausalLM.from_pretrained(gpt2_path())
        folder = self.cache / self.form.folder
        if self.model == "gpt2" and not folder.exists():
            model = AutoModelForCausalLM.from_pretrained(gpt2_path())
            ids, _ = windows(self.cache, "general")
            self.texts["general"] = (ids, ids)
            self.train(model, list(model.parameters()), [["general"] * 8] * 1500, 2e-3)
            model.save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def train(
        self,
        model: nn.Module,
        parameters: Sequence[nn.Parameter],
        rows: Sequence[Sequence[str]],
        rate: float,
        specialists: tm.Specialists | None = None,
    ) -> None:
        """Train on batches of the domains of `rows`, with a linear schedule.

        The warm-up takes a twentieth of the steps. If specialists take turns, each gets only a share of it;
        with 20 steps for eight of them, two diverged with seed 1.
        """
        optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
        warm_up = max(20, len(rows) // 20)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda k: min((k + 1) / warm_up, 1 - k / len(rows))
        )
        draw = torch.Generator().manual_seed(self.seed)
        model.train()
        for names in rows:
            picked = [int(torch.randint(len(self.texts[x][0]), (1,), generator=draw)) for x in names]
            ids = torch.stack([self.texts[x][0][k] for x, k in zip(names, picked, strict=True)])
            which = names[0] if len(set(names)) == 1 else names
            with nullcontext() if specialists is None else specialists.use(which), self.precision():
                loss = model(input_ids=ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
        model.eval()

    @torch.no_grad()
    def loss(self, model: nn.Module, name: str, s: th.PretrainedSpecialists | None = None) -> float:
        """Return the loss of a domain; with specialists, one is chosen for each window."""
        ids, total = self.texts[name][1], 0.0
        for x in ids.split(16):
            with nullcontext() if s is None else s.use(s.choose(input_ids=x)), self.precision():
                total += float(model(input_ids=x, labels=x).loss) * len(x)
        return total / len(ids)


def losses_of(trial: Trial, s: tm.Specialists, names: Sequence[str]) -> dict[str, float]:
    """Return the loss of each specialist on its own domain."""
    found = {}
    for name in names:
        with s.use(name):
            found[name] = trial.loss(s.model, name)
    return found


def in_turn(names: Sequence[str], steps: int) -> list[list[str]]:
    """Return the domains of batches of one domain each; several domains take turns.

    Batches of several domains are worse: each specialist then gets more, but noisier, steps.
    """
    return [[names[k % len(names)]] * BATCH for k in range(steps * len(names))]


def mean(losses: dict[str, float]) -> float:
    """Return the mean loss, without that of the ninth domain."""
    known = [loss for name, loss in losses.items() if name != NINTH]
    return sum(known) / len(known)


#: What a row measures: `losses` by domain; `lost`, by how much the ninth domain raised the mean of the
#: others; `bytes`, shared and of each specialist; `likelihood`, the mean loss if a specialist, or none, is
#: chosen for each window by its first 64 tokens. Older rows have `router`, the same with a router that was
#: removed, and chose between specialists only.
Result = dict[str, Any]


def run_trunk(trial: Trial, steps: int, rate: float, domains: Sequence[str], *, ninth: bool) -> Result:
    """Measure the trunk."""
    model = trial.trunk().eval()
    return {"losses": {x: trial.loss(model, x) for x in (*domains, NINTH)}, "lost": 0.0}


def run_one(
    trial: Trial,
    steps: int,
    rate: float,
    domains: Sequence[str],
    *,
    ninth: bool,
    rank: int | None = None,
    sequence: bool = True,
) -> Result:
    """Train one model, or one LoRA of a rank, on all domains: one after another, or all at once."""
    model = trial.trunk() if rank is None else with_lora(trial, rank)
    trained = [p for p in model.parameters() if p.requires_grad]
    for name in domains if sequence else ():
        trial.train(model, trained, in_turn([name], steps), rate)
    if not sequence:
        trial.train(model, trained, in_turn(domains, steps), rate)
    losses, lost = {x: trial.loss(model, x) for x in domains}, 0.0
    if ninth:
        trial.train(model, trained, in_turn([NINTH], steps), rate)
        after = {x: trial.loss(model, x) for x in (*domains, NINTH)}
        losses, lost = losses | {NINTH: after[NINTH]}, mean(after) - mean(losses)
    size = sum(p.nbytes for p in trained)
    return {"losses": losses, "lost": lost, "bytes": {"shared": size, "next": 0}}


def with_lora(trial: Trial, rank: int) -> Any:
    """Return the trunk with a LoRA adapter of PEFT on all its matrices."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(trial.seed)
    targets, transposed = list(trial.form.targets), trial.form.transposed
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, fan_in_fan_out=transposed)
    return get_peft_model(trial.trunk(), config)


def with_vera(trial: Trial, rank: int) -> Any:
    """Return the trunk with a VeRA adapter of PEFT: vectors around random matrices that all layers share."""
    from peft import VeraConfig, get_peft_model

    torch.manual_seed(trial.seed)
    targets, transposed = list(trial.form.targets), trial.form.transposed
    config = VeraConfig(r=rank, target_modules=targets, fan_in_fan_out=transposed, save_projection=False)
    return get_peft_model(trial.trunk(), config)


def run_adapters(
    trial: Trial,
    steps: int,
    rate: float,
    domains: Sequence[str],
    *,
    ninth: bool,
    make: Callable[[Trial, int], Any],
    rank: int,
) -> Result:
    """Train an adapter of PEFT for each domain."""
    losses, size = {}, 0
    for name in (*domains, *([NINTH] if ninth else [])):
        model = make(trial, rank)
        own = [p for p in model.parameters() if p.requires_grad]
        trial.train(model, own, in_turn([name], steps), rate)
        losses[name], size = trial.loss(model, name), sum(p.nbytes for p in own)
    return {"losses": losses, "lost": 0.0, "bytes": {"shared": 0, "next": size}}


def run_shared(
    trial: Trial,
    steps: int,
    rate: float,
    domains: Sequence[str],
    *,
    ninth: bool,
    first: int | None = None,
    singular: bool = False,
    mixed: bool = False,
    **options: Any,
) -> Result:
    """Train the first specialists together with the shared cores; then the others alone, with frozen ones.

    With `singular`, the shared ends are singular vectors of the trunk's matrices and are not trained, as in
    LoRA-XS. With `mixed`, the rows of a batch have different domains while specialists are trained together.
    """
    model = trial.trunk()
    s = th.specialists(model, **options)
    for name in domains:
        s.add(name)
    members = domains[:first]
    if singular:
        use_singular_vectors(s)
        s.freeze()
        members = domains[:0]
    if members:
        batches = in_turn(members, steps)
        if mixed:
            count = len(members)
            batches = [[members[(k + j) % count] for j in range(BATCH)] for k in range(steps * count)]
        trial.train(model, s.parameters(*members), batches, rate, s)
        s.freeze()
    for name in domains[len(members) :]:
        trial.train(model, s.parameters(name), in_turn([name], steps), rate, s)
    losses = losses_of(trial, s, domains)
    result: Result = {}
    if ninth:
        rows = trial.texts["kernel"][1][: len(domains)]
        with torch.no_grad(), s.use(list(domains)):
            before = model(input_ids=rows).logits
        if trial.form.routed:
            result["likelihood"] = mean({x: trial.loss(s.model, x, s) for x in domains})
        s.add(NINTH)
        trial.train(model, s.parameters(NINTH), in_turn([NINTH], steps), rate, s)
        with torch.no_grad(), s.use(list(domains)):
            assert torch.equal(model(input_ids=rows).logits, before)
        after = losses_of(trial, s, [*domains, NINTH])
        result |= {"lost": mean(after) - mean(losses)}
        losses[NINTH] = after[NINTH]
    return {"losses": losses, "bytes": s.bytes(), **result}


@torch.no_grad()
def use_singular_vectors(s: tm.Specialists) -> None:
    """Set the shared ends to singular vectors of the trunk's matrix; singular values scale the left end."""
    for layer in s.layers.values():
        weight = layer.weight.T if type(layer.base_layer).__name__ == "Conv1D" else layer.weight
        u, values, vh = torch.linalg.svd(weight, full_matrices=False)
        left, right = layer.shared_parameters().values()
        rank = left.shape[-1]
        left.copy_((u * values)[:, :rank].reshape(left.shape))
        right.copy_(vh[:rank].reshape(right.shape))


#: Rows: function, its options, and the rates that are tried on three domains for a third of the steps.
LOW, HIGH, CHAIN = (1e-3, 3e-3), (1e-2, 3e-2, 6e-2), (5e-3, 1e-2, 2e-2)
ROWS: dict[str, tuple[Callable[..., Result], dict[str, Any], tuple[float, ...]]] = {
    "trunk": (run_trunk, {}, (0.0,)),
    "all weights, in sequence": (run_one, {}, LOW),
    "all weights, at once": (run_one, {"sequence": False}, LOW),
    "one LoRA of rank 8, in sequence": (run_one, {"rank": 8}, HIGH),
    "LoRA of rank 8": (run_adapters, {"make": with_lora, "rank": 8}, HIGH),
    "LoRA of rank 2": (run_adapters, {"make": with_lora, "rank": 2}, HIGH),
    "VeRA of rank 64": (run_adapters, {"make": with_vera, "rank": 64}, HIGH),
    "LoRA-XS of rank 32": (run_shared, {"share": "ends", "rank": 32, "singular": True}, HIGH),
    "ends": (run_shared, {"share": "ends", "rank": 32}, CHAIN),
    "ends of rank 54": (run_shared, {"share": "ends", "rank": 54}, CHAIN),
    "ends, mixed batches": (run_shared, {"share": "ends", "rank": 32, "mixed": True}, CHAIN),
    "ends, learned on four": (run_shared, {"share": "ends", "rank": 32, "first": 4}, CHAIN),
    "ends of all layers of a shape": (run_shared, {"share": "ends", "rank": 24, "pool": "shape"}, CHAIN),
    "inputs": (run_shared, {"share": "in", "rank": 3}, CHAIN),
    "outputs": (run_shared, {"share": "out", "rank": 4}, CHAIN),
    "center": (run_shared, {"share": "center", "rank": 24}, CHAIN),
}


def run_row(row: str, trial: Trial) -> Result:
    """Choose the rate after a third of the steps, and train with it."""
    run, options, rates = ROWS[row]
    start = time.process_time()
    rates = tuple(trial.form.slower * rate for rate in rates)
    tuned = {}
    if len(rates) > 1:
        for rate in rates:
            found = run(trial, trial.steps // 3, rate, TUNED, ninth=False, **options)
            tuned[rate] = mean(found["losses"])
            print(row, rate, round(tuned[rate], 4), flush=True)
    rate = min(tuned, key=tuned.__getitem__) if tuned else rates[0]
    result = run(trial, trial.steps, rate, DOMAINS, ninth=True, **options)
    result |= {"row": row, "seed": trial.seed, "steps": trial.steps, "rate": rate, "tuned": tuned}
    result |= {"loss": mean(result["losses"]), "ninth": result["losses"][NINTH]}
    result["seconds"] = time.process_time() - start
    return result


def step_times(trial: Trial, repeats: int) -> list[dict[str, Any]]:
    """Time a batch with eight specialists, one for each row, against the same batch with one specialist."""
    ids = torch.stack([trial.texts[x][0][0] for x in DOMAINS])
    rows = []
    for form, options in (
        ("ends", {"share": "ends", "rank": 32}),
        ("LoRA", {"share": "none", "rank": 8}),
        ("center", {"share": "center", "rank": 24}),
    ):
        model = trial.trunk()
        s = th.specialists(model, **options)
        for name in DOMAINS:
            s.add(name)
        s.freeze()

        def train(which: Any, s: th.PretrainedSpecialists = s) -> None:
            with s.use(which):
                s.model(input_ids=ids, labels=ids).loss.backward()
            for p in s.parameters():
                p.grad = None

        def read(which: Any, tokens: int | None, s: th.PretrainedSpecialists = s) -> None:
            with torch.no_grad(), s.use(which):
                s.model(input_ids=ids[:, :tokens])

        for what, run in (
            ("training step", train),
            ("forward pass", partial(read, tokens=None)),
            ("forward pass of one token a row", partial(read, tokens=1)),
        ):
            which = {"one": DOMAINS[0], "eight": list(DOMAINS)}
            functions = {x: partial(run, names) for x, names in which.items()}
            times = harness.paired_medians(functions, repeats, warmup=2, clock=time.process_time)
            one, eight = times["one"], times["eight"]
            times_of = {"one": vars(one), "eight": vars(eight)}
            row = {"form": form, "what": what, "ratio": eight.median / one.median, "seconds": times_of}
            print(form, what, round(row["ratio"], 3), flush=True)
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cache", type=Path, help="folder of the texts, the trunk and the finished rows")
    parser.add_argument("--row", action="append", default=[], choices=tuple(ROWS), metavar="ROW")
    parser.add_argument("--model", choices=tuple(TRUNKS), default="gpt2")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", action="store_true", help="write the record of all finished rows")
    parser.add_argument("--records", type=Path, default=harness.RECORDS)
    parser.add_argument("--speed", action="store_true", help="time batches with eight specialists")
    parser.add_argument("--toy", action="store_true", help="three rows on parts of the package's text")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.toy:
        toys = [run_row(row, Trial(None, 6, 0)) for row in ("trunk", "LoRA of rank 2", "ends")]
        harness.record("specialists", toys, folder=given.records)
        harness.record("specialists_speed", step_times(Trial(None, 6, 0), 2), folder=given.records)
        return
    if given.cache is None:
        parser.error("--cache FOLDER is needed")
    of = "" if given.model == "gpt2" else f"{given.model}-"
    kept = given.cache / f"specialists-{of}rows-{given.steps}.jsonl"
    for row in given.row:
        result = run_row(row, Trial(given.cache, given.steps, given.seed, given.model))
        with kept.open("a") as file:
            file.write(json.dumps(result) + "\n")
        print(json.dumps({k: result[k] for k in ("row", "loss", "ninth", "rate", "seconds")}), flush=True)
    if given.speed:
        times = step_times(Trial(given.cache, given.steps, given.seed, given.model), 21)
        harness.record("specialists_speed", times, folder=given.records)
    if given.report:
        rows = [json.loads(line) for line in kept.read_text().splitlines()]
        shown = [
            {
                "row": x["row"],
                "seed": x["seed"],
                "loss": round(x["loss"], 4),
                **{by: round(x[by], 4) if by in x else "" for by in ("router", "likelihood")},
                "ninth": round(x["ninth"], 4),
                "shared bytes": x.get("bytes", {}).get("shared"),
                "bytes of a specialist": x.get("bytes", {}).get("next"),
                "lost by the ninth": round(x["lost"], 4),
                "rate": x["rate"],
                "seconds": round(x["seconds"]),
            }
            for x in rows
        ]
        print(harness.table(shown))
        name = "specialists" if given.model == "gpt2" else f"specialists_{given.model}"
        harness.record(name, rows, folder=given.records)


if __name__ == "__main__":
    main()
