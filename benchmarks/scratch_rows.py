"""Rows of moe_from_scratch.py: feed-forward networks, dense or mixtures, and their table."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import tensornet as tn
import tensornet_moe as tm
from tensornet_moe.routers import Combine

ACTIVATION = "gelu_new"


@dataclass(frozen=True)
class Sizes:
    """Sizes of the model.

    Args:
        width: of the residual stream.
        hidden: of the dense feed-forward network, which is what a token passes in every row.
        layers, heads: of the transformer.
        context: tokens of a window.
        vocabulary: number of tokens.
    """

    width: int
    hidden: int
    layers: int
    heads: int
    context: int
    vocabulary: int

    @property
    def active(self) -> int:
        """Parameters outside embeddings that a token passes in the dense row, biases and norms aside."""
        return self.layers * (4 * self.width**2 + 2 * self.width * self.hidden)


@dataclass(frozen=True)
class Row:
    """One way to build and train the feed-forward networks.

    Args:
        name: in tables.
        kind: a key of `KINDS`.
        experts: routed experts; 0 for the dense rows.
        top_k: experts of a token.
        hidden: hidden size of one expert, in units of the dense one.
        shared_hidden: hidden size of the always-on expert, in the same units.
        options: of the kind.
        private_rate: learning rate of what each expert owns, in units of the common one.
        shared_rate: learning rate of what the experts share.
        combine: combine weights of the router, see `tensornet_moe.Router`.
    """

    name: str
    kind: str
    experts: int = 0
    top_k: int = 1
    hidden: float = 1.0
    shared_hidden: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)
    private_rate: float = 1.0
    shared_rate: float = 1.0
    combine: Combine = "unit"


class Dense(nn.Module):
    """Dense feed-forward network, initialized like an expert."""

    def __init__(self, up: Tensor, down: Tensor) -> None:
        super().__init__()
        self.up = nn.Linear(up.shape[1], up.shape[0])
        self.down = nn.Linear(down.shape[1], down.shape[0])
        with torch.no_grad():
            self.up.weight.copy_(up)
            self.down.weight.copy_(down)
            self.up.bias.zero_()
            self.down.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens."""
        return self.down(nn.functional.gelu(self.up(x), approximate="tanh"))


