"""`compress_folder` and its kin: the commands' jobs called from Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import ARCHITECTURES, logits
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    GPT2LMHeadModel,
)

import tensornet as tn
import tensornet_hf as th
from tensornet_hf.embedded import gpt2_path
from tensornet_hf.text.calibration_data import scores_tokens

GPT2 = ARCHITECTURES["gpt2"]
HALF = tn.CompressionConfig(param_ratio=0.5, objective="weight")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    GPT2.dense.save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def test_a_plan_is_what_is_carried_out(source: Path, tmp_path: Path) -> None:
    planned = th.plan_folder(source, th.CompressOptions(HALF))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    done = th.compress_folder(source, tmp_path / "direct", th.CompressOptions(HALF))
    again = th.compress_folder(source, tmp_path / "planned", th.CompressOptions(plan=planned.plan))
    planned.plan.save(tmp_path / "plan.json")
    read = th.compress_folder(
        source, tmp_path / "read", th.CompressOptions(plan=tmp_path / "plan.json", dtype="bfloat16")
    )
    assert done.report.model_params_after == planned.sizes["model_params_after"]
    for name in ("direct", "planned"):
        model = th.load(tmp_path / name)
        assert model.num_parameters() == done.report.model_params_after
        torch.testing.assert_close(logits(model, GPT2), logits(th.load(tmp_path / "direct"), GPT2))
    assert th.load(tmp_path / "read").dtype == torch.bfloat16
    assert str(done).splitlines()[-1] == f"written to  {tmp_path / 'direct'}"
    assert read.to_dict()["file_bytes_after"] < again.to_dict()["file_bytes_after"]


def test_a_page_is_written(source: Path, tmp_path: Path) -> None:
    options = th.CompressOptions(HALF, report=tmp_path / "page.html", command="my script")
    th.compress_folder(source, tmp_path / "small", options)
    assert "my script" in (tmp_path / "page.html").read_text()


def test_workers_write_the_same_weights(source: Path, tmp_path: Path) -> None:
    whole = th.compress_folder(source, tmp_path / "whole", th.CompressOptions(HALF))
    parts = th.compress_folder(source, tmp_path / "parts", th.CompressOptions(HALF, workers=1))
    assert (whole.memory, parts.file_bytes_after) == (None, whole.file_bytes_after)
    assert parts.memory


@pytest.mark.parametrize(
    ("options", "message", "flags"),
    [
        ({}, "Give a config.*or a plan", "or a --plan"),
        ({"config": HALF, "plan": "plan.json"}, "^plan says already", "^--plan says"),
        (
            {"config": HALF, "heal": 3},
            "^heal trains on the text of calibration;",
            "^--heal .* --calibration;",
        ),
        ({"config": HALF, "refine": True}, "^refine fits layers", "^--refine fits"),
        (
            {"config": HALF, "validation": "x.txt"},
            "^validation corrects .* objective weight does not",
            "^--validation corrects .* --objective weight",
        ),
        (
            {"config": HALF, "workers": 2, "dtype": "float16"},
            "^workers never .* dtype would need",
            "^--workers never .* --dtype would",
        ),
    ],
)
def test_options_that_exclude_one_another(options: dict[str, Any], message: str, flags: str) -> None:
    with pytest.raises(th.OptionError, match=message) as caught:
        th.CompressOptions(**options)
    with pytest.raises(ValueError, match=flags):
        raise ValueError(caught.value.for_command_line)


def test_a_plan_alone_has_no_page_and_no_workers() -> None:
    with pytest.raises(th.OptionError, match="dry_run writes nothing; leave out report"):
        th.plan_folder(gpt2_path(), th.CompressOptions(HALF, report="page.html"))
    with pytest.raises(th.OptionError, match="workers never loads the model, which dry_run would need"):
        th.plan_folder(gpt2_path(), th.CompressOptions(HALF, workers=2))
    with pytest.raises(th.OptionError, match="workers writes to a local folder"):
        th.compress_folder(gpt2_path(), "hf://a/b", th.CompressOptions(HALF, workers=2))


def test_an_unknown_dtype() -> None:
    with pytest.raises(ValueError, match="Unknown dtype 'float8'"):
        th.CompressOptions(HALF, dtype="float8")


def test_a_mixture_of_a_folder(source: Path, tmp_path: Path) -> None:
    config = th.MoEConfig(num_experts=2, sites=3)
    report = th.upcycle_folder(source, None, config)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    assert th.upcycle_folder(source, tmp_path / "mixture", config).params == report.params
    assert th.load(tmp_path / "mixture").num_parameters() > GPT2.dense.num_parameters()
    with pytest.raises(tn.DestinationError, match="exists"):
        th.upcycle_folder(source, tmp_path / "mixture", config)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (GPT2LMHeadModel, True),
        (BertForMaskedLM, True),
        (BertForSequenceClassification, False),
        (BertModel, False),
    ],
)
def test_models_that_a_perplexity_describes(kind: Any, expected: bool) -> None:
    assert scores_tokens(kind) is expected


def test_a_classifier_has_no_perplexity() -> None:
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(vocab_size=50, **size)).eval()
    ids = torch.randint(1, 50, (8, 6))
    batches = [{"input_ids": ids, "labels": ids[:, 0] % 2}]
    report = tn.compress(model, tn.CompressionConfig(param_ratio=0.8), calibration=batches, progress=False)
    told = th.FolderReport("a", "b", report, 1, 1)
    assert "predicted   loss +" in str(told)
    assert "perplexity" not in f"{told}{report}"
    assert report.plan.predicted_perplexity is None
