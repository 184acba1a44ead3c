"""Rows of moe_from_scratch.py: a small GPT-2 with dense feed-forward networks or mixtures."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import tensornet as tn
import tensornet_moe as tm
from tensornet_moe.grouped_linear import group_rows, one_group
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
        balance: coefficient of the load-balancing loss.
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
    balance: float = 0.01


def build(row: Row, sizes: Sizes, *, seed: int) -> GPT2LMHeadModel:
    """Build the model of a row; all but the feed-forward networks starts alike in every row of a seed."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=sizes.vocabulary,
        n_positions=sizes.context,
        n_embd=sizes.width,
        n_inner=sizes.hidden,
        n_layer=sizes.layers,
        n_head=sizes.heads,
        initializer_range=sizes.width**-0.5 / 2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    model = GPT2LMHeadModel(config)
    networks, owner = KINDS[row.kind](row, sizes, torch.Generator().manual_seed(seed + 1))
    if owner is not None:
        model.add_module("owner", owner)
    for block, network in zip(model.transformer.h, networks, strict=True):
        block.mlp = network
    return model


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
        alike = row.kind in ("mpoe", "delta")
        down = down / (row.top_k if alike else row.top_k**0.5)
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
    """Split a matrix dimension into legs: a long middle between two small ends.

    One-sided ends touch the outputs only and the inputs only, so that no matrix need be rebuilt.
    """
    a, b = row.options.get("ends", (4, 4))
    hidden = round(row.hidden * sizes.hidden)
    if row.options.get("one_sided"):
        outs, ins = (hidden, sizes.width) if rows == hidden else (sizes.width, hidden)
        return {"out_dims": (a * a, outs // (a * a), 1), "in_dims": (1, ins // (b * b), b * b)}
    width_dims, hidden_dims = (a, sizes.width // (a * b), b), (a, hidden // (a * b), b)
    up = rows == hidden
    return {"out_dims": hidden_dims if up else width_dims, "in_dims": width_dims if up else hidden_dims}


def mpoe_banks(row: Row, sizes: Sizes, pair: tuple[Tensor, Tensor], generator: torch.Generator) -> Banks:
    """Build chains of three cores with a shared center.

    `start="exact"`: every expert is the decomposition of one Gaussian matrix plus `noise`; `"random"`:
    Gaussian cores. `delta`: rank of a low-rank bypass of each expert. `shared`: which cores are shared.
    `mask` (probability with which a step leaves a shared core alone), `optimizer` and `precondition` (damping
    of Gram matrices) are for the run, not for the model.
    """
    options = {
        "start": "exact",
        "noise": 0.05,
        "max_bond": None,
        "delta": 0,
        "shared": "center",
        **row.options,
    }

    def bank(weight: Tensor) -> tm.ExpertBank:
        legs = dims(row, sizes, len(weight))
        seed = int(torch.randint(2**31, (), generator=generator))
        if options["start"] == "exact":
            made = tm.SharedCoreExperts.from_dense(
                weight,
                num_experts=row.experts,
                shared=options["shared"],
                max_bond=options["max_bond"],
                noise=options["noise"],
                seed=seed,
                **legs,
            )
        else:
            topology = tn.topologies.mpo(**legs, max_bond=options["max_bond"])
            made = tm.SharedCoreExperts(topology, row.experts, shared=options["shared"])
        rescale(made, weight)
        return tm.LowRankDeltaExperts(made, options["delta"]) if options["delta"] else made

    return {"up": bank(pair[0]), "down": bank(pair[1])}


def delta_banks(row: Row, sizes: Sizes, pair: tuple[Tensor, Tensor], generator: torch.Generator) -> Banks:
    """Build one dense matrix for all experts, and a low-rank delta for each.

    `spread`: Frobenius norm of the deltas at the start, relative to that of the base; 0 starts them at zero.
    """
    spread, banks = row.options.get("spread", 0.0), {}
    for name, weight in zip(("up", "down"), pair, strict=True):
        bank = tm.LowRankDeltaExperts.from_dense(
            weight / (1 + spread**2) ** 0.5,
            num_experts=row.experts,
            rank=row.options["rank"],
            seed=int(torch.randint(2**31, (), generator=generator)),
        )
        if spread:
            with torch.no_grad():
                bank.left.normal_(generator=generator)
                size = (bank.left @ bank.right).square().mean().sqrt()
                bank.left.mul_(spread * weight.square().mean().sqrt() / (size * (1 + spread**2) ** 0.5))
        banks[name] = bank
    return banks


def bases_banks(row: Row, sizes: Sizes, pair: tuple[Tensor, Tensor], generator: torch.Generator) -> Banks:
    """Build shared bases that every expert mixes and transforms."""
    banks: Banks = {}
    for name, weight in zip(("up", "down"), pair, strict=True):
        out_features, in_features = weight.shape
        topology = tm.mixture_of_bases(out_features=out_features, in_features=in_features, **row.options)
        made = tm.SharedCoreExperts(topology, row.experts, shared=("basis",))
        rescale(made, weight)
        banks[name] = made
    return banks


def scaled_banks(row: Row, sizes: Sizes, pair: tuple[Tensor, Tensor], generator: torch.Generator) -> Banks:
    """Build shared bases whose rows and columns every expert rescales, with random signs at the start."""
    banks: Banks = {}
    for name, weight in zip(("up", "down"), pair, strict=True):
        out_features, in_features = weight.shape
        topology = tm.scaled_bases(out_features=out_features, in_features=in_features, **row.options)
        made = tm.SharedCoreExperts(topology, row.experts, shared=("basis",))
        with torch.no_grad():
            for side in ("rows", "columns"):
                core = made.get_parameter(f"core_{side}")
                core.copy_(torch.randint(2, core.shape, generator=generator) * 2.0 - 1)
            basis = made.shared_parameters()["basis"]
            basis.normal_(generator=generator).mul_((weight.square().mean() / len(basis)).sqrt())
        banks[name] = made
    return banks


def split_banks(row: Row, sizes: Sizes, pair: tuple[Tensor, Tensor], generator: torch.Generator) -> Banks:
    """Build dense experts that share one matrix, `shared="up"` or `"down"`."""
    banks, name = switch_banks(row, sizes, pair, generator), row.options["shared"]
    weight = pair[("up", "down").index(name)]
    topology = tn.topologies.dense(out_features=weight.shape[0], in_features=weight.shape[1])
    made = tm.SharedCoreExperts(topology, row.experts, shared="all")
    with torch.no_grad():
        made.shared_parameters()["matrix"].copy_(weight)
    return {**banks, name: made}


def block_tt_banks(row: Row, sizes: Sizes, pair: tuple[Tensor, Tensor], generator: torch.Generator) -> Banks:
    """Build block tensor trains of two cores, by default with nothing shared."""
    banks: Banks = {}
    for name, weight in zip(("up", "down"), pair, strict=True):
        out_dims, in_dims = (_halves(size) for size in weight.shape)
        topology = tn.topologies.block_tt(
            out_dims=out_dims, in_dims=in_dims, max_bond=row.options["max_bond"]
        )
        made = tm.SharedCoreExperts(topology, row.experts, shared=row.options.get("shared", "none"))
        rescale(made, weight)
        banks[name] = made
    return banks


def _halves(size: int) -> tuple[int, int]:
    """Split a size into its two most equal factors."""
    small = max(x for x in range(1, math.isqrt(size) + 1) if size % x == 0)
    return small, size // small


class RoutedPaths(tm.SharedCoreMoE):
    """Network for all tokens, to whose two matrices each token adds the low-rank terms of its experts.

    `h = act((W + sum_e w_e D_e) x)`: unlike experts that each add a delta to one base, two experts of a token
    do not compute the hidden units of the base twice.
    """

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map tokens."""
        flat = x.reshape(-1, x.shape[-1])
        routing = self.router(flat, mask)
        self._remember(routing)
        k = routing.expert_indices.shape[1]
        expert, weight = routing.expert_indices.reshape(-1), routing.weights.reshape(-1, 1)
        order = expert.argsort(stable=True)
        token, groups = order // k, group_rows(expert[order], self.num_experts)
        assert self.shared_expert is not None

        def through(name: str, tokens: Tensor) -> Tensor:
            assert self.shared_expert is not None
            y = self.experts._linear(name, tokens.index_select(0, token), groups) * weight[order]
            y = y.new_zeros(len(tokens), y.shape[-1]).index_add(0, token, y)
            return y + self.shared_expert._linear(name, tokens, one_group(tokens))

        hidden = nn.functional.gelu(through("up", flat), approximate="tanh")
        return through("down", hidden).reshape(x.shape)


def paths(row: Row, sizes: Sizes, generator: torch.Generator) -> Networks:
    """Build networks of `row.hidden` times the width with routed low-rank terms, which start at zero."""
    found: list[nn.Module] = []
    for _ in range(sizes.layers):
        base, banks = gaussian(sizes, round(row.hidden * sizes.hidden), generator), {}
        for name, weight in zip(("up", "down"), base, strict=True):
            rows, columns = weight.shape
            topology = tn.topologies.low_rank(out_features=rows, in_features=columns, **row.options)
            bank = tm.SharedCoreExperts(topology, row.experts, shared="none")
            with torch.no_grad():
                bank.get_parameter("core_0").zero_()
                bank.get_parameter("core_1").normal_(generator=generator).div_(columns**0.5)
            banks[name] = bank
        whole = {name: separate(weight[None]) for name, weight in zip(banks, base, strict=True)}
        found.append(
            RoutedPaths(
                router_of(row, sizes, generator),
                tm.ExpertFFN(banks, activation=ACTIVATION, bias=True),
                shared_expert=tm.ExpertFFN(whole, activation=ACTIVATION, bias=True),
                balance_coef=row.balance,
            )
        )
    return found, None


def tied(row: Row, sizes: Sizes, generator: torch.Generator) -> Networks:
    """Build dense experts that `span` (two) neighbouring layers share; routers and biases stay apart."""
    networks, _ = KINDS["switch"](row, sizes, generator)
    span = row.options.get("span", 2)
    owners = [
        tm.tie_experts([network.experts for network in networks[k : k + span]], label=f"experts{k}")
        for k in range(0, len(networks) - 1, span)
    ]
    return networks, nn.ModuleList(owners)


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
        balance_coef=row.balance,
    )


KINDS: dict[str, Kind] = {
    "dense": dense,
    "switch": mixtures(switch_banks),
    "mpoe": mixtures(mpoe_banks),
    "delta": mixtures(delta_banks),
    "bases": mixtures(bases_banks),
    "block_tt": mixtures(block_tt_banks),
    "scaled": mixtures(scaled_banks),
    "split": mixtures(split_banks),
    "tied": tied,
    "paths": paths,
}
