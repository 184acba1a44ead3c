"""Rows of moe_from_scratch.py: models that differ in their feed-forward networks, dense or mixtures."""

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
        width: width of the residual stream.
        hidden: hidden size of the dense feed-forward network; in most mixtures, the experts of a token
            together have this hidden size.
        layers, heads: numbers of layers and attention heads.
        context: number of tokens in a window.
        vocabulary: number of distinct tokens.
    """

    width: int
    hidden: int
    layers: int
    heads: int
    context: int
    vocabulary: int

    @property
    def active(self) -> int:
        """Number of matrix elements that a token uses in the dense model, without embeddings."""
        return self.layers * (4 * self.width**2 + 2 * self.width * self.hidden)


@dataclass(frozen=True)
class Row:
    """One way to build and train the feed-forward networks.

    Args:
        name: name of the row in tables.
        kind: kind of the networks, a key of `KINDS`.
        experts: number of routed experts; 0 for dense networks.
        top_k: number of experts that a token uses.
        hidden: hidden size of one expert, relative to the dense network.
        shared_hidden: hidden size of the always-on expert, relative to the dense network.
        options: options of `kind`.
        root_rates: whether the learning rate of a shared tensor is divided by the square root of the number
            of experts or layers that share it, see `tensornet_moe.parameter_groups`.
        combine: how the router weights the experts, see `tensornet_moe.Router`.
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
        return self.down(nn.functional.gelu(self.up(x), approximate="tanh"))


