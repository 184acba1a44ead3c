"""The HTML report: right numbers, true cuts, nothing fetched, nothing executed."""

import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import nn

import tensornet as tn
from tensornet.compression.forecast import Forecast
from tensornet_hf.report import ModelFacts, Page, bond_spectra, versions, write_report
from tensornet_hf.report.page import compact_bytes, compact_count, predicted_curve
from tensornet_hf.report.pictures import curve_picture, layers_picture, short_names, spectra_picture, spread
from tensornet_hf.text.perplexity import Perplexity

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
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def two_layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(24, 36), nn.ReLU(), nn.Linear(36, 20))


def a_page(**changes: object) -> Page:
    model = two_layers()
    matrices = {"0": model[0].weight.detach().clone(), "2": model[2].weight.detach().clone()}
    report = tn.compress(model, tn.CompressionConfig(param_ratio=0.5), progress=False)
    before, after = (Perplexity(p, math.log(p), 990, 10, 100, 100) for p in (33.25, 44.5))
    options: dict[str, object] = {
        "title": "A small model",
        "models": [
            ModelFacts("original", report.model_params_before, 8000, before, " there was light"),
            ModelFacts("compressed", report.model_params_after, 4000, after, " there was <b>night</b>"),
            ModelFacts("plain SVD", report.model_params_after),
        ],
        "report": report,
        "spectra": {layer.name: bond_spectra(matrices[layer.name], layer) for layer in report.plan},
        "prompt": "And <script>alert(1)</script>",
        "made": [("Versions", versions())],
    }
    return Page(**(options | changes))  # type: ignore[arg-type]


def parsed(path: Path) -> Balanced:
    page = Balanced()
    page.feed(path.read_text(encoding="utf-8"))
    assert page.open == []
    return page


def test_shows_every_number(tmp_path: Path) -> None:
    content = a_page()
    page = parsed(write_report(content, tmp_path / "report.html"))
    for layer in content.report.layers:
        assert layer.form in page.text
        assert f"{layer.error:.4f}" in page.text
        assert f"{layer.baseline_error:.4f}" in page.text
        assert f"{layer.params_after:,}" in page.text
    windows = "990 tokens scored in 10 windows of 100"
    for expected in ("33.25", "44.50", windows, "8.00 kB", "not saved", "torch"):
        assert expected in page.text
    assert page.tags.count("svg") == 2


def test_is_one_file_that_fetches_and_runs_nothing(tmp_path: Path) -> None:
    path = write_report(a_page(), tmp_path / "report.html")
    page = parsed(path)
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    assert {"script", "link", "img", "iframe", "object", "embed", "image"}.isdisjoint(page.tags)
    references = [value for name, value in page.attributes if name in ("src", "href", "xlink:href")]
    assert all(value.startswith("#") for value in references)
    html = path.read_text(encoding="utf-8")
    assert "://" not in html
    assert "@import" not in html
    assert set(re.findall(r"url\((.)", html)) <= {"#"}


def test_text_of_others_is_escaped(tmp_path: Path) -> None:
    page = parsed(write_report(a_page(), tmp_path / "report.html"))
    assert "And <script>alert(1)</script> there was <b>night</b>" in page.text


def test_pictures_take_their_colours_from_the_page() -> None:
    page = a_page()
    svg = layers_picture(list(page.report.plan)) + spectra_picture(page.spectra)
    assert "var(--ours)" in svg
    assert not re.search(r"#0102", svg)
    assert re.findall(r"#[0-9a-f]{6}\b", svg) == []
    ids = re.findall(r' id="([^"]+)"', svg)
    assert all(len(name) > 10 for name in ids)  # only names made from content, no figure_1 twice


def test_the_same_page_gives_the_same_bytes(tmp_path: Path) -> None:
    page = a_page()
    one, two = (write_report(page, tmp_path / name).read_bytes() for name in ("1.html", "2.html"))
    assert one == two


def test_leaves_out_what_is_not_known(tmp_path: Path) -> None:
    models = [ModelFacts("original", 10), ModelFacts("compressed", 5)]
    page = parsed(write_report(a_page(models=models, spectra={}, prompt=None), tmp_path / "r.html"))
    assert page.tags.count("svg") == 1
    for absent in ("Perplexity", "Singular values", "What they write", "price of every budget"):
        assert absent not in page.text


def test_price_of_every_budget(tmp_path: Path) -> None:
    content = a_page()
    priced = [
        replace(layer, loss_increase=0.1, curve=((layer.params_after, 0.1), (layer.params_before, 0.0)))
        for layer in content.report.plan
    ]
    plan = tn.CompressionPlan(tuple(priced), objective="curvature", dense_loss=math.log(20.0), of_tokens=True)
    points = predicted_curve(plan)
    assert points[0] == (1.0, pytest.approx(20.0))
    assert points[-1] == (pytest.approx(content.report.param_ratio), pytest.approx(20.0 * math.exp(0.2)))
    page = parsed(
        write_report(replace(content, report=replace(content.report, plan=plan)), tmp_path / "r.html")
    )
    assert page.tags.count("svg") == 3
    assert f"{20.0 * math.exp(0.2):.2f} for this model" in page.text


