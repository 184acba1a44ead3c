"""How long does a training step of experts that share cores take, compared with dense experts?

1. For every way of sharing: the bytes of the experts, and the time of a training step of one feed-forward
   mixture relative to dense experts with the same routing. A step is a forward and backward pass, without and
   with the update of AdamW. Shapes are 768 x 3072, with 8 experts, top-1 routing and 2,048 tokens. Goal: at
   most 1.1. With two-sided ends of bond 16 every expert is rebuilt, which needs 1.125 times the operations of
   dense experts.
2. The same for two layers with one pool of 8 dense experts, relative to two layers with 8 experts each.
3. With `--compiled`: the same step with `torch.compile`, relative to the step without. Goal: at most 1.
4. The time of inference with prepared experts, relative to the same mixture with dense expert matrices, for a
   few tokens at a time. Goal: at most 1.1.

With one thread, processor seconds are measured, which depend least on other users of the machine; with
several threads, wall seconds.

    python benchmarks/moe_step.py                # five minutes; writes benchmarks/records/moe_step.json
    python benchmarks/moe_step.py --threads 1 2  # with one thread, then with two
    python benchmarks/moe_step.py --toy          # seconds; only tests the script
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tensornet as tn
import tensornet_moe as tm
from tensornet_moe.grouped_linear import Groups, grouped_linear, rows_linear, takes_grouped_mm

sys.path.insert(0, str(Path(__file__).parent))
from harness import RECORDS, clock_for, held_bytes, paired_medians, record, with_threads

SWITCH_LIMIT, COMPILED_LIMIT, INFERENCE_LIMIT = 1.1, 1.0, 1.1
DENSE = "dense experts"


@dataclass(frozen=True)
class Case:
    """Sizes of the mixture.

    Args:
        model: width of the model.
        hidden: width of the hidden layer.
        experts: number of experts.
        tokens: number of tokens in a training step.
        decode_tokens: numbers of tokens in inference calls.
        repeats: number of timed repeats.
    """

    model: int
    hidden: int
    experts: int
    tokens: int
    decode_tokens: tuple[int, ...]
    repeats: int


BASE = Case(768, 3072, 8, 2048, (1, 8, 32), 7)
TOY = Case(8, 16, 2, 32, (1, 4), 1)


class DenseExperts(tm.ExpertBank):
    """Bank with one dense matrix for each expert and no sharing, the baseline."""

    def __init__(self, num_experts: int, out_features: int, in_features: int) -> None:
        super().__init__(num_experts, (out_features, in_features))
        self.weight = nn.Parameter(torch.randn(num_experts, out_features, in_features) / in_features**0.5)

    def expert_matrices(self, experts: Sequence[int] | Tensor | None = None) -> Tensor:
        return self.weight if experts is None else self.weight[torch.as_tensor(experts)]

    def apply_rows(self, x: Tensor, groups: Groups) -> Tensor:
        # Unlike the method of the base class, this does not select the active experts, which would copy them.
        if takes_grouped_mm(x, self.out_features, groups):
            return grouped_linear(x, self.weight, groups)
        return rows_linear(x, self.weight, groups)

    def shared_parameters(self) -> dict[str, nn.Parameter]:
        return {}

    def spec(self) -> dict[str, Any]:
        return {"type": "dense_experts"}


def mixture(case: Case, make: Callable[[int, int, int], tm.ExpertBank]) -> tm.SharedCoreMoE:
    """Build a feed-forward mixture; `make(experts, rows, columns)` builds each of its two banks."""
    banks = {
        "wi": make(case.experts, case.hidden, case.model),
        "wo": make(case.experts, case.model, case.hidden),
    }
    router = tm.SwitchRouter(case.model, case.experts)
    return tm.SharedCoreMoE(router, tm.ExpertFFN(banks, activation="relu"))


def _halves(size: int) -> tuple[int, int]:
    small = max(x for x in range(1, int(size**0.5) + 1) if size % x == 0)
    return small, size // small


def two_sided(experts: int, rows: int, columns: int) -> tm.ExpertBank:
    """Build a bank of three-core chains with a shared center; each end core has an out-leg and an in-leg."""
    a = 4 if rows % 16 == columns % 16 == 0 else 2
    legs = {"out_dims": (a, rows // a**2, a), "in_dims": (a, columns // a**2, a)}
    return tm.SharedCoreExperts(tn.topologies.mpo(**legs), experts)


def one_sided(experts: int, rows: int, columns: int) -> tm.ExpertBank:
    """Build the bank of `tm.mixture(share="center")`: the first core has no in-leg, the last no out-leg."""
    return tm.mixtures.make_bank(torch.empty(0, rows, columns), experts=experts, share="center")


def base_and_deltas(experts: int, rows: int, columns: int) -> tm.ExpertBank:
    """Build a bank of one shared dense matrix and a low-rank delta for each expert."""
    base = tm.SharedCoreExperts(
        tn.topologies.dense(out_features=rows, in_features=columns), experts, share="base"
    )
    return tm.LowRankDeltaExperts(base, min(rows, columns) // 48 or 1)


def block_trains(experts: int, rows: int, columns: int) -> tm.ExpertBank:
    """Build a bank of block tensor trains of two cores, without sharing."""
    topology = tn.topologies.block_tt(out_dims=_halves(rows), in_dims=_halves(columns), max_bond=1)
    return tm.SharedCoreExperts(topology, experts, share="none")


#: Maps names of ways of sharing to functions `(experts, rows, columns) -> bank`.
FORMS: dict[str, Callable[[int, int, int], tm.ExpertBank]] = {
    "two-sided ends": two_sided,
    "one-sided ends": one_sided,
    "base and deltas": base_and_deltas,
    "block tensor trains": block_trains,
}
#: Ways of sharing whose steps are also measured with `torch.compile`.
CHAINS = ("two-sided ends", "one-sided ends")


def form_layers(case: Case, names: Sequence[str]) -> dict[str, tm.SharedCoreMoE]:
    """Build mixtures with equal router weights: one of dense experts, and one for each way of sharing."""
    torch.manual_seed(0)
    makers = {DENSE: DenseExperts, **{name: FORMS[name] for name in names}}
    layers = {name: mixture(case, make).train() for name, make in makers.items()}
    for moe in layers.values():
        moe.router.load_state_dict(layers[DENSE].router.state_dict())
    return layers


class TwoLayers(nn.Module):
    """Two mixtures with residual connections, each with its own experts or both with one pool."""

    def __init__(self, case: Case, *, pooled: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(mixture(case, DenseExperts) for _ in range(2))
        self.pool = tm.ExpertPool(self.layers[0].experts) if pooled else None
        for layer in self.layers if pooled else ():
            layer.experts = tm.PooledExperts(self.pool)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def stepper(
    case: Case, moe: nn.Module, *, update: bool = False, compiled: bool = False
) -> Callable[[], None]:
    """Return a function that makes a forward and backward pass and, if `update`, a step of AdamW."""
    generator = torch.Generator().manual_seed(1)
    x, grad = torch.randn(2, case.tokens, case.model, generator=generator)
    x.requires_grad_()
    run = torch.compile(moe) if compiled else moe
    optimizer = torch.optim.AdamW(moe.parameters(), lr=1e-6, fused=True)

    def step() -> None:
        moe.zero_grad()
        y = run(x)
        torch.autograd.backward([y, tm.collect_aux_losses(moe).total], [grad, torch.ones(())])
        if update:
            optimizer.step()

    return step


def compared(
    what: str, case: Case, steps: dict[str, Callable[[], None]], to: str, asked: float, **facts: Any
) -> list[dict[str, Any]]:
    """Time several steps in turn, and make a row for each that compares it with the step `to`.

    Args:
        what: description of the step.
        case: sizes.
        steps: functions to time, by name.
        to: name of the step to compare with.
        asked: goal, the largest acceptable ratio.
        facts: further columns, each a mapping from the name of the step to the value.
    """
    times = paired_medians(steps, case.repeats, warmup=2, clock=clock())
    return [
        {
            "what": f"{what}, {name}",
            "tokens": case.tokens,
            **{key: values[name] for key, values in facts.items()},
            "seconds": timing.median,
            "seconds_low": timing.low,
            "seconds_high": timing.high,
            "compared_with": times[to].median,
            "ratio": timing.median / times[to].median,
            "asked": asked,
        }
        for name, timing in times.items()
        if name != to
    ]


def time_forms(case: Case) -> list[dict[str, Any]]:
    """For every way of sharing, time a training step relative to dense experts, without and with AdamW."""
    layers = form_layers(case, list(FORMS))
    sizes = {name: sum(p.numel() for p in moe.experts.parameters()) for name, moe in layers.items()}
    held = {name: held_bytes(moe.experts) for name, moe in layers.items()}
    rows = []
    for what, update in (("training step", False), ("training step with AdamW", True)):
        steps = {name: stepper(case, moe, update=update) for name, moe in layers.items()}
        rows += compared(what, case, steps, DENSE, SWITCH_LIMIT, parameters=sizes, bytes=held)
    return rows


def time_pool(case: Case) -> list[dict[str, Any]]:
    """Time a training step of two layers with one pool, relative to two layers with their own experts."""
    models = {name: TwoLayers(case, pooled=name == "pool").train() for name in (DENSE, "pool")}
    sizes = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    rows = []
    for what, update in (("two layers", False), ("two layers with AdamW", True)):
        steps = {name: stepper(case, model, update=update) for name, model in models.items()}
        rows += compared(f"training step, {what}", case, steps, DENSE, SWITCH_LIMIT, parameters=sizes)
    return rows


def time_compiled(case: Case) -> list[dict[str, Any]]:
    """Time a training step with `torch.compile`, relative to the same step without it."""
    rows = []
    for name, moe in form_layers(case, CHAINS).items():
        steps = {"eager": stepper(case, moe), f"{name}, compiled": stepper(case, moe, compiled=True)}
        rows += compared("training step", case, steps, "eager", COMPILED_LIMIT)
    return rows


def clock() -> Callable[[], float]:
    return clock_for(torch.get_num_threads())


@torch.inference_mode()
def time_inference(case: Case, tokens: int) -> dict[str, Any]:
    """Time an inference call with prepared experts, relative to a call with dense experts."""
    with torch.inference_mode(False):
        torch.manual_seed(0)
        ours, dense = mixture(case, two_sided).eval(), mixture(case, DenseExperts).eval()
        tn.nn.prepare_for_inference(ours)
        dense.router.load_state_dict(ours.router.state_dict())
    batches = [torch.randn(tokens, case.model) for _ in range(10 if case.repeats > 1 else 1)]

    def run(moe: tm.SharedCoreMoE) -> Callable[[], None]:
        def call() -> None:
            for batch in batches:
                moe(batch)

        return call

    times = paired_medians(
        {"ours": run(ours), "dense": run(dense)},
        5 * case.repeats,
        warmup=2,
        clock=clock(),
    )
    return {
        "what": "inference",
        "tokens": tokens,
        "seconds": times["ours"].median / len(batches),
        "seconds_low": times["ours"].low / len(batches),
        "seconds_high": times["ours"].high / len(batches),
        "compared_with": times["dense"].median / len(batches),
        "ratio": times["ours"].median / times["dense"].median,
        "asked": INFERENCE_LIMIT,
    }


def main(arguments: Sequence[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--toy", action="store_true", help="tiny sizes, for the tests")
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument(
        "--threads", type=int, nargs="+", default=[1], help="numbers of threads to measure with"
    )
    parser.add_argument("--compiled", action="store_true", help="measure steps with torch.compile too")
    given = parser.parse_args(arguments)
    case = TOY if given.toy else BASE

    def work(threads: int) -> list[dict[str, Any]]:
        found = [
            *time_forms(case),
            *time_pool(case),
            *(time_compiled(case) if given.compiled else ()),
            *(time_inference(case, tokens) for tokens in case.decode_tokens),
        ]
        print(*found, sep="\n", flush=True)
        return [{"threads": threads, **row} for row in found]

    sizes = {"experts": case.experts, "model": case.model, "hidden": case.hidden}
    clock = "processor seconds with one thread, wall seconds with several"
    return record("moe_step", with_threads(given.threads, work), folder=given.records, clock=clock, **sizes)


if __name__ == "__main__":
    main()
