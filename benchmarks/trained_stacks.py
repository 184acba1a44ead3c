"""What does a trained mixture lose when its experts are compressed, by which way of sharing?

    python benchmarks/trained_stacks.py TEXTS [--state FOLDER] [--row "fine, E = 30"]

The experts of a mixture that `moe_from_scratch.py` has trained, at 80, 60 and 40 % of their parameters: by
the methods of `planted_stacks.py`, which minimise the Frobenius error; and by low ranks that minimise the
predicted increase of the loss, `1/2 sum_e tr(R_e E_e C_e E_e^T)` with moments of each expert's own tokens, of
two sides and of the inputs alone. Each matrix of each layer is a stack of its own, and takes the sizes or
the form of lowest error, or of lowest prediction, within its budget. `error` is `|W - W'| / |W|` over all
stacks; the loss is that of the model with all experts replaced, on the held-out part, nothing trained
afterwards.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tensornet as tn
import tensornet_moe as tm
from tensornet.compression.shared_forms import SHARED_FORMS, fit_form
from tensornet.linalg.weighted_svd import Weighting, damped, weighted_svd
from tensornet_moe.grouped_linear import Groups

sys.path.insert(0, str(Path(__file__).parent))
from harness import RECORDS, record
from moe_from_scratch import CACHE, Recipe, Run
from planted_stacks import KEEP, METHODS, Case
from scratch_rows import Sizes
from scratch_table import ROWS
from scratch_text import corpus_of, load_corpus

#: Damping of the moments of gradients and inputs, in units of their mean diagonal.
ROW_DAMPING, COLUMN_DAMPING = 0.01, 1e-4


class LinearBank(nn.Module):
    """The matrices of experts as linear layers, which `tensornet.calibrate` observes one by one."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.num_experts, self.out_features, self.in_features = weights.shape
        self.dtype = weights.dtype
        self.layers = nn.ModuleList(
            nn.Linear(self.in_features, self.out_features, bias=False) for _ in weights
        )
        for layer, weight in zip(self.layers, weights, strict=True):
            assert isinstance(layer, nn.Linear)
            layer.weight.data.copy_(weight)

    def apply_rows(self, x: Tensor, groups: Groups) -> Tensor:
        """Map rows sorted by expert."""
        assert groups.sizes is not None
        parts = zip(self.layers, x.split(groups.sizes), strict=True)
        return torch.cat([layer(part) for layer, part in parts if len(part)])


@dataclass(frozen=True)
class Stack:
    """The experts' matrices of one name in one layer.

    Args:
        place: name of the bank in the model.
        weights: shape `(experts, out, in)`.
        weightings: one for each expert.
    """

    place: str
    weights: Tensor
    weightings: tuple[Weighting, ...]

    def cost(self, made: Tensor) -> float:
        """Predicted increase of the loss of a token."""
        errors = (made - self.weights).double()
        return sum(x.cost(error) for x, error in zip(self.weightings, errors, strict=True))


def stacks_of(model: nn.Module, batches: Iterable[Tensor]) -> list[Stack]:
    """Read the dense experts of a model, with the second moments of their tokens."""
    places = [
        f"{name}.experts.{which}"
        for name, layer in model.named_modules()
        if isinstance(layer, tm.SharedCoreMoE)
        for which in layer.experts.names
    ]
    observed = copy.deepcopy(model)
    for place in places:
        parent, _, which = place.rpartition(".")
        bank = model.get_submodule(place)
        assert isinstance(bank, tm.ExpertBank)
        setattr(observed.get_submodule(parent), which, LinearBank(bank.expert_matrices().detach()))
    chosen = tn.CompressionConfig(target_modules=[f"{place}.layers.*" for place in places])
    stats = tn.calibrate(observed, batches, config=chosen)
    found = []
    for place in places:
        bank = observed.get_submodule(place)
        assert isinstance(bank, LinearBank)
        names = [f"{place}.layers.{e}" for e in range(bank.num_experts)]
        weightings = tuple(
            Weighting(damped(stats.rows[name], ROW_DAMPING), damped(stats.columns[name], COLUMN_DAMPING))
            for name in names
        )
        weights = torch.stack([observed.get_submodule(name).weight.detach() for name in names])
        found.append(Stack(place, weights, weightings))
    return found


Made = tuple[Tensor, int]  # matrices, parameters


