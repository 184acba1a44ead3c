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
        root_rates: whether the rate of a shared tensor is divided by the root of its number of sharers, see
            `tensornet_moe.parameter_groups`.
        combine: combine weights of the router, see `tensornet_moe.Router`.
    """

    name: str
    kind: str
    experts: int = 0
    top_k: int = 1
    hidden: float = 1.0
    shared_hidden: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)
    root_rates: bool = False
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
        same_start = row.kind == "mpoe" or row.options.get("center", False)
        down = down / (row.top_k if same_start else row.top_k**0.5)
    return up, down


def router_of(row: Row, sizes: Sizes, generator: torch.Generator) -> tm.TopKRouter:
    """Build a router whose initial weights are a tenth of the usual size."""
    normalize = row.options.get("normalize", False)
    router = tm.TopKRouter(
        sizes.width, row.experts, top_k=row.top_k, combine=row.combine, normalize=normalize
    )
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
            banks = make(row, sizes, pair, generator)
            experts = tm.ExpertFFN(banks, activation=ACTIVATION, bias=True)
            found.append(mixture(row, sizes, experts, generator))
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

    Every expert is the decomposition of one Gaussian matrix plus noise. Option: `ends`, legs of the first and
    of the last core. (`mask`, the probability that a step leaves a shared core unchanged, is for the run.)
    """

    def bank(weight: Tensor) -> tm.ExpertBank:
        made = tm.SharedCoreExperts.from_dense(
            weight,
            num_experts=row.experts,
            shared="center",
            noise=0.05,
            seed=int(torch.randint(2**31, (), generator=generator)),
            **dims(row, sizes, len(weight)),
        )
        rescale(made, weight)
        return made

    return {"up": bank(pair[0]), "down": bank(pair[1])}


def pool(row: Row, sizes: Sizes, generator: torch.Generator) -> Networks:
    """Build pools of experts; routers and always-on networks stay with the layers.

    Options: `span`, neighbouring layers that use one pool, all if absent; `center`, whether the experts of a
    pool share the center of a chain (with the options of `mpoe_banks`) or nothing.
    """
    span = row.options.get("span", sizes.layers)
    make = mpoe_banks if row.options.get("center") else switch_banks
    networks: list[nn.Module] = []
    pools = nn.ModuleList()
    for first in range(0, sizes.layers, span):
        pair = expert_start(row, sizes, generator)
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        experts = tm.ExpertFFN(make(row, sizes, pair, generator), activation=ACTIVATION, bias=True)
        owner = tm.ExpertPool(experts, label=f"experts{first}")
        pools.append(owner)
        networks += [mixture(row, sizes, owner, generator) for _ in range(span)]
    return networks, pools


@torch.no_grad()
def rescale(bank: tm.SharedCoreExperts, like: Tensor) -> None:
    """Rescale all cores by one factor so that the matrices have the root mean square of a dense one."""
    factor = float((like.square().mean() / bank.expert_matrices().square().mean()).sqrt())
    each = factor ** (1 / len(bank.topology.core_names))
    for parameter in bank.parameters():
        parameter.mul_(each)


def mixture(
    row: Row, sizes: Sizes, experts: tm.ExpertFFN | tm.ExpertPool, generator: torch.Generator
) -> tm.SharedCoreMoE:
    """Build a mixture of given experts; its always-on expert is a dense network."""
    router = router_of(row, sizes, generator)
    always = None
    if row.shared_hidden:
        pair = gaussian(sizes, round(row.shared_hidden * sizes.hidden), generator)
        banks_of_one = {
            name: separate(weight[None]) for name, weight in zip(("up", "down"), pair, strict=True)
        }
        always = tm.ExpertFFN(banks_of_one, activation=ACTIVATION, bias=True)
    return tm.SharedCoreMoE(router, experts, shared_expert=always)


KINDS: dict[str, Kind] = {
    "dense": dense,
    "switch": mixtures(switch_banks),
    "mpoe": mixtures(mpoe_banks),
    "pool": pool,
}


def fine(name: str, kind: str, experts: int, **options: Any) -> Row:
    """Build a row with a half-size always-on network, and many quarter-size experts, two of them active."""
    of_the_row = ("root_rates", "combine", "top_k", "hidden", "shared_hidden")
    given = {key: options.pop(key) for key in of_the_row if key in options}
    usual = {"top_k": 2, "hidden": 1 / 4, "shared_hidden": 1 / 2}
    return Row(name, kind, experts=experts, options=options, **{**usual, **given})


#: As much arithmetic as a dense network of twice the width.
_SIX: dict[str, Any] = {"top_k": 6, "shared_hidden": 7 / 16, "combine": "sigmoid"}
#: For four layers of width 80. "All", "half" and "quarter" are shares of the experts of "private".
_TABLE = (
    Row("dense x1/2", "dense", hidden=0.5),
    Row("dense", "dense"),
    Row("dense x2", "dense", hidden=2.0),
    Row("dense x4", "dense", hidden=4.0),
    Row("Switch", "switch", experts=8, combine="prob"),
    fine("private", "switch", 30),
    fine("private, 6", "switch", 30, **_SIX),
    # Experts in pools: of all layers, and of two.
    fine("pool, half", "pool", 56),
    fine("pool, half, 6", "pool", 57, **_SIX),
    fine("pool, quarter", "pool", 24),
    fine("pool, quarter, 6", "pool", 24, **_SIX),
    fine("pool, quarter, 6, root rates", "pool", 24, root_rates=True, **_SIX),
    fine("pool, quarter, 6, normalized", "pool", 24, normalize=True, **_SIX),
    fine("pairs, quarter, 6", "pool", 12, span=2, **_SIX),
    fine("pairs, quarter, 6, root rates", "pool", 12, span=2, root_rates=True, **_SIX),
    # Experts that share the center of their chains, in a layer and in a pool.
    fine("MPOE", "mpoe", 30),
    fine("MPOE, root rates", "mpoe", 30, root_rates=True),
    fine("MPOE, mask 0.5", "mpoe", 30, mask=0.5),
    fine("pool with center", "pool", 120, center=True),
    fine("pool with center, 6", "pool", 120, center=True, ends=(5, 4), **_SIX),
    fine("pool with center, 6, root rates", "pool", 120, center=True, ends=(5, 4), root_rates=True, **_SIX),
)
ROWS = {row.name: row for row in _TABLE}
