"""How many bits of a weight does the change of a fine-tuned model need, with `pack`, BitDelta or an SVD?

All weights of SmolLM2-135M-Instruct (rotated, see `subjects.rotate`) are trained on each domain of
`specialists.py`, and on German pages, for a few minutes. The fine-tuned models are saved in float32. Then
their changes are stored in several ways, and each result is compared with the fine-tuned model on the last
tenth of the domain's text:

    python benchmarks/fine_tunes.py --cache CACHE --domain german --domain python
    python benchmarks/fine_tunes.py --cache CACHE --domain german --row "pack 0.25" --row "SVD int4 8"
    python benchmarks/fine_tunes.py --cache CACHE --report

`CACHE/texts` contains the packages that `specialists.py` names. Rows and surveys are kept in `CACHE`, so
that calls can be interrupted, and several domains can be measured side by side; the first row of `pack`
contains the time of the survey. Norms and biases are those of the fine-tuned model in every row, and are not
counted. The embeddings, which are tied to the head, are changed like other matrices.

Reference:
    Liu et al. 2024, "BitDelta: Your fine-tune may only be worth one bit" (sections 3.1 and 3.2; the scales
    are not trained here).
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import tensornet as tn
import tensornet_hf as th
from tensornet.nn.layer_kinds import kind_of
from tensornet.quantization import round_weight
from tensornet_hf.embedded import calibration_text, gpt2_path, heldout_text

sys.path.insert(0, str(Path(__file__).parent))
import harness
import subjects
from specialists import DOMAINS, NINTH, read_domain

LENGTH, BATCH, JUDGED, CALIBRATED = 128, 8, 32, 200_000
ALL = ("german", *DOMAINS, NINTH)


@dataclass(frozen=True)
class FineTuned:
    """A base and a model that was made of it.

    Args:
        base: folder of the base.
        folder: folder of the fine-tuned model.
        text: file with the calibration text.
        judged: tokens on which results are compared, shape `(windows, LENGTH)`.
        scratch: folder for packs; they are removed.
    """

    base: Path
    folder: Path
    text: Path
    judged: Tensor
    scratch: Path


def make(cache: Path, domain: str, steps: int, rate: float) -> FineTuned:
    """Fine-tune SmolLM2 on a domain, unless this was done before."""
    subjects.prepare_models(cache)
    base, folder = cache / "smollm2-rotated", cache / "fine-tuned" / domain
    subjects.rotate(cache / "smollm2", base)
    text = read_domain(cache, domain)
    ids = subjects.token_windows(AutoTokenizer.from_pretrained(base), text, length=LENGTH)
    first = len(ids) - len(ids) // 10
    file = cache / "fine-tuned" / f"{domain}.txt"
    if not folder.exists():
        file.parent.mkdir(exist_ok=True)
        file.write_text(text[:CALIBRATED])
        train(base, folder, ids[:first], steps, rate)
    return FineTuned(base, folder, file, ids[first:][subjects.spread(JUDGED, len(ids) - first)], cache)


def train(base: Path, folder: Path, ids: Tensor, steps: int, rate: float) -> None:
    """Train all weights of a model under autocast to bfloat16, with a linear schedule, and save them."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: min((k + 1) / 10, 1 - k / steps))
    for _ in range(steps):
        batch = ids[torch.randint(len(ids), (BATCH,))]
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    th.save(model, folder, source=base)


def toy(folder: Path) -> FineTuned:
    """Fine-tune the package's GPT-2 for a few steps."""
    text = folder / "toy.txt"
    text.write_text(calibration_text()[:8000].upper())
    ids = subjects.token_windows(AutoTokenizer.from_pretrained(gpt2_path()), text.read_text(), length=32)
    train(gpt2_path(), folder / "toy", ids, steps=4, rate=3e-4)
    judged = subjects.token_windows(
        AutoTokenizer.from_pretrained(gpt2_path()), heldout_text()[:2000].upper(), length=32
    )
    return FineTuned(gpt2_path(), folder / "toy", text, judged[:4], folder)