def gaussian(sizes: Sizes, hidden: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw the matrices of one network, scaled such that the sum of all residual branches has variance 1."""
    up = torch.randn(hidden, sizes.width, generator=generator) / sizes.width**0.5
    down = torch.randn(sizes.width, hidden, generator=generator) / hidden**0.5
    return up, down / (2 * sizes.layers) ** 0.5


def expert_start(row: Row, sizes: Sizes, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw one expert's matrices, scaled so that outputs do not grow with the number of experts per token."""
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
    """Build dense networks whose hidden size is `row.hidden` times the usual one."""
    hidden = round(row.hidden * sizes.hidden)
    return [Dense(*gaussian(sizes, hidden, generator)) for _ in range(sizes.layers)], None


Banks = dict[str, tm.ExpertBank]


def mixtures(
    make: Callable[[Row, Sizes, tuple[Tensor, Tensor], torch.Generator], Banks],
) -> Kind:
    """Make an entry of `KINDS` from a function that builds the banks of one layer."""

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
    """Build banks of dense experts, each of which is drawn independently."""
    others = [expert_start(row, sizes, generator) for _ in range(row.experts - 1)]
    return {
        name: separate(torch.stack([p[k] for p in (pair, *others)])) for k, name in enumerate(("up", "down"))
    }


def separate(weights: Tensor) -> tm.SharedCoreExperts:
    """Build a bank of dense matrices without sharing, from weights `(experts, out, in)`."""
    topology = tn.topologies.dense(out_features=weights.shape[1], in_features=weights.shape[2])
    bank = tm.SharedCoreExperts(topology, len(weights), share="none")
    with torch.no_grad():
        bank.core_matrix.copy_(weights)
    return bank


def dims(row: Row, sizes: Sizes, rows: int) -> dict[str, tuple[int, ...]]:
    """Choose the dims of the chain for a matrix of `rows` rows: a large middle leg between small ones."""
    a, b = row.options.get("ends", (4, 4))
    hidden = round(row.hidden * sizes.hidden)
    outs, ins = (hidden, sizes.width) if rows == hidden else (sizes.width, hidden)
    if row.options.get("one_sided"):
        return {"out_dims": (a * b, outs // (a * b), 1), "in_dims": (1, ins // (a * b), a * b)}
    return {"out_dims": (a, outs // (a * b), b), "in_dims": (a, ins // (a * b), b)}


def mpoe_banks(row: Row, sizes: Sizes, pair: tuple[Tensor, Tensor], generator: torch.Generator) -> Banks:
    """Build banks of chains of three cores with a shared center.

    All experts start as the same decomposed Gaussian matrix, with noise on private cores. The option
    `ends=(a, b)` gives the leg sizes of the first and last core. With `one_sided`, the first core has only an
    out-leg and the last only an in-leg, both of size `a * b`. (`Run` uses the option `mask`, the probability
    that a step does not change a shared core.)
    """

    def bank(weight: Tensor) -> tm.ExpertBank:
        made = tm.SharedCoreExperts.from_dense(
            weight,
            num_experts=row.experts,
            share="center",
            noise=0.05,
            seed=int(torch.randint(2**31, (), generator=generator)),
            **dims(row, sizes, len(weight)),
        )
        rescale(made, weight)
        return made

    return {"up": bank(pair[0]), "down": bank(pair[1])}


def pool(row: Row, sizes: Sizes, generator: torch.Generator) -> Networks:
    """Build pools of experts for several layers. Each layer has its own router and always-on expert.

    Options: `span`, the number of neighbouring layers that use one pool, all by default; `center`, whether
    the experts of a pool are chains with a shared center (with the options of `mpoe_banks`) or dense
    matrices.
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
    """Multiply all cores by one factor, so that the expert matrices get the root mean square of `like`."""
    factor = float((like.square().mean() / bank.expert_matrices().square().mean()).sqrt())
    each = factor ** (1 / len(bank.topology.core_names))
    for parameter in bank.parameters():
        parameter.mul_(each)


def mixture(
    row: Row,
    sizes: Sizes,
    experts: tm.ExpertFFN | tm.ExpertPool | tm.PooledExperts,
    generator: torch.Generator,
) -> tm.SharedCoreMoE:
    """Build a mixture from experts, with a router and, if the row has one, a dense always-on expert."""
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
    """Make a row with a half-size always-on expert and many quarter-size experts, two of them per token."""
    of_the_row = ("root_rates", "combine", "top_k", "hidden", "shared_hidden")
    given = {key: options.pop(key) for key in of_the_row if key in options}
    usual = {"top_k": 2, "hidden": 1 / 4, "shared_hidden": 1 / 2}
    return Row(name, kind, experts=experts, options=options, **{**usual, **given})


#: Options of mixtures that need about as many operations as a dense network with twice the hidden size.
_SIX: dict[str, Any] = {"top_k": 6, "shared_hidden": 7 / 16, "combine": "sigmoid"}
#: Rows for four layers of width 80. "Half" and "quarter" are the approximate total number of experts of all
#: layers, relative to the row "private".
_TABLE = (
    Row("dense x1/2", "dense", hidden=0.5),
    Row("dense", "dense"),
    Row("dense x2", "dense", hidden=2.0),
    Row("dense x4", "dense", hidden=4.0),
    Row("Switch", "switch", experts=8, combine="prob"),
    fine("private", "switch", 30),
    fine("private, normalized", "switch", 30, normalize=True),
    fine("private, 6", "switch", 30, **_SIX),
    # Experts in one pool for all layers, or in one pool for every two layers.
    fine("pool, half", "pool", 56),
    fine("pool, half, normalized", "pool", 56, normalize=True),
    fine("pool, half, 6", "pool", 57, **_SIX),
    fine("pool, quarter", "pool", 24),
    fine("pool, quarter, 6", "pool", 24, **_SIX),
    fine("pool, quarter, 6, root rates", "pool", 24, root_rates=True, **_SIX),
    fine("pool, quarter, 6, normalized", "pool", 24, normalize=True, **_SIX),
    fine("pool, quarter, 12", "pool", 24, **(_SIX | {"top_k": 12})),
    fine("pool, quarter, 12 of 48", "pool", 48, **(_SIX | {"top_k": 12, "hidden": 1 / 8})),
    fine("pairs, quarter, 6", "pool", 12, span=2, **_SIX),
    fine("pairs, quarter, 6, root rates", "pool", 12, span=2, root_rates=True, **_SIX),
    # Experts that share the center of their chains, in each layer or in a pool for all layers.
    fine("MPOE", "mpoe", 30),
    fine("MPOE, one-sided", "mpoe", 30, one_sided=True),
    fine("MPOE, root rates", "mpoe", 30, root_rates=True),
    fine("MPOE, mask 0.5", "mpoe", 30, mask=0.5),
    fine("pool with center", "pool", 120, center=True),
    fine("pool with center, 6", "pool", 120, center=True, ends=(5, 4), **_SIX),
    fine("pool with center, 6, root rates", "pool", 120, center=True, ends=(5, 4), root_rates=True, **_SIX),
)
ROWS = {row.name: row for row in _TABLE}
