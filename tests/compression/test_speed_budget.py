"""A budget of time: bytes of each number format, divided by the speed at which a runtime reads them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from block_models import text
from hf_models import llama
from torch import Tensor, nn

import tensornet as tn
from tensornet.compression.plan import LayerPlan
from tensornet.compression.survey import Survey
from tensornet.errors import BudgetError, FormatError

FORMATS = ("float", "int8", "int4", "int4:g32", "int3:g32")
#: A format of 3 bits that is slow: it takes more time than 4 bits.
SPEEDS = {"float": 8e6, "int8": 8e6, "int4": 8e6, "int4:g32": 8e6, "int3:g32": 2e6}


@cache
def survey() -> Survey:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = llama().eval()
    config = tn.CompressionConfig(bits_per_weight=4.5, formats=FORMATS, target_modules="all")
    return tn.survey(model, [text(1), text(2)], config)


def kind(layer: LayerPlan) -> str:
    return layer.storage.number_format.name


def seconds(plan: tn.CompressionPlan) -> float:
    """Time of a token: every matrix but the table of tokens is read."""
    others = survey().untargeted[1] / SPEEDS["float"]
    read = [x for x in plan if x.name != "model.embed_tokens"]
    return others + sum(x.bytes_after / SPEEDS[kind(x)] for x in read)


def test_a_plan_keeps_the_time_and_spends_nothing_on_it_in_tables() -> None:
    fastest = survey().plan(tokens_per_second=1000, speeds=SPEEDS)
    assert seconds(fastest) <= 1 / 1000
    assert {kind(x) for x in fastest} >= {"int4", "int8"}, "a budget that all layers meet tests nothing"
    assert "int3:g32" not in {kind(x) for x in fastest}  # slow, and worse
    (table,) = [x for x in fastest if x.name == "model.embed_tokens"]
    assert kind(table) == "float"  # costs no time, so its bytes do not count
    assert any(x.bound_by == "tokens_per_second" for x in fastest)
    slower = survey().plan(tokens_per_second=400, speeds=SPEEDS)
    assert seconds(slower) <= 1 / 400
    assert slower.predicted_loss_increase < fastest.predicted_loss_increase


def test_slow_formats_are_used_only_for_bytes() -> None:
    """Both budgets are kept; without that of time, the smaller format is chosen."""
    small = survey().plan(bits_per_weight=5)
    assert "int3:g32" in {kind(x) for x in small}
    assert seconds(small) > 1 / 900
    both = survey().plan(bits_per_weight=5, tokens_per_second=900, speeds=SPEEDS)
    assert both.bits_per_weight <= 5
    assert seconds(both) <= 1 / 900
    assert both.predicted_loss_increase >= small.predicted_loss_increase


class Routed(nn.Module):
    """Three experts as layers of their own; each token takes one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(32, 32)
        self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))
        self.head = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        x, choice = self.first(x), torch.arange(len(x)) % 4  # the first expert gets half of the tokens
        made = torch.zeros_like(x)
        for k, rows in enumerate((choice < 2, choice == 2, choice == 3)):
            made[rows] = self.experts[k](x[rows])
        return self.head(x + made)


def test_experts_count_by_their_share_of_the_tokens() -> None:
    torch.manual_seed(0)
    batches = [(torch.randn(64, 32), torch.randint(8, (64,))) for _ in range(4)]
    config = tn.CompressionConfig(bits_per_weight=8.5, formats=("int8:g32", "int4:g32"))
    found = tn.survey(Routed(), batches, config)
    shares = [found._share([x]) for x in found.layers]
    assert shares == [1, 0.5, 0.25, 0.25, 1]
    assert found._share(found.layers[1:4]) == pytest.approx(1 / 3)


def test_speeds_are_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "speeds.json"
    path.write_text(json.dumps(SPEEDS))
    config = tn.CompressionConfig(tokens_per_second=60, speeds=path)
    assert config.speeds == {**SPEEDS}
    assert tn.CompressionConfig.from_dict(config.to_dict()) == config
    of_file = survey().plan(tokens_per_second=400, speeds=path)
    assert [kind(x) for x in of_file] == [
        kind(x) for x in survey().plan(tokens_per_second=400, speeds=SPEEDS)
    ]


@pytest.mark.parametrize(
    ("budget", "error", "said"),
    [
        ({"tokens_per_second": 10}, BudgetError, "needs speeds"),
        ({"tokens_per_second": 0, "speeds": SPEEDS}, BudgetError, "above 0"),
        ({"tokens_per_second": 10, "speeds": {}}, BudgetError, "must map"),
        ({"tokens_per_second": 10, "speeds": {"int4": -1.0}}, BudgetError, "above 0 and finite"),
        ({"tokens_per_second": 10, "speeds": {"int44": 1.0}}, FormatError, "Unknown number format"),
        ({"tokens_per_second": 10, "speeds": "no.json"}, BudgetError, "'no.json' cannot be read"),
        ({"tokens_per_second": 10, "speeds": {"int4": 1e9}}, BudgetError, "the speed of float"),
        ({"tokens_per_second": 1e9, "speeds": SPEEDS}, BudgetError, "not compressed already take"),
        ({"tokens_per_second": 1500, "speeds": SPEEDS}, BudgetError, "tokens_per_second: The budget"),
    ],
)
def test_bad_speeds(budget: dict[str, object], error: type[ValueError], said: str) -> None:
    with pytest.raises(error, match=said):
        survey().plan(**budget)
