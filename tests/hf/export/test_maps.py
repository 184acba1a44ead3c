"""Recipes from maps: forecasts, bytes, and the best choice on maps that are made here."""

from __future__ import annotations

from pathlib import Path

import pytest

import tensornet as tn
from tensornet.errors import BudgetError, FormatError, TargetError
from tensornet_hf.compress import OptionError
from tensornet_hf.maps import plan_map, read_map, read_sizes

pytestmark = pytest.mark.slow  # needs the extra `gguf`

#: Inputs and outputs of each tensor, and its divergence in a type of about two bits.
TENSORS = {
    "token_embd.weight": (256, 100, 0.5),
    "blk.0.attn_q.weight": (256, 256, 0.1),
    "blk.0.ffn_down.weight": (96, 256, 0.3),
    "blk.0.ffn_up_exps.weight": (256, 96, 0.05),
}
WHOLE = {"iq2_xs": 2.0, "q4_K": 0.2, "q5_K": 0.06, "q8_0": 0.004, "q4_0": 0.3, "bf16": 0.0, "iq4_ks": 0.15}


def files(folder: Path) -> tuple[list[Path], list[Path]]:
    """A map of single tensors and of whole files, and two lists of sizes."""
    single, whole = folder / "kld_results.csv", folder / "group0.csv"
    names, measured = ",".join(TENSORS), ",".join(f"{x:.6f}" for *_, x in TENSORS.values())
    single.write_text(f"QTYPE,{names}\niq2_xs,{measured}\n")
    whole.write_text("QTYPE,group0\n" + "".join(f"{kind},{value}\n" for kind, value in WHOLE.items()))
    lists = []
    for kind, bits in (("bf16", 16), ("iq4_ks", 4.25)):
        lines = []
        for name, (inputs, outputs, _) in {**TENSORS, "blk.0.attn_norm.weight": (256, 1, 0)}.items():
            count = inputs * outputs * (4 if "exps" in name else 1)
            shape = f"{inputs}, {outputs}, 4" if "exps" in name else f"{inputs}, {outputs}"
            own, size = kind, int(count * bits / 8)
            if "norm" in name:
                shape, own, size = "256,", "f32", 1024
            more = ":imatrix=0a" if "blk" in name else ""
            lines.append(
                f"m-0.gguf:0a:{name}:shape=({shape}):dtype={own}:elements={count}:bytes={size}{more}"
            )
        lists.append(folder / f"tensors.{kind}.map")
        lists[-1].write_text("\n".join(lines))
    return [single, whole], lists


def test_a_file_of_one_type_is_forecast_as_published(tmp_path: Path) -> None:
    maps, sizes = files(tmp_path)
    for kind, bits in (("iq4_ks", 4.25), ("q8_0", 8.5)):
        recipe = plan_map(maps, sizes, tn.CompressionConfig(bits_per_weight=9), [kind])
        assert recipe.predicted == pytest.approx(WHOLE[kind])
        count = sum(x * y * (4 if "exps" in name else 1) for name, (x, y, _) in TENSORS.items())
        assert sum(recipe.sizes.values()) == pytest.approx(bits / 8 * count)


def test_a_plan_costs_no_more_than_a_file_of_one_type(tmp_path: Path) -> None:
    maps, sizes = files(tmp_path)
    flat = plan_map(maps, sizes, tn.CompressionConfig(bits_per_weight=9), ["q4_0"])
    budget = sum(flat.sizes.values()) + 1024  # of the vector
    recipe = plan_map(maps, sizes[:1], tn.CompressionConfig(max_bytes=budget))
    assert sum(recipe.sizes.values()) + 1024 <= budget
    assert recipe.predicted < 0.9 * flat.predicted
    assert recipe.types["blk.0.ffn_down.weight"] in ("Q4_0", "Q8_0", "BF16")  # rows of 96
    assert "IQ4_KS" not in recipe.types.values()  # no type of llama.cpp
    assert recipe.text.splitlines()[0].startswith(r"^blk\.0\.attn_q\.weight$=")


def test_a_measured_row_is_taken_as_it_is(tmp_path: Path) -> None:
    maps, sizes = files(tmp_path)
    text = maps[0].read_text()
    maps[0].write_text(text + "q4_K,0.01,0.02,404,0.03\n")
    damage = read_map(maps)
    assert damage.losses("Q4_K")["blk.0.attn_q.weight"] == pytest.approx(0.2 * 0.02 / 0.06)
    assert damage.losses("Q5_K")["blk.0.attn_q.weight"] == pytest.approx(0.06 * 0.02 / 0.06)  # nearest row
    assert damage.losses("IQ2_XS")["token_embd.weight"] == pytest.approx(2.0 * 0.5 / 0.95)
    assert read_map(maps[:1]).losses("Q4_K")["token_embd.weight"] == 0.01  # no whole files
    assert read_sizes(sizes)["blk.0.ffn_up_exps.weight"][0] == (4, 96, 256)


def test_doubts_are_noted(tmp_path: Path) -> None:
    maps, sizes = files(tmp_path)
    config = tn.CompressionConfig(bits_per_weight=6)
    assert len(plan_map(maps, sizes, config).notes) == 1
    text = maps[1].read_text()
    maps[1].write_text(text.replace("q8_0,0.004", "q8_0,0").replace("iq2_xs,2.0", "iq2_xs,0.3"))
    _, exact, doubtful = plan_map(maps, sizes, config).notes
    assert "a file of Q8_0" in exact
    assert "3.2 times" in doubtful


def test_bad_maps(tmp_path: Path) -> None:
    maps, sizes = files(tmp_path)
    config = tn.CompressionConfig(bits_per_weight=6)
    other = tmp_path / "other.csv"
    other.write_text("QTYPE,blk.9.attn_q.weight\niq2_xs,0.1\n")
    with pytest.raises(TargetError, match=r"another model.*blk\.9\.attn_q\.weight"):
        plan_map([other, *maps], sizes, config)
    for text in ("a,b\n1,2\n", "QTYPE,x\nq4_K,much\n", "QTYPE,x\nq4_K,nan\n", "QTYPE,x\nq4_K,1,2\n", ""):
        other.write_text(text)
        with pytest.raises(FormatError, match=r"other\.csv is not a map"):
            plan_map([other], sizes, config)
    with pytest.raises(FormatError, match="no divergences of single tensors"):
        plan_map(maps[1:], sizes, config)
    with pytest.raises(FormatError, match="says nothing about the types q6_k"):
        plan_map(maps, sizes, config, ["q6_k"])
    with pytest.raises(FormatError, match="absent"):
        plan_map([tmp_path / "absent"], sizes, config)
    other.write_text("some text")
    with pytest.raises(FormatError, match=r"other\.csv does not list"):
        plan_map(maps, [other], config)
    with pytest.raises(FormatError, match=r"q4_k fits the rows of 'blk\.0\.ffn_down\.weight'"):
        plan_map(maps, sizes, config, ["q4_k"])
    with pytest.raises(OptionError, match="one budget"):
        plan_map(maps, sizes, tn.CompressionConfig(byte_ratio=0.5))
    with pytest.raises(BudgetError):
        plan_map(maps, sizes, tn.CompressionConfig(bits_per_weight=1))
