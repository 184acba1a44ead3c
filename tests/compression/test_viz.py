"""Figures and notebook tables of plans, reports, statistics and networks."""

import io
import subprocess
import sys
from xml.etree import ElementTree

import matplotlib
import pytest
import torch
from torch import nn

import tensornet as tn
from tensornet._util import TABLE_ROWS, html_table
from tensornet.compression.viz import grid_of

Made = tuple[tn.CompressionPlan, tn.CalibrationStats, tn.CompressionReport]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


@pytest.fixture(scope="module")
def made() -> Made:
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(3)))
    config = tn.CompressionConfig(bits_per_weight=5)
    stats = tn.calibrate(model, [torch.randn(64, 32) for _ in range(2)], config=config)
    plan = tn.plan(model, config, stats)
    report = tn.compress(model, config, calibration=stats, progress=False)
    return plan, stats, report


def text_of(figure: object) -> str:
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg")  # type: ignore[attr-defined]
    return buffer.getvalue()


def shown(html: str) -> str:
    return " ".join(ElementTree.fromstring(f"<div>{html}</div>").itertext())


def test_plan_shows_its_point_and_the_bits_of_every_layer(made: Made) -> None:
    plan, *_ = made
    figure = plan.plot()
    curve, bits = figure.axes
    (point,) = (line for line in curve.lines if line.get_marker() == "o")
    assert point.get_xdata()[0] == pytest.approx(plan.bits_per_weight)
    assert point.get_ydata()[0] == pytest.approx(plan.predicted_loss_increase)
    cells = {text.get_text().split()[0] for text in bits.texts}
    assert cells == {f"{layer.bits_per_weight:.3g}" for layer in plan}
    assert len(bits.patches) == len(plan)
    assert "dense" in text_of(figure)


def test_report_draws(made: Made) -> None:
    report = made[2]
    assert "predicted loss increase" in text_of(report.plot())
    blind = tn.compress(nn.Sequential(Block()), tn.CompressionConfig(param_ratio=0.5), progress=False)
    assert "relative error of the weight" in text_of(blind.plot())
    assert len(blind.plan.plot().axes) == 1  # no curve where nothing is predicted


@pytest.mark.parametrize("count", [1, 30])
def test_names_fall_into_blocks_and_kinds(count: int) -> None:
    kinds = [f"self_attn.{x}_proj" for x in "qkvo"] + ["mlp.up_proj"]
    names = [f"model.layers.{k}.{kind}" for k in range(count) for kind in kinds]
    rows, columns, cells = grid_of([*names, "lm_head"])
    assert rows == [*kinds, "lm_head"]
    assert columns == [str(k) for k in range(count)]
    assert len(set(cells.values())) == len(names) + 1
    rows, columns, cells = grid_of(["0", "2"])
    assert (rows, columns, len(set(cells.values()))) == (["0", "2"], [""], 2)
    two = ["encoder.block.0.q", "encoder.block.1.q", "decoder.block.0.q"]
    assert len(set(grid_of(two)[2].values())) == 3


def test_notebook_tables_are_small_and_escaped(made: Made) -> None:
    plan, stats, report = made
    for thing in (plan, report, stats):
        text = shown(thing._repr_html_())
        assert all(layer.name in text for layer in plan)
    assert f"{plan.bytes_after:,} bytes" in shown(plan._repr_html_())
    assert "nan" not in stats._repr_html_()
    network = tn.MPO.from_matrix(torch.randn(16, 16), sites=2)
    assert "certified error" in shown(network._repr_html_())
    made_of = tn.TensorNetwork(
        tn.topologies.low_rank(out_features=8, in_features=6, rank=2),
        (torch.ones(1, 8, 1, 2), torch.ones(2, 1, 6, 1)),
    )
    assert "low_rank, 8 x 6" in shown(made_of._repr_html_())
    text = html_table("<b>", ["a"], [["<script>"]] * (TABLE_ROWS + 3))
    assert "<script>" not in text
    assert "and 3 more" in text
    assert "<b>" in shown(text)


@pytest.mark.slow
def test_without_matplotlib_the_pip_line_is_named() -> None:
    code = """
import sys
import importlib.util
known = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "matplotlib" else known(name, *rest)
import tensornet._util
tensornet._util.find_spec = importlib.util.find_spec
import torch, tensornet as tn
assert "matplotlib" not in sys.modules
model = torch.nn.Sequential(torch.nn.Linear(8, 8))
report = tn.compress(model, tn.CompressionConfig(max_bond=2), progress=False)
for thing in (report, report.plan):
    assert thing._repr_html_()
    try:
        thing.plot()
    except tn.errors.MissingDependencyError as error:
        print(error)
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert all("needs matplotlib" in x and "pip install 'tensornet-torch[viz]'" in x for x in lines)
    assert [x.split()[0] for x in lines] == ["report.plot()", "plan.plot()"]