def load(folder: Path) -> Any:
    """Load a model in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def compared(model: nn.Module, fine: nn.Module, judged: Tensor) -> dict[str, float]:
    """Measure the divergence from the fine-tuned model in nats per token, and how many top tokens agree."""
    total, same, count = 0.0, 0, 0
    for ids in judged.split(4):
        wanted, found = (x(input_ids=ids).logits.log_softmax(-1) for x in (fine, model))
        total += float((wanted.exp() * (wanted - found)).sum(-1).double().sum())
        same += int((wanted.argmax(-1) == found.argmax(-1)).sum())
        count += ids.numel()
    return {"kl": total / count, "same_top": same / count}


#: A way to store the change of a matrix: from the change `(out, in)` to its approximation and its bits.
Stored = Callable[[Tensor], tuple[Tensor, int]]


def nothing(change: Tensor) -> tuple[Tensor, int]:
    """Leave the change out."""
    return torch.zeros_like(change), 0


def signs(change: Tensor, scales: str) -> tuple[Tensor, int]:
    """Store signs, with scales of least squared error: of the matrix, of rows, or of rows and columns."""
    size = change.abs()
    if scales == "matrix":
        return change.sign() * size.mean(), change.numel() + 16
    rows = size.mean(1, keepdim=True)
    if scales == "rows":
        return change.sign() * rows, change.numel() + 16 * len(change)
    columns = torch.ones_like(change[:1])
    for _ in range(20):  # alternating least squares for |change| = rows * columns
        columns = (size * rows).sum(0, keepdim=True) / rows.square().sum().clamp_min(1e-30)
        rows = (size * columns).sum(1, keepdim=True) / columns.square().sum().clamp_min(1e-30)
    return change.sign() * rows * columns, change.numel() + 16 * sum(change.shape)


def low_rank(change: Tensor, rank: int, name: str) -> tuple[Tensor, int]:
    """Store the truncated SVD, with both factors in a number format."""
    left, values, right = torch.svd_lowrank(change, rank + 8, niter=4)
    root = values[:rank].sqrt()
    factors = [(left[:, :rank] * root).T.contiguous(), (right[:, :rank] * root).T.contiguous()]
    if name == "bf16":
        made = [x.bfloat16().float() for x in factors]
        return made[0].T @ made[1], 16 * rank * sum(change.shape)
    packed = [round_weight(x, f"{name}:row") for x in factors]
    bits = 8 * sum(tn.quantization.NumberFormat.parse(f"{name}:row").nbytes(x.shape) for x in factors)
    return packed[0].dequantize(torch.float32).T @ packed[1].dequantize(torch.float32), bits


@torch.no_grad()
def run_stored(case: FineTuned, store: Stored) -> dict[str, Any]:
    """Store the change of each matrix in one way."""
    base, fine, made = load(case.base), load(case.folder), load(case.folder)
    bits = elements = 0
    done: set[int] = set()
    for name, module in made.named_modules():
        kind = kind_of(module)
        if kind is None or id(module.weight) in done:
            continue
        done.add(id(module.weight))
        before = kind.matrix(base.get_submodule(name))
        change, size = store(kind.matrix(module) - before)
        kind.matrix(module).copy_(before + change)
        bits, elements = bits + size, elements + change.numel()
    return {"bits": bits / elements, "bytes": bits // 8, **compared(made, fine, case.judged)}


def run_pack(case: FineTuned, bits: float) -> dict[str, Any]:
    """Plan and write the changes with `tensornet_hf.pack`."""
    folder = case.scratch / f"pack-{case.folder.name}-{bits}"
    shutil.rmtree(folder, ignore_errors=True)
    config = tn.CompressionConfig(bits_per_weight=bits)
    surveys = case.scratch / "surveys" / case.folder.name
    surveys.mkdir(parents=True, exist_ok=True)
    report = th.pack(case.base, folder, {"own": case.folder}, config, calibration=case.text, surveys=surveys)
    facts = report.models["own"]
    s = th.load_specialists(folder, load(case.base))
    with s.use("own"):
        found = compared(s.model, load(case.folder), case.judged)
    shutil.rmtree(folder)
    return {"bits": facts.bits_per_weight, "bytes": facts.bytes, "layers": facts.layers, **found}


ROWS: dict[str, Callable[[FineTuned], dict[str, Any]]] = {
    "nothing": partial(run_stored, store=nothing),
    **{
        f"BitDelta, {x}": partial(run_stored, store=partial(signs, scales=x))
        for x in ("matrix", "rows", "both")
    },
    **{
        f"SVD {name} {rank}": partial(run_stored, store=partial(low_rank, rank=rank, name=name))
        for name, ranks in {"bf16": (4, 16, 48), "int4": (4, 8, 16, 32, 64)}.items()
        for rank in ranks
    },
    **{f"pack {bits}": partial(run_pack, bits=bits) for bits in (0.1, 0.25, 0.5, 1.0)},
}


def run_row(row: str, domain: str, case: FineTuned) -> dict[str, Any]:
    """Measure one row for one domain."""
    started, before = time.perf_counter(), harness.processor_seconds()
    result = ROWS[row](case)
    return {
        "row": row,
        "domain": domain,
        **result,
        "seconds": time.perf_counter() - started,
        "processor_seconds": harness.processor_seconds() - before,
        "peak_mib": harness.peak_mib(),
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cache", type=Path, help="folder of the texts, the models and the finished rows")
    parser.add_argument("--domain", action="append", default=[], choices=ALL)
    parser.add_argument("--row", action="append", default=[], choices=tuple(ROWS), metavar="ROW")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--rate", type=float, default=5e-5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="write the record of all finished rows")
    parser.add_argument("--records", type=Path, default=harness.RECORDS)
    parser.add_argument("--toy", action="store_true", help="three rows of the package's GPT-2")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.toy:
        case = toy(given.records)
        rows = [run_row(row, "toy", case) for row in ("nothing", "BitDelta, rows", "pack 0.5")]
        harness.record("fine_tunes", rows, folder=given.records)
        return
    if given.cache is None:
        parser.error("--cache FOLDER is needed")
    kept = given.cache / "fine-tunes-rows.jsonl"
    for domain in given.domain:
        case = make(given.cache, domain, given.steps, given.rate)
        for row in given.row:
            result = run_row(row, domain, case)
            with kept.open("a") as file:
                file.write(json.dumps(result) + "\n")
            print({k: x for k, x in result.items() if k != "layers"}, flush=True)
    if given.report:
        rows = [json.loads(line) for line in kept.read_text().splitlines()]
        harness.record("fine_tunes", rows, folder=given.records, steps=given.steps, rate=given.rate)
        shown = ("row", "domain", "bits", "kl", "same_top", "processor_seconds")
        print(harness.table([{k: row[k] for k in shown} for row in sorted(rows, key=lambda x: x["domain"])]))


if __name__ == "__main__":
    main()
