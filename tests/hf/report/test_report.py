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
from tensornet.compression.baselines import BaselineLosses
from tensornet.compression.measure import UNMEASURED, Forecast
from tensornet.compression.report import compact_count
from tensornet_hf.report import ModelFacts, Page, bond_spectra, versions, write_report
from tensornet_hf.report.facts import compact_bytes
from tensornet_hf.report.page import display_command, display_name
from tensornet_hf.report.pictures import (
    bits_picture,
    layer_losses_picture,
    loss_picture,
    short_names,
    spectra_picture,
    spread,
)
from tensornet_hf.text.quality import Quality

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
    before, after, plain = (Quality(math.log(p), True, "990 tokens of b.txt") for p in (33.25, 44.5, 90.0))
    options: dict[str, object] = {
        "title": "A small model",
        "models": [
            ModelFacts("original", 1600, 8000, 32.0, quality=before, sample=" there was light"),
            ModelFacts("compressed", 800, 4000, 16.0, quality=after, sample=" there was <b>night</b>"),
            ModelFacts("plain SVD", 790, 3950, 15.8, "rank 7", plain),
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
        assert layer.scheme in page.text
        assert f"{layer.error:.4f}" in page.text
        assert f"{layer.baseline_error:.4f}" in page.text
        assert f"{layer.params_after:,}" in page.text
    for expected in (
        "33.25",
        "44.50",
        "90.00",
        "990 tokens of b.txt",
        "8.00 kB",
        "3.95 kB",
        "rank 7",
        "torch",
    ):
        assert expected in page.text
    pictures = 3  # beside a scale, two strips of marks and two signs of the key
    assert page.tags.count("svg") == pictures + 5


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
    layers = list(priced(page).report.plan)
    svg = bits_picture(layers) + spectra_picture(page.spectra)
    svg += layer_losses_picture(layers, BaselineLosses()) or ""
    svg += loss_picture(priced(page).report.plan, [(page.models[1], 0.2, True)], BaselineLosses()) or ""
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
    for absent in ("Perplexity", "Singular values", "What they write", "measured", "Plain way"):
        assert absent not in page.text
    assert "Nothing says what that costs" in page.text
    assert "nothing is predicted" in page.text


def priced(content: Page, forecast: Forecast = UNMEASURED, dense_loss: float | None = None) -> Page:
    """The page with predicted losses: 0.1 for each layer, and nothing for dense ones."""
    layers = [
        replace(
            layer,
            loss_increase=0.1,
            byte_curve=((layer.bytes_after, 0.1), (layer.bytes_before, 0.0)),
        )
        for layer in content.report.plan
    ]
    plan = tn.CompressionPlan(tuple(layers), objective="curvature", dense_loss=dense_loss, forecast=forecast)
    return replace(content, report=replace(content.report, plan=plan))


def facts(rises: dict[str, float | None], quality: bool = False) -> list[ModelFacts]:
    """Rows with predicted, or with measured rises."""
    rows = []
    for name, rise in rises.items():
        measured = Quality(3.0 + (rise or 0.0), True, "text") if quality else None
        rows.append(ModelFacts(name, 100, 1000, 4.25, "int4", measured, None if quality else rise))
    return rows


@pytest.mark.parametrize("quality", [False, True])
def test_first_screen_says_whether_the_plain_way_is_worse(tmp_path: Path, quality: bool) -> None:
    for ours, expected in ((0.02, "costs 0.0500, 2.5 times as much"), (0.2, "is better here: 0.0500")):
        rises = {"original": 0.0, "compressed": ours, "round to nearest": 0.09, "GPTQ": 0.05}
        content = priced(a_page(models=facts(rises, quality), prompt=None), dense_loss=3.0)
        page = parsed(write_report(content, tmp_path / "r.html"))
        first = page.text.split("The same bytes, other ways")[0]
        assert f"The best plain method of at most these bytes, GPTQ (int4), {expected}" in first
        assert ("On held-out text" in first, "As predicted" in first) == (quality, not quality)
        assert ("measured" if quality else "predicted") in first.split("Rise of the loss")[1]


def test_a_larger_model_is_no_plain_way_of_the_same_bytes(tmp_path: Path) -> None:
    rows = facts({"original": 0.0, "compressed": 0.2, "GPTQ": 0.1, "plain SVD": 0.3})
    rows[2] = replace(rows[2], bits=4.5)
    page = parsed(write_report(priced(a_page(models=rows)), tmp_path / "r.html"))
    assert "The best plain method of at most these bytes, plain SVD (int4), costs 0.3000" in page.text


def test_a_measured_loss_is_never_compared_with_a_predicted_one(tmp_path: Path) -> None:
    rows = facts({"original": 0.0, "compressed": 0.2}, quality=True)
    rows += facts({"round to nearest": 0.1})
    page = parsed(write_report(priced(a_page(models=rows)), tmp_path / "r.html"))
    assert "best plain method" not in page.text


def test_layers_show_predicted_losses_beside_plain_methods(tmp_path: Path) -> None:
    losses = BaselineLosses({"0": 0.31, "2": 0.32}, {"0": 0.41, "2": 0.42}, ((2000, 0.5),), ((2000, 0.9),))
    content = replace(priced(a_page()), losses=losses, peak_memory=12_300_000)
    page = parsed(write_report(content, tmp_path / "r.html"))
    for expected in ("0.31", "0.32", "0.41", "0.42", "peak memory 12.3 MB", "dense, no rise"):
        assert expected in page.text
    assert "round to nearest, predicted" in page.text
    titles = {value for name, value in page.attributes if name == "title"}
    assert {layer.name for layer in content.report.layers} < titles
    assert "decided by param_ratio" in titles


def test_an_encoder_has_no_perplexity(tmp_path: Path) -> None:
    forecast = Forecast(((0.1, 0.2),), "900 tokens of other.txt")
    content = priced(a_page(models=facts({"original": None, "compressed": 0.4}), prompt=None), forecast)
    page = parsed(write_report(content, tmp_path / "r.html"))
    assert "one minus cosine is 0.4000" in page.text
    assert "measured on 900 tokens of other.txt" in page.text
    assert "erplexity" not in page.text


def test_blocks_fold_and_names_are_short(tmp_path: Path) -> None:
    """A model of 210 layers has one folded table for each block."""
    torch.manual_seed(0)
    model = nn.Module()
    blocks = [nn.ModuleDict({k: nn.Linear(4, 4) for k in "qkvoguz"}) for _ in range(30)]
    model.layers = nn.ModuleList(blocks)
    report = tn.compress(model, tn.CompressionConfig(max_bond=1), progress=False)
    path = write_report(a_page(report=report, spectra={}, prompt=None), tmp_path / "r.html")
    page = parsed(path)
    assert page.tags.count("details") == 30
    assert "open" not in [name for name, _ in page.attributes]
    assert "layers.29" in page.text
    assert page.text.count("relative error of the weight") == 30  # the axis is named in every table
    assert path.stat().st_size < 1_000_000


def test_a_page_names_no_folder_of_its_maker(tmp_path: Path) -> None:
    assert display_name(tmp_path) == tmp_path.name
    assert display_name("/no/such/model") == "model"
    assert display_name("owner/name") == "owner/name"
    words = ["tensornet", "compress", str(tmp_path), "--report", f"{tmp_path}/r.html"]
    assert display_command(words) == f"tensornet compress {tmp_path.name} --report r.html"


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


def test_numbers_are_short() -> None:
    assert [compact_count(x) for x in (7, 940800, 1.5e6, 2e9)] == ["7", "941k", "1.50M", "2.00B"]
    assert [compact_bytes(x) for x in (7, 1234, 3.8e6, 2e9)] == ["7 B", "1.23 kB", "3.80 MB", "2.00 GB"]
