"""Costs of a model: against counts by hand, and against what quantized models really store."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import tensornet as tn
import tensornet_moe as tm
from tensornet.errors import FormatError, TargetError
from tensornet_moe.costs import Cost

E, D, F, VOCAB, TOKENS = 6, 32, 64, 50, 100


def bank(kind: str, rows: int, columns: int) -> tm.ExpertBank:
    dense = tn.topologies.dense(out_features=rows, in_features=columns)
    if kind == "dense":
        return tm.SharedCoreExperts(dense, E, share="none")
    if kind == "deltas":
        return tm.LowRankDeltaExperts(tm.SharedCoreExperts(dense, E, share="base"), 3)
    topology = tn.topologies.low_rank(out_features=rows, in_features=columns, rank=4)
    return tm.SharedCoreExperts(topology, E, share=topology.core_names[:1])


#: Of a matrix `(o, i)`: numbers of all experts; those that two experts use; multiply-adds for two experts a
#: token, in passes of 100 tokens.
BY_HAND = {
    "dense": lambda o, i: (E * o * i, 2 * o * i, 2 * o * i),
    "deltas": lambda o, i: (
        o * i + E * 3 * (o + i),
        o * i + 2 * 3 * (o + i),
        2 * o * i + E * o * i * 3 / TOKENS,
    ),
    "low rank": lambda o, i: (4 * o + E * 4 * i, 4 * o + 2 * 4 * i, 2 * o * i + E * o * i * 4 / TOKENS),
}


class Model(nn.Module):
    """Two layers with one pool, one with its own experts and an always-on expert, and a tied head."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(VOCAB, D), nn.LayerNorm(D)
        self.pool = tm.ExpertPool(tm.ExpertFFN({"up": bank(kind, F, D), "down": bank(kind, D, F)}, bias=True))
        own = tm.ExpertFFN({"up": bank(kind, F, D), "down": bank(kind, D, F)})
        one = tn.topologies.dense(out_features=D, in_features=D)
        always = tm.ExpertFFN({name: tm.SharedCoreExperts(one, 1) for name in ("up", "down")})
        layers = [(self.pool, None), (self.pool, None), (own, always)]
        self.layers = nn.ModuleList(
            tm.SharedCoreMoE(tm.TopKRouter(D, E, top_k=2, normalize=True), experts, shared_expert=more)
            for experts, more in layers
        )
        self.attention = nn.Linear(D, D)
        self.head = nn.Linear(D, VOCAB, bias=False)
        self.head.weight = self.embed.weight


@pytest.mark.parametrize("kind", BY_HAND)
def test_counts_are_those_by_hand(kind: str) -> None:
    model = Model(kind)
    found = tm.describe(model, tokens=TOKENS)
    up, down = BY_HAND[kind](F, D), BY_HAND[kind](D, F)
    stored, active, products = (a + b for a, b in zip(up, down, strict=True))
    biases, always = F + D, 2 * D * D
    assert found.parts == {
        "embeddings": Cost(VOCAB * D, D, 0),
        "experts": Cost(
            2 * stored + E * biases + always,
            pytest.approx(3 * active + 2 * 2 * biases + always),
            pytest.approx(3 * products + always),
        ),
        "routers": Cost(3 * (E * D + 1), 3 * (E * D + 1), 3 * E * D),
        "other": Cost(2 * D + D * D + D, 2 * D + D * D + D + VOCAB * D, D * D + VOCAB * D),
    }
    assert found.total.stored == sum(p.numel() for p in model.parameters())
    assert found.uncounted == ()


@pytest.mark.parametrize("kind", ["dense", "low rank"])
@pytest.mark.parametrize("number_format", ["float", "bf16", "int8", "int4"])
def test_bytes_are_those_of_the_quantized_model(kind: str, number_format: str) -> None:
    def stored(module: nn.Module) -> int:
        return sum(x.nbytes for x in module.state_dict().values())

    model = Model(kind)
    experts = nn.ModuleDict({"pool": model.pool, "layers": model.layers})
    before = tm.describe(experts, formats=(number_format,)).bytes
    assert before["now"] == stored(experts)
    for part in list(experts.modules()):
        if isinstance(part, tm.SharedCoreExperts):
            part.quantize(number_format)
    after = tm.describe(experts, formats=(number_format, "float")).bytes
    assert before[number_format] == after[number_format] == after["now"] == stored(experts)
    assert after["float"] == before["now"]


