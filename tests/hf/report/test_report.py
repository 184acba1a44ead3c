"""The HTML report: right numbers, a true first screen, nothing fetched, nothing executed."""

import copy
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import nn

import tensornet as tn
from tensornet.compression import LossIncrease
from tensornet.compression.report import ModelFacts
from tensornet_hf.figures import grid_of, losses_figure
from tensornet_hf.report import (
    Page,
    compact_bytes,
    display_command,
    display_name,
    versions,
    write_report,
)

VOID = {"meta", "br", "img", "link", "input", "hr"}


class Balanced(HTMLParser):
    """Collects tags, attributes and text; fails where a tag is closed that is not open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def measured(perplexity: float, dense: float = 33.25) -> LossIncrease:
    """A measured loss, as a perplexity."""
    increase = math.log(perplexity / dense)
    return LossIncrease(increase, 0.0, 990, "b.txt", dense_loss=math.log(dense))


def a_page(models: list[ModelFacts] | None = None, prompt: str | None = None, **changes: object) -> Page:
    """A page about a small model, by default with measured losses."""
    model = nn.Sequential(nn.Linear(24, 36), nn.ReLU(), nn.Linear(36, 20))
    report = tn.compress(model, tn.CompressionConfig(param_ratio=0.5, method="svd"), progress=False)
    models = models or [
        ModelFacts("original", 1600, 8000, 32.0, quality=measured(33.25), sample=" there was light"),
        ModelFacts("compressed", 800, 4000, 16.0, quality=measured(44.5), sample=" there was <b>night</b>"),
        ModelFacts("plain SVD", 790, 3950, 15.8, "rank 7", measured(90.0)),
    ]
    options: dict[str, object] = {"title": "A small model", "made": [("Versions", versions())]}
    return Page(report=report, models=models, prompt=prompt, **(options | changes))  # type: ignore[arg-type]


def predicted(page: Page) -> Page:
    """The page of a plan with predicted losses: 0.1 for each layer, nothing for dense ones."""
    layers = tuple(
        replace(
            x, loss_increase=0.1, baseline_error=None, curve=((x.bytes_after, 0.1), (x.bytes_before, 0.0))
        )
        for x in page.report.plan
    )
    plan = tn.CompressionPlan(layers, objective="curvature", dense_loss=3.0)
    return replace(page, report=replace(page.report, plan=plan))


def parsed(page: Page, folder: Path) -> Balanced:
    found = Balanced()
    found.feed(write_report(page, folder / "report.html").read_text(encoding="utf-8"))
    assert found.open == []
    return found


def test_shows_every_number(tmp_path: Path) -> None:
    content = a_page()
    page = parsed(content, tmp_path)
    for layer in content.report.layers:
        for value in (f"{layer.error:.4f}", f"{layer.baseline_error:.4f}", f"{layer.params_after:,}"):
            assert value in page.text
    for expected in (
        "33.25",
        "44.50",
        "90.00",
        "990 tokens scored on b.txt",
        "8.00 kB",
        "3.95 kB",
        "rank 7",
        "torch",
    ):
        assert expected in page.text
    assert page.tags.count("svg") == 2


def test_is_one_file_that_fetches_and_runs_nothing(tmp_path: Path) -> None:
    content = a_page(prompt="And <script>alert(1)</script>")
    page = parsed(content, tmp_path)
    assert "And <script>alert(1)</script> there was <b>night</b>" in page.text
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    assert {"script", "link", "img", "iframe", "object", "embed", "image"}.isdisjoint(page.tags)
    references = [value for name, value in page.attributes if name in ("src", "href", "xlink:href")]
    assert all(value.startswith("#") for value in references)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "://" not in html
    assert set(re.findall(r"url\((.)", html)) <= {"#"}
    assert not re.search(r"#0102", html)  # pictures take their colours from the page
    assert write_report(content, tmp_path / "again.html").read_text(encoding="utf-8") == html


def test_leaves_out_what_is_not_known(tmp_path: Path) -> None:
    page = parsed(a_page([ModelFacts("original", 10), ModelFacts("compressed", 5)]), tmp_path)
    for absent in ("Perplexity", "Generated text", "measured", "Best baseline"):
        assert absent not in page.text
    assert "The loss increase is unknown" in page.text


def facts(losses: dict[str, float | None], are_measured: bool = False) -> list[ModelFacts]:
    """Models with predicted, or with measured loss increases."""
    rows = []
    for name, loss in losses.items():
        quality = LossIncrease(loss or 0.0, 0.0, 990, "b.txt", dense_loss=3.0) if are_measured else None
        rows.append(ModelFacts(name, 100, 1000, 4.25, "int4", quality, None if are_measured else loss))
    return rows


@pytest.mark.parametrize("are_measured", [False, True])
def test_first_screen_says_whether_the_plain_way_is_worse(tmp_path: Path, are_measured: bool) -> None:
    for ours, expected in (
        (0.02, "increases the loss by 0.0500, 2.5 times as much"),
        (0.2, "is better here: it increases the loss by 0.0500"),
    ):
        losses = {"original": 0.0, "compressed": ours, "round to nearest": 0.09, "GPTQ": 0.05}
        page = parsed(predicted(a_page(facts(losses, are_measured))), tmp_path)
        first = page.text.split("Comparison with baselines of the same size")[0]
        assert f"The best baseline of at most this size, GPTQ (int4), {expected}" in first
        assert ("On held-out text" in first, "As predicted" in first) == (are_measured, not are_measured)


def test_only_like_is_compared_with_like(tmp_path: Path) -> None:
    """No larger model, and no measured loss with a predicted one."""
    rows = facts({"original": 0.0, "compressed": 0.2, "GPTQ": 0.1, "plain SVD": 0.3})
    rows[2] = replace(rows[2], bits=4.5)
    page = parsed(predicted(a_page(rows)), tmp_path)
    assert (
        "The best baseline of at most this size, plain SVD (int4), increases the loss by 0.3000" in page.text
    )
    rows = facts({"original": 0.0, "compressed": 0.2}, are_measured=True) + facts({"round to nearest": 0.1})
    assert "best baseline" not in parsed(predicted(a_page(rows)), tmp_path).text


def test_layers_show_predicted_losses_of_plain_methods(tmp_path: Path) -> None:
    losses = {"round to nearest": {"0": 0.31, "2": 0.32}, "plain SVD": {"0": 0.41, "2": 0.42}}
    content = predicted(a_page())
    content = replace(content, losses=losses)
    page = parsed(content, tmp_path)
    for expected in ("0.31", "0.32", "0.41", "0.42", "predicted loss increase 0.2"):
        assert expected in page.text
    assert page.tags.count("svg") == 3
    assert {layer.name for layer in content.report.layers} < {v for n, v in page.attributes if n == "title"}


def test_baselines_whose_losses_are_unknown_are_not_mentioned(tmp_path: Path) -> None:
    losses = {"round to nearest": {"0": 0.31, "2": 0.32}, "plain SVD": {"0": 0.41, "2": 0.42}}
    measured_only = predicted(a_page())
    texts = [parsed(replace(measured_only, losses=x), tmp_path).text for x in (losses, {})]
    for word in ("by rounding to nearest", "Nearest and SVD"):
        assert [word in text for text in texts] == [True, False]
    assert all("predicted loss increase" in text for text in texts)
    assert not any("of plain" in text for text in texts)  # the plan knows no errors of SVDs


@pytest.mark.slow
def test_blocks_fold(tmp_path: Path) -> None:
    """A model of 210 layers has one folded table for each block."""
    torch.manual_seed(0)
    model = nn.Module()
    model.layers = nn.ModuleList(nn.ModuleDict({k: nn.Linear(4, 4) for k in "qkvoguz"}) for _ in range(30))
    report = tn.compress(
        model, tn.CompressionConfig(topology_options={"max_bond": 1}, method="svd"), progress=False
    )
    page = parsed(replace(a_page(), report=report), tmp_path)
    assert page.tags.count("details") == 30
    assert "open" not in [name for name, _ in page.attributes]
    assert "layers.29" in page.text


def test_names_and_numbers_are_short(tmp_path: Path) -> None:
    assert display_name(tmp_path) == tmp_path.name
    assert display_name("/no/such/model") == "model"
    words = ["tensornet", "compress", str(tmp_path), "--report", f"{tmp_path}/r.html"]
    assert display_command(words) == f"tensornet compress {tmp_path.name} --report r.html"
    assert [compact_bytes(x) for x in (7, 1234, 3.8e6, 2e9)] == ["7 B", "1.23 kB", "3.80 MB", "2.00 GB"]


def test_losses_have_one_panel_for_each_kind_and_one_line_for_each_method() -> None:
    block = nn.ModuleDict({"up": nn.Linear(8, 16), "down": nn.Linear(16, 8)})
    model = nn.ModuleList([block, copy.deepcopy(block)])
    config = tn.CompressionConfig(topology_options={"max_bond": 2}, method="svd", target_modules="all")
    layers = [replace(x, loss_increase=0.1 * (k + 1)) for k, x in enumerate(tn.plan(model, config))]
    others = {x: {layer.name: 0.5 for layer in layers} for x in ("plain SVD", "round to nearest")}
    figure = losses_figure(layers, others)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["up", "down"]
    assert [line.get_label() for line in figure.axes[0].lines] == [
        "plain SVD",
        "round to nearest",
        "this plan",
    ]
    expected = [layer.loss_increase for layer in layers if layer.name.endswith("up")]
    assert list(figure.axes[0].lines[-1].get_ydata()) == pytest.approx(expected)
    alone = [replace(layer, name=str(k)) for k, layer in enumerate(layers[:2])]  # without blocks: one panel
    (axes,) = losses_figure(alone, {}).axes
    assert list(axes.lines[0].get_xdata()) == [0, 1]


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