def test_price_of_an_encoder(tmp_path: Path) -> None:
    """It has no perplexity; the curve is that of one minus the cosine, on what it was measured."""
    content = a_page()
    priced = [
        replace(layer, loss_increase=0.1, curve=((layer.params_after, 0.1), (layer.params_before, 0.0)))
        for layer in content.report.plan
    ]
    forecast = Forecast(((0.1, 0.2),), "900 tokens of other.txt")
    plan = tn.CompressionPlan(tuple(priced), objective="curvature", forecast=forecast)
    points = predicted_curve(plan)
    assert points[-1] == (pytest.approx(content.report.param_ratio), pytest.approx(0.4))
    assert all(rise > 0 for _, rise in points)  # of what is drawn on a logarithmic axis
    report = replace(content.report, plan=plan)
    page = parsed(write_report(replace(content, report=report), tmp_path / "r.html"))
    assert page.tags.count("svg") == 3
    assert "One minus the cosine" in page.text
    assert "measured on 900 tokens of other.txt" in page.text
    assert "erplexity" not in page.text.split("The price of every budget")[1].split("All layers")[0]


def planned(matrix: torch.Tensor, **options: object) -> tn.LayerPlan:
    layer = nn.Linear(matrix.shape[1], matrix.shape[0])
    layer.weight = nn.Parameter(matrix)
    return tn.plan(nn.Sequential(layer), tn.CompressionConfig(**options))["0"]  # type: ignore[arg-type]


def test_low_rank_spectrum_is_cut_where_the_error_says() -> None:
    matrix = torch.randn(20, 30, dtype=torch.float64)
    layer = planned(matrix, topology="low_rank", max_bond=7)
    (spectrum,) = bond_spectra(matrix, layer)
    assert spectrum.kept == 7
    assert spectrum.exact
    energies = torch.tensor(spectrum.values).double().square()
    assert math.sqrt(float(energies[7:].sum() / energies.sum())) == pytest.approx(layer.error, rel=1e-6)


def test_chain_spectra_are_those_of_the_unfoldings() -> None:
    matrix = torch.randn(11, 12, dtype=torch.float64)  # 11 rows are padded
    layer = planned(matrix, topology="mpo", sites=3, max_bond=4)
    topology = layer.topology
    assert topology is not None
    spectra = bond_spectra(matrix, layer)
    assert [s.kept for s in spectra] == [size for size in topology.bond_dims.values() if size > 1]
    out_dims, in_dims = topology.out_dims, topology.in_dims
    for bond, spectrum in enumerate(spectra, start=1):
        unfolding: dict[tuple[int, ...], dict[tuple[int, ...], float]] = {}
        for legs in product(*(range(d) for d in (*out_dims, *in_dims))):
            outs, ins = legs[:3], legs[3:]
            row = (outs[0] * out_dims[1] + outs[1]) * out_dims[2] + outs[2]
            column = (ins[0] * in_dims[1] + ins[1]) * in_dims[2] + ins[2]
            inside = row < 11 and column < 12
            value = float(matrix[row, column]) if inside else 0.0
            unfolding.setdefault(outs[:bond] + ins[:bond], {})[outs[bond:] + ins[bond:]] = value
        table = torch.tensor([list(row.values()) for row in unfolding.values()], dtype=torch.float64)
        truth = torch.linalg.svdvals(table)
        assert torch.allclose(torch.tensor(spectrum.values).double(), truth / truth[0], atol=1e-6)


def test_dense_layers_and_zero_weights_have_spectra() -> None:
    dense = tn.LayerPlan("0", (3, 5), None, "dense", 0.0, 0.0)
    (spectrum,) = bond_spectra(torch.ones(3, 5), dense)
    assert spectrum.kept == len(spectrum.values) == 3
    (zero,) = bond_spectra(torch.zeros(3, 5), dense)
    assert zero.values == (0.0, 0.0, 0.0)
    assert "<svg" in spectra_picture({"ones": [spectrum], "zeros": [zero]})


def test_large_models_stay_readable() -> None:
    names = [f"model.layers.{k}.mlp.up_proj" for k in range(210)]
    chosen = spread(names, 24)
    assert (len(chosen), chosen[0], chosen[-1]) == (24, names[0], names[-1])
    assert short_names(names[:2]) == ["0.mlp.up_proj", "1.mlp.up_proj"]
    assert short_names(["head"]) == ["head"]
    assert short_names(["a.bc", "a.bd"]) == ["bc", "bd"]
    assert curve_picture([(0.1, 3.0), (0.9, 2.0)], 0.5).startswith("<svg")


def test_numbers_are_short() -> None:
    assert [compact_count(x) for x in (7, 940800, 1.5e6, 2e9)] == ["7", "941k", "1.50M", "2.00B"]
    assert [compact_bytes(x) for x in (7, 1234, 3.8e6, 2e9)] == ["7 B", "1.23 kB", "3.80 MB", "2.00 GB"]