def test_bytes_of_linear_layers_and_embeddings() -> None:
    model = Model("dense")
    rest = tm.describe(nn.ModuleList([model.pool, model.layers]), formats=("int8", "int4")).bytes
    plain = 4 * (2 * D + D)  # norm and bias
    whole = tm.describe(model, formats=("int8", "int4")).bytes
    # One scale of 16 bits for each row, since rows are shorter than a group; the tied head is stored once.
    rows = D + VOCAB
    assert whole["int8"] == rest["int8"] + plain + rows * D + 2 * rows
    assert whole["int4"] == rest["int4"] + plain + rows * D // 2 + 2 * rows


def test_compressed_layers_and_convolutions() -> None:
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Conv1d(2, 2, 3, bias=False))
    model[0] = tn.nn.TensorNetworkLinear.from_linear(model[0], topology="low_rank", max_bond=4)
    found = tm.describe(model, tokens=10**6)
    assert found.parts["other"] == Cost(2 * 4 * 64 + 12, 2 * 4 * 64 + 12, 2 * 4 * 64)
    assert found.uncounted == ("1.weight",)
    assert set(found.bytes.values()) == {4 * (2 * 4 * 64 + 12)}


def test_integers_count_as_one_number_each() -> None:
    experts = bank("dense", F, 128)
    assert isinstance(experts, tm.SharedCoreExperts)
    experts.quantize("int4")
    assert tm.describe(experts).total.stored == E * F * (128 + 2)  # two groups a row


def test_expert_choice_and_other_routers() -> None:
    class Odd(tm.Router):
        """One expert for every other token, and two for the others."""

        def select(self, logits: Tensor, probs: Tensor, mask: Tensor | None) -> tm.Routing:
            kept = torch.tensor([[True, False], [True, True]]).repeat(len(probs) // 2, 1)
            experts = torch.arange(2).expand(len(probs), 2)
            return tm.Routing(experts, kept.float(), probs, logits, mask, kept)

    choice = tm.ExpertChoiceRouter(D, E, capacity_factor=1.5)
    experts = tm.ExpertFFN({"up": bank("dense", F, D), "down": bank("dense", D, F)})
    for router, count in ((choice, 1.5), (tm.SwitchRouter(D, E), 1)):
        found = tm.describe(tm.SharedCoreMoE(router, experts)).parts["experts"]
        assert found.active == found.multiply_adds == count * 2 * D * F
    moe = tm.SharedCoreMoE(Odd(D, E), experts)
    with pytest.raises(TargetError, match="experts_per_token"):
        tm.describe(moe)
    moe(torch.randn(4, D), torch.tensor([1, 1, 1, 0]))  # 1, 2 and 1 experts, and padding
    found = tm.describe(moe, tokens=3).parts["experts"]
    assert found.active == pytest.approx(4 / 3 * 2 * D * F)
    assert found.multiply_adds == pytest.approx(4 / 3 * 2 * D * F)


def test_deltas_are_applied_to_few_rows_by_themselves() -> None:
    experts = bank("deltas", F, D)
    assert experts.multiply_adds(20) == 20 * (F * D + 3 * (F + D))
    assert experts.multiply_adds(200) == 200 * F * D + E * 3 * F * D


def test_it_prints_as_a_table() -> None:
    found = tm.describe(Model("dense"), formats=("int4",))
    rows = [line.split() for line in str(found).splitlines()]
    assert rows[5] == ["total", *(f"{x:,.0f}" for x in vars(found.total).values())]
    assert rows[6] == ["bytes:", "now", f"{found.bytes['now']:,},", "int4", f"{found.bytes['int4']:,}"]


def test_bad_input() -> None:
    model = Model("dense")
    with pytest.raises(ValueError, match="tokens"):
        tm.describe(model, tokens=0)
    with pytest.raises(FormatError, match="int9"):
        tm.describe(model, formats=("int9",))
    del model.pool
    with pytest.raises(TargetError, match="does not contain"):
        tm.describe(model)