def separate(stack: Stack, budget: int) -> Iterator[Made]:
    """Yield a low rank of each expert."""
    count, rows, columns = stack.weights.shape
    rank = min(budget // (count * (rows + columns)), rows, columns)
    if rank:
        made = []
        for weight, weighting in zip(stack.weights, stack.weightings, strict=True):
            left, right = weighted_svd(weight, weighting).factors(rank)
            made.append((left @ right).to(weight))
        yield torch.stack(made), rank * count * (rows + columns)


def shared(stack: Stack, budget: int, forms: Sequence[str]) -> Iterator[Made]:
    """Low ranks with a common factor of inputs or outputs, or beside a common base."""
    count, rows, columns = stack.weights.shape
    for name in forms:
        numbers = SHARED_FORMS[name].numbers
        ranks = range(1, min(rows, columns) + 1)
        rank = max((r for r in ranks if numbers(count, rows, columns, r) <= budget), default=0)
        if rank:
            networks = fit_form(name, list(stack.weights), stack.weightings, rank)
            cores = {id(core): core.numel() for network in networks for core in network.cores}
            made = torch.stack([network.to_matrix() for network in networks])
            yield made.to(stack.weights), sum(cores.values())


def any_form(stack: Stack, budget: int) -> Iterator[Made]:
    """Separate low ranks, or the three shared forms."""
    yield from separate(stack, budget)
    yield from shared(stack, budget, tuple(SHARED_FORMS))


Method = Callable[[Stack, int], Iterator[Made]]

WEIGHTED: dict[str, Method] = {
    "SVD of each": separate,
    "base and deltas": partial(shared, forms=("base",)),
    "shared factor": partial(shared, forms=("inputs", "outputs")),
    "best of these": any_form,
}


def one_sided(stack: Stack) -> Stack:
    """Forget the moments of gradients."""
    return replace(stack, weightings=tuple(Weighting(None, x.columns) for x in stack.weightings))


def fitted(stacks: Sequence[Stack], keep: float, sweeps: int) -> Iterator[tuple[str, str, list[Made]]]:
    """Fit all stacks by every method and weighting; yield method, weighting and the stacks' matrices."""

    def best(tried: Iterable[Made], cost: Callable[[Tensor], float]) -> Made | None:
        return min(tried, key=lambda made: cost(made[0]), default=None)

    for name, method in METHODS.items():
        found = []
        for stack in stacks:
            count, rows, columns = stack.weights.shape
            case = Case(experts=count, rows=rows, columns=columns, sweeps=sweeps, seeds=(0,))
            tried = method(stack.weights, int(keep * stack.weights.numel()), case)
            found.append(best(tried, lambda made, w=stack.weights: float((made - w).norm())))  # type: ignore[misc]
        yield name, "none", [x for x in found if x is not None]
    for weighting, turn in (("inputs", one_sided), ("two sides", lambda stack: stack)):
        for name, weighted in WEIGHTED.items():
            found = []
            for stack in map(turn, stacks):
                found.append(best(weighted(stack, int(keep * stack.weights.numel())), stack.cost))
            yield name, weighting, [x for x in found if x is not None]


@torch.no_grad()
def compare(run: Run, batches: Iterable[Tensor], *, sweeps: int) -> list[dict[str, Any]]:
    """Judge the averaged weights of a run with its experts compressed by every method."""
    run._exchange()
    stacks = stacks_of(run.model, batches)
    dense, _ = run.evaluate()
    squares = sum(float(stack.weights.square().sum()) for stack in stacks)
    lines = []
    for keep in KEEP:
        for method, weighting, made in fitted(stacks, keep, sweeps):
            if len(made) < len(stacks):  # does not fit the budget
                continue
            lost = sum(
                float((m - stack.weights).square().sum()) for stack, (m, _) in zip(stacks, made, strict=True)
            )
            loss, _ = run.evaluate(
                replaced(run.model, {s.place: m for s, (m, _) in zip(stacks, made, strict=True)})
            )
            line = {
                "keep": keep,
                "method": method,
                "weighting": weighting,
                "error": (lost / squares) ** 0.5,
                "parameters": sum(size for _, size in made),
                "of": sum(stack.weights.numel() for stack in stacks),
                "predicted": sum(s.cost(m) for s, (m, _) in zip(stacks, made, strict=True)),
                "loss": loss,
                "dense_loss": dense,
            }
            assert line["parameters"] <= keep * line["of"]
            print(
                f"{keep:.0%} {method:18} {weighting:10} error {line['error']:.3f} loss {loss:.4f} "
                f"({loss - dense:+.4f}, predicted {line['predicted']:+.4f})",
                flush=True,
            )
            lines.append(line)
    return lines


def replaced(model: nn.Module, matrices: Mapping[str, Tensor]) -> nn.Module:
    """Copy a model with other matrices in its dense banks."""
    made = copy.deepcopy(model)
    for place, weights in matrices.items():
        bank = made.get_submodule(place)
        assert isinstance(bank, tm.SharedCoreExperts)
        bank.get_parameter("core_matrix").copy_(weights)
    return made


def main(arguments: Sequence[str] | None = None) -> Path:
    """Compress, judge, record."""
    options = parse(arguments)
    torch.set_num_threads(1)
    found = [json.loads(path.read_text()) for path in sorted(options.state.glob("*.json"))]
    found = [x for x in found if x["row"]["name"] == options.row and "architecture" not in x]
    if not found:
        raise SystemExit(
            f"no run of {options.row!r} in {options.state}: train it by moe_from_scratch.py first"
        )
    stored = max(found, key=lambda x: x["tokens"])
    sizes, recipe = Sizes(**stored["sizes"]), Recipe(**stored["recipe"])
    if options.toy:
        corpus = corpus_of(options.texts.read_text(encoding="utf-8"), vocabulary=sizes.vocabulary)
    else:
        corpus = load_corpus(options.texts, options.state / "text", vocabulary=sizes.vocabulary)
    run = Run(ROWS[options.row], sizes, recipe, corpus, stored["seed"], folder=options.state)
    # Of windows that are trained on, from the start of the first pass.
    batches = (
        corpus.batch(step, windows=recipe.windows, context=sizes.context, seed=0)[:, :-1].long()
        for step in range(options.batches)
    )
    lines = compare(run, batches, sweeps=options.sweeps)
    common = {"row": options.row, "tokens": run.tokens, "rate": recipe.rate, "seed": run.seed}
    rows = [{**common, **line} for line in lines]
    return record("trained_stacks", rows, folder=options.out, threads=1, corpus=corpus.fingerprint)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("texts", type=Path, help="as for moe_from_scratch.py")
    parser.add_argument("--state", type=Path, default=CACHE, help="folder of runs")
    parser.add_argument("--out", type=Path, default=RECORDS, help="folder of the record")
    parser.add_argument(
        "--row", default="fine, E = 30", help="of dense experts, the longest run of which is read"
    )
    parser.add_argument("--batches", type=int, default=32, help="for calibration")
    parser.add_argument("--sweeps", type=int, default=10, help="of alternating least squares")
    parser.add_argument("--toy", action="store_true", help="state of a toy run, to test the script")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