def gaussian(sizes: Sizes, hidden: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw the matrices of one network: unit gain, and residual branches that add up to unit variance."""
    up = torch.randn(hidden, sizes.width, generator=generator) / sizes.width**0.5
    down = torch.randn(sizes.width, hidden, generator=generator) / hidden**0.5
    return up, down / (2 * sizes.layers) ** 0.5


def expert_start(row: Row, sizes: Sizes, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw the matrices of one expert, scaled so that experts sum to one network of unit variance."""
    up, down = gaussian(sizes, round(row.hidden * sizes.hidden), generator)
    if row.combine == "sigmoid":
        same_start = row.kind in ("mpoe", "delta")
        down = down / (row.top_k if same_start else row.top_k**0.5)
    return up, down


def router_of(row: Row, sizes: Sizes, generator: torch.Generator) -> tm.TopKRouter:
    """Build a router whose initial weights are a tenth of the usual size."""
    router = tm.TopKRouter(sizes.width, row.experts, top_k=row.top_k, combine=row.combine)
    router.weight.data = torch.randn(router.weight.shape, generator=generator) * 0.1 / math.sqrt(sizes.width)
    return router


Networks = tuple[list[nn.Module], nn.Module | None]
Kind = Callable[[Row, Sizes, torch.Generator], Networks]


def dense(row: Row, sizes: Sizes, generator: torch.Generator) -> Networks:
    """Build dense networks of `row.hidden` times the width."""
    hidden = round(row.hidden * sizes.hidden)
    return [Dense(*gaussian(sizes, hidden, generator)) for _ in range(sizes.layers)], None


Banks = dict[str, tm.ExpertBank]


def mixtures(
    make: Callable[[Row, Sizes, tuple[Tensor, Tensor], torch.Generator], Banks],
) -> Kind:
    """Turn a builder of the banks of one layer, given one Gaussian network, into a kind of row."""

    def kind(row: Row, sizes: Sizes, generator: torch.Generator) -> Networks:
        found: list[nn.Module] = []
        for _ in range(sizes.layers):
            pair = expert_start(row, sizes, generator)
            torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
            found.append(mixture(row, sizes, make(row, sizes, pair, generator), generator))
        return found, None

    return kind


def switch_banks(row: Row, sizes: Sizes, pair: tuple[Tensor, Tensor], generator: torch.Generator) -> Banks:
    """Build dense experts, each drawn separately."""
    others = [expert_start(row, sizes, generator) for _ in range(row.experts - 1)]
    return {
        name: separate(torch.stack([p[k] for p in (pair, *others)])) for k, name in enumerate(("up", "down"))
    }


def separate(weights: Tensor) -> tm.SharedCoreExperts:
    """Build a bank of dense matrices, nothing shared."""
    topology = tn.topologies.dense(out_features=weights.shape[1], in_features=weights.shape[2])
    bank = tm.SharedCoreExperts(topology, len(weights), shared="none")
    with torch.no_grad():
        bank.core_matrix.copy_(weights)
    return bank


def dims(row: Row, sizes: Sizes, rows: int) -> dict[str, tuple[int, ...]]:
    """Split a matrix dimension into legs: a long middle between two small ends."""
    a, b = row.options.get("ends", (4, 4))
    hidden = round(row.hidden * sizes.hidden)
    width_dims, hidden_dims = (a, sizes.width // (a * b), b), (a, hidden // (a * b), b)
    up = rows == hidden
    return {"out_dims": hidden_dims if up else width_dims, "in_dims": width_dims if up else hidden_dims}


def mpoe_banks(row: Row, sizes: Sizes, pair: tuple[Tensor, Tensor], generator: torch.Generator) -> Banks:
    """Build chains of three cores with a shared center.

    Every expert is the decomposition of one Gaussian matrix plus noise. Options: `delta`, rank of a low-rank
    bypass of each expert; `shared`, which cores are shared; `max_bond`. `mask`, the probability with which a
    step leaves a shared core unchanged, is for the run, not for the model.
    """
    options = {"max_bond": None, "delta": 0, "shared": "center", **row.options}

    def bank(weight: Tensor) -> tm.ExpertBank:
        made = tm.SharedCoreExperts.from_dense(
            weight,
            num_experts=row.experts,
            shared=options["shared"],
            max_bond=options["max_bond"],
            noise=0.05,
            seed=int(torch.randint(2**31, (), generator=generator)),
            **dims(row, sizes, len(weight)),
        )
        rescale(made, weight)
        return tm.LowRankDeltaExperts(made, options["delta"]) if options["delta"] else made

    return {"up": bank(pair[0]), "down": bank(pair[1])}


def delta_banks(row: Row, sizes: Sizes, pair: tuple[Tensor, Tensor], generator: torch.Generator) -> Banks:
    """Build one dense matrix for all experts, and a low-rank delta for each, which starts at zero."""
    options = {"num_experts": row.experts, "rank": row.options["rank"]}
    banks: Banks = {}
    for name, weight in zip(("up", "down"), pair, strict=True):
        seed = int(torch.randint(2**31, (), generator=generator))
        banks[name] = tm.LowRankDeltaExperts.from_dense(weight, seed=seed, **options)
    return banks


def tied(row: Row, sizes: Sizes, generator: torch.Generator) -> Networks:
    """Build dense experts that `span` (two) neighbouring layers share; routers stay separate."""
    networks, _ = KINDS["switch"](row, sizes, generator)
    span = row.options.get("span", 2)
    pools = nn.ModuleList()
    for k in range(0, len(networks) - 1, span):
        pools += tm.tie_experts(networks[k : k + span], label=f"experts{k}")
    return networks, pools


@torch.no_grad()
def rescale(bank: tm.SharedCoreExperts, like: Tensor) -> None:
    """Rescale all cores by one factor so that the matrices have the root mean square of a dense one."""
    factor = float((like.square().mean() / bank.expert_matrices().square().mean()).sqrt())
    each = factor ** (1 / len(bank.topology.core_names))
    for parameter in bank.parameters():
        parameter.mul_(each)


def mixture(
    row: Row, sizes: Sizes, banks: dict[str, tm.ExpertBank], generator: torch.Generator
) -> tm.SharedCoreMoE:
    """Build a mixture of given banks; its always-on expert is a dense network."""
    router = router_of(row, sizes, generator)
    always = None
    if row.shared_hidden:
        pair = gaussian(sizes, round(row.shared_hidden * sizes.hidden), generator)
        banks_of_one = {
            name: separate(weight[None]) for name, weight in zip(("up", "down"), pair, strict=True)
        }
        always = tm.ExpertFFN(banks_of_one, activation=ACTIVATION, bias=True)
    return tm.SharedCoreMoE(
        router,
        tm.ExpertFFN(banks, activation=ACTIVATION, bias=True),
        shared_expert=always,
    )


KINDS: dict[str, Kind] = {
    "dense": dense,
    "switch": mixtures(switch_banks),
    "mpoe": mixtures(mpoe_banks),
    "delta": mixtures(delta_banks),
    "tied": tied,
}


def fine(name: str, kind: str, experts: int = 30, **options: Any) -> Row:
    """Build a row with a half-size always-on expert, and many quarter-size experts, two of them active."""
    of_the_row = ("private_rate", "shared_rate", "combine", "top_k", "hidden", "shared_hidden")
    given = {key: options.pop(key) for key in of_the_row if key in options}
    usual = {"top_k": 2, "hidden": 1 / 4, "shared_hidden": 1 / 2}
    return Row(name, kind, experts=experts, options=options, **{**usual, **given})


#: Steps over which a fading mask falls to zero, half a million tokens in batches of 2,048.
FADE = 245
_POOL = {"top_k": 4, "hidden": 1 / 8, "shared_hidden": 1 / 4, "combine": "sigmoid", "span": 4}
_TABLE = (
    Row("dense", "dense"),
    Row("dense x2", "dense", hidden=2.0),
    Row("dense x8", "dense", hidden=8.0),
    # One expert a token.
    Row("Switch", "switch", experts=8),
    Row("Switch, prob", "switch", experts=8, combine="prob"),
    Row("MPOE", "mpoe", experts=8),
    Row("MPOE and delta 4", "mpoe", experts=8, options={"delta": 4}),
    Row("base and deltas", "delta", experts=8, options={"rank": 4}),
    Row("tied over two layers", "tied", experts=8),
    # Two small experts a token, and one that computes every token.
    Row("fine-grained", "switch", experts=23, top_k=2, hidden=1 / 3, shared_hidden=1 / 3),
    fine("fine, E = 30", "switch"),
    fine("fine, E = 12", "switch", 12),
    fine("fine, E = 5", "switch", 5),
    fine("fine, MPOE", "mpoe"),
    fine("fine, MPOE, ends 8x8", "mpoe", ends=(8, 8)),
    fine("fine, MPOE, every core private", "mpoe", shared="none"),
    fine("fine, MPOE, private rate 3", "mpoe", private_rate=3.0),
    fine("fine, MPOE, center rate 0.3", "mpoe", shared_rate=0.3),
    fine("fine, MPOE, mask 0.5", "mpoe", mask=0.5),
    fine("fine, MPOE, mask 0.9", "mpoe", mask=0.9),
    fine("fine, MPOE, mask 0.5, compensated", "mpoe", mask=0.5, mask_compensate=True),
    fine("fine, MPOE, mask 0.9, fading", "mpoe", mask=0.9, mask_fade=FADE),
    fine("fine, MPOE, center frozen", "mpoe", mask=1.0),
    fine("fine, MPOE and delta 8", "mpoe", delta=8),
    fine("fine, bypass", "mpoe", shared="all", max_bond=12, delta=4),
    fine("fine, base and deltas", "delta", rank=4),
    fine("fine, tied over two layers", "tied"),
    # More experts for a token, so that it passes as many parameters as in dense x2.
    fine("fine, tied, E = 12", "tied", 12),
    fine("fine, tied, E = 12, top 6, sigmoid", "tied", 12, top_k=6, combine="sigmoid"),
    fine("fine, tied, 6 of 12, sigmoid", "tied", 12, top_k=6, shared_hidden=7 / 16, combine="sigmoid"),
    fine("fine, 6 of 6, sigmoid", "switch", 6, top_k=6, combine="sigmoid"),
    fine("fine, MPOE, sigmoid", "mpoe", combine="sigmoid"),
    # For four layers, with as many parameters and as much arithmetic as dense x2 in two.
    Row("dense x3/4", "dense", hidden=3 / 4),
    fine("one pool, E = 15, top 4, sigmoid", "tied", 15, **_POOL),
)
ROWS = {row.name: row for row in _TABLE}
