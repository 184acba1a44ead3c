"""`compress_folder` and its kin: the commands' jobs called from Python."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hf_models import ARCHITECTURES, logits
from transformers import (
    BertConfig,
    BertForSequenceClassification,
)

import tensornet as tn
import tensornet_hf as th
from tensornet_hf.compress import text_of
from tensornet_hf.embedded import gpt2_path
from tensornet_hf.text import mix_texts

GPT2 = ARCHITECTURES["gpt2"]
HALF = tn.CompressionConfig(param_ratio=0.5, method="svd")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    GPT2.dense.save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def test_a_plan_is_what_is_applied(source: Path, tmp_path: Path) -> None:
    planned = th.plan_folder(source, HALF)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    options = th.CompressOptions(report=tmp_path / "page.html", command="my script")
    done = th.compress_folder(source, tmp_path / "direct", HALF, options)
    assert "my script" in (tmp_path / "page.html").read_text()
    again = th.compress_folder(source, tmp_path / "planned", planned)
    planned.save(tmp_path / "plan.json")
    read = th.compress_folder(
        source,
        tmp_path / "read",
        tn.CompressionPlan.load(tmp_path / "plan.json"),
        th.CompressOptions(dtype="bfloat16"),
    )
    assert done.model_params_after == planned.model_params_after
    for name in ("direct", "planned"):
        model = th.load(tmp_path / name)
        assert model.num_parameters() == done.model_params_after
        torch.testing.assert_close(logits(model, GPT2), logits(th.load(tmp_path / "direct"), GPT2))
    assert th.load(tmp_path / "read").dtype == torch.bfloat16
    assert str(done).splitlines()[-1] == f"written to  {tmp_path / 'direct'}"
    assert read.to_dict()["file_bytes_after"] < again.to_dict()["file_bytes_after"]


def test_options_that_exclude_one_another_are_named_as_in_python() -> None:
    """The command line, where they are spelled otherwise, tests more of them."""
    with pytest.raises(th.compress.OptionError, match=r"heal.*calibration"):
        th.CompressOptions(heal=2)
    with pytest.raises(th.compress.OptionError, match="local folder"):
        th.compress_folder(gpt2_path(), "hf://a/b", HALF, th.CompressOptions(export="mlx"))


def test_a_classifier_has_no_perplexity() -> None:
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(vocab_size=50, **size)).eval()
    ids = torch.randint(1, 50, (8, 6))
    batches = [{"input_ids": ids, "labels": ids[:, 0] % 2}]
    report = tn.compress(model, tn.CompressionConfig(param_ratio=0.8), calibration=batches, progress=False)
    told = replace(report, destination="small", file_bytes_before=1, file_bytes_after=1)
    assert "predicted   loss increase" in str(told)
    assert "perplexity" not in f"{told}{report}"
    assert report.plan.predicted_perplexity is None


def test_several_texts_are_mixed(tmp_path: Path) -> None:
    texts = {name: f"{name}\n" * 3_000 for name in ("one", "other")}
    for name, text in texts.items():
        (tmp_path / f"{name}.txt").write_text(text)
    options = th.CompressOptions(calibration=[tmp_path / f"{name}.txt" for name in texts])
    assert text_of(options, tmp_path) == mix_texts(list(texts.values()))
    assert options.source == "one.txt and other.txt"
    with pytest.raises(FileNotFoundError, match=r"absent\.txt"):
        text_of(th.CompressOptions(calibration=tmp_path / "absent.txt"), tmp_path)
