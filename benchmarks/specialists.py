"""Compare specialists that share cores with LoRA adapters: nine domains, one small trunk.

The trunk is the package's GPT-2, trained further on general documentation for 1,500 steps. Eight domains are
learned, then a ninth. Each row is one way to do so:

    python benchmarks/specialists.py --cache CACHE --row lora8
    python benchmarks/specialists.py --cache CACHE --report

`CACHE/texts` contains the unpacked packages `postgresql-doc-17`, `python3.13-doc`, `debian-handbook`,
`fortunes` and `linux-doc-6.12` (see `subjects.py`). Python, Perl and C come from the machine. Each rate is
chosen from `RATES` on three domains, after a third of the steps. The loss of a domain is the mean cross
entropy on 48 windows from its last tenth, in nats per token.
"""

from __future__ import annotations

import argparse
import json
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import tensornet_moe as tm
from tensornet_hf.embedded import calibration_text, gpt2_path, heldout_text

sys.path.insert(0, str(Path(__file__).parent))
import harness
import subjects

CONTEXT, BATCH, JUDGED, CHARACTERS = 128, 8, 48, 1_500_000
DOMAINS = ("scripture", "kernel", "library", "postgresql", "handbook", "fortunes", "python", "perl")
NINTH = "c"
#: Domains on which rates are chosen.
TUNED = ("kernel", "fortunes", "python")
#: Rates that are tried for all weights, and for changes.
RATES = {"all": (3e-4, 1e-3, 3e-3), "changes": (5e-3, 1.2e-2, 3e-2)}
#: Arguments of `tensornet_moe.specialists` of each row, and of PEFT's LoRA.
SHARING: dict[str, dict[str, Any]] = {
    "ends": {"share": "ends", "rank": 32},
    "ends of a shape": {"share": "ends", "rank": 32, "pool": "shape"},
    "in": {"share": "in", "rank": 4},
    "out": {"share": "out", "rank": 4},
    "center": {"share": "center", "rank": 24},
}
LORA = {"lora8": 8, "lora2": 2}
HTML = {
    "kernel": [f"linux-doc-6.12/html/{x}" for x in ("admin-guide", "filesystems")],
    "library": ["python3.13/html/library"],
    "postgresql": ["postgresql-doc-17/html"],
    "handbook": ["debian-handbook/html/en-US"],
    "general": [
        *(f"linux-doc-6.12/html/{x}" for x in ("networking", "process", "driver-api")),
        *(f"python3.13/html/{x}" for x in ("howto", "tutorial", "faq", "whatsnew")),
    ],
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


def windows(cache: Path, name: str) -> tuple[Tensor, Tensor]:
    """Return windows for training and judging, shape `(windows, CONTEXT)`; the last tenth is judged."""
    kept = cache / f"specialists-{name}.pt"
    if not kept.exists():
        tokenizer = AutoTokenizer.from_pretrained(gpt2_path())
        torch.save(subjects.token_windows(tokenizer, read_domain(cache, name), length=CONTEXT), kept)
    ids = torch.load(kept)
    last = len(ids) // 10
    judged = ids[-last:]
    return ids[:-last], judged[torch.linspace(0, len(judged) - 1, min(JUDGED, len(judged))).long()]


class Trial:
    """Trunk, texts and settings of a row."""

    def __init__(self, cache: Path, steps: int, seed: int) -> None:
        self.cache, self.steps, self.seed = cache, steps, seed
        self.texts = {name: windows(cache, name) for name in (*DOMAINS, NINTH)}

    def trunk(self) -> Any:
        """Load the package's GPT-2, trained further on general documentation; train it if it is absent."""
        folder = self.cache / "specialists-trunk"
        if not folder.exists():
            model = AutoModelForCausalLM.from_pretrained(gpt2_path())
            ids, _ = windows(self.cache, "general")
            self.texts["general"] = (ids, ids)
            self.train(model, list(model.parameters()), [["general"] * BATCH] * 1500, 2e-3)
            model.save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(folder)

    def train(
        self,
        model: nn.Module,
        parameters: Sequence[nn.Parameter],
        rows: Sequence[Sequence[str]],
        rate: float,
        specialists: tm.Specialists | None = None,
    ) -> None:
        """Train on batches of the domains of `rows`, with a linear schedule."""
        chosen = {id(p) for p in parameters}
        # A shared core has a lower rate, so that a rate chosen on few domains also suits more domains.
        groups = tm.parameter_groups(model, lr=rate)
        groups = [{**x, "params": [p for p in x["params"] if id(p) in chosen]} for x in groups]
        optimizer = torch.optim.AdamW([x for x in groups if x["params"]], weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda k: min((k + 1) / 20, 1 - k / len(rows))
        )
        draw = torch.Generator().manual_seed(self.seed)
        model.train()
        for names in rows:
            picked = [int(torch.randint(len(self.texts[x][0]), (1,), generator=draw)) for x in names]
            ids = torch.stack([self.texts[x][0][k] for x, k in zip(names, picked, strict=True)])
            which: Any = names[0] if len(set(names)) == 1 else names
            if specialists is None:
                loss = model(input_ids=ids, labels=ids).loss
            else:
                with specialists.use(which):
                    loss = model(input_ids=ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
        model.eval()

    @torch.no_grad()
    def loss(self, model: nn.Module, name: str) -> float:
        ids = self.texts[name][1]
        parts = [float(model(input_ids=x, labels=x).loss) * len(x) for x in ids.split(16)]
        return sum(parts) / len(ids)


def losses_of(trial: Trial, s: tm.Specialists, names: Sequence[str]) -> dict[str, float]:
    """Return the loss of each specialist on its own domain."""
    found = {}
    for name in names:
        with s.use(name):
            found[name] = trial.loss(s.model, name)
    return found


def alone(name: str, steps: int) -> list[list[str]]:
    """Rows of batches of one domain."""
    return [[name] * BATCH] * steps


def mean(losses: dict[str, float]) -> float:
    """Return the mean loss, without that of the ninth domain."""
    known = [loss for name, loss in losses.items() if name != NINTH]
    return sum(known) / len(known)


def run_all(trial: Trial, steps: int, rate: float, domains: Sequence[str], *, ninth: bool) -> dict[str, Any]:
    """Train all weights on one domain after another."""
    model = trial.trunk()
    for name in (*domains, *([NINTH] if ninth else [])):
        trial.train(model, list(model.parameters()), alone(name, steps), rate)
        if name == domains[-1]:
            losses = {x: trial.loss(model, x) for x in domains}
    after = {x: trial.loss(model, x) for x in (*domains, NINTH)}
    return {"losses": losses | {NINTH: after[NINTH]}, "lost": mean(after) - mean(losses)}


def run_lora(
    trial: Trial, steps: int, rate: float, domains: Sequence[str], *, ninth: bool, rank: int
) -> dict[str, Any]:
    """Train an adapter of PEFT for each domain."""
    from peft import LoraConfig, get_peft_model

    losses, size = {}, 0
    for name in (*domains, *([NINTH] if ninth else [])):
        torch.manual_seed(trial.seed)
        targets = ["c_attn", "c_proj", "c_fc"]
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, fan_in_fan_out=True)
        model = get_peft_model(trial.trunk(), config)
        own = [p for p in model.parameters() if p.requires_grad]
        trial.train(model, own, alone(name, steps), rate)
        losses[name], size = trial.loss(model, name), sum(p.nbytes for p in own)
    return {"losses": losses, "bytes": {"shared": 0, "next": size}, "lost": 0.0}


def run_shared(
    trial: Trial,
    steps: int,
    rate: float,
    domains: Sequence[str],
    *,
    ninth: bool,
    first: int | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Train the first specialists together with the shared cores; then each alone, with frozen ones.

    Half of the steps of the first domains are used for training them together.
    """
    model = trial.trunk()
    s = tm.specialists(model, **options)
    for name in domains:
        s.add(name)
    together, half = domains[:first], steps // 2
    mixed = [[together[(k + j) % len(together)] for j in range(BATCH)] for k in range(half * len(together))]
    trial.train(model, s.parameters(*together), mixed, rate, s)
    s.freeze()
    for name in domains:
        trial.train(model, s.parameters(name), alone(name, half if name in together else steps), rate, s)
    losses, lost = losses_of(trial, s, domains), 0.0
    if ninth:
        rows = trial.texts["kernel"][1][: len(domains)]
        with torch.no_grad(), s.use(list(domains)):
            before = model(input_ids=rows).logits
        s.add(NINTH)
        trial.train(model, s.parameters(NINTH), alone(NINTH, steps), rate, s)
        with torch.no_grad(), s.use(list(domains)):
            assert torch.equal(model(input_ids=rows).logits, before)
        lost = mean(losses_of(trial, s, domains)) - mean(losses)
        losses |= losses_of(trial, s, [NINTH])
    return {"losses": losses, "bytes": s.bytes(), "lost": lost}


def run_trunk(
    trial: Trial, steps: int, rate: float, domains: Sequence[str], *, ninth: bool
) -> dict[str, Any]:
    """Measure the trunk."""
    model = trial.trunk().eval()
    return {"losses": {x: trial.loss(model, x) for x in (*domains, NINTH)}, "lost": 0.0}


def run_row(row: str, trial: Trial) -> dict[str, Any]:
    """Choose the rate after a third of the steps, and train with it."""
    base, _, first = row.partition(", first ")
    options: dict[str, Any] = {}
    run: Any = {"trunk": run_trunk, "all weights": run_all}.get(base)
    if base in LORA:
        run, options = run_lora, {"rank": LORA[base]}
    elif base in SHARING:
        run, options = run_shared, dict(SHARING[base])
        options |= {"first": int(first)} if first else {}
    rates = (0.0,) if base == "trunk" else RATES["all" if base == "all weights" else "changes"]
    start = time.process_time()
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--row", action="append", default=[])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", action="store_true", help="write the record of all finished rows")
    given = parser.parse_args()
    torch.set_num_threads(1)
    kept = given.cache / f"specialists-rows-{given.steps}.jsonl"
    for row in given.row:
        result = run_row(row, Trial(given.cache, given.steps, given.seed))
        with kept.open("a") as file:
            file.write(json.dumps(result) + "\n")
        print(json.dumps({k: result[k] for k in ("row", "loss", "ninth", "rate", "seconds")}), flush=True)
    if given.report:
        rows = [json.loads(line) for line in kept.read_text().splitlines()]
        shown = [
            {
                "row": x["row"],
                "seed": x["seed"],
                "loss": round(x["loss"], 4),
                "ninth": round(x["ninth"], 4),
                "shared bytes": x.get("bytes", {}).get("shared"),
                "bytes of a specialist": x.get("bytes", {}).get("next"),
                "lost by the ninth": x["lost"],
                "rate": x["rate"],
                "seconds": round(x["seconds"]),
            }
            for x in rows
        ]
        print(harness.table(shown))
        harness.record("specialists", rows)


if __name__ == "__main__":
    main()
