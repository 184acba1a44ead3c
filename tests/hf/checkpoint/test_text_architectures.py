"""A folder of any architecture that reads text is compressed by text alone; all others are refused."""

from __future__ import annotations

import string
from pathlib import Path

import pytest
import torch
from hf_architectures import GROUPS, PAGE_ARCHITECTURES, RELATIVES
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import tensornet as tn
import tensornet_hf as th
from tensornet.errors import FormatError, TargetError
from tensornet_hf.embedded import calibration_text

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Left dense")]

SPECIAL = ("pad", "bos", "eos", "unk", "mask", "cls", "sep")
#: Models that read something else than text, or text together with something else.
REFUSED = {x.name for group in ("Sound", "Images", "Images and text") for x in GROUPS[group]}
REFUSED |= {"Whisper", "Speech2Text"}
REFUSED |= {"NomicBERT"}  # it stores query, key and value as one matrix
#: transformers cannot run Llama 4 without images.
LEFT_OUT = {"Llama 4"}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are characters."""
    words = [*(f"<{x}>" for x in SPECIAL), *string.ascii_letters, *string.digits, *" .,;:!?'-()"]
    found = Tokenizer(models.WordLevel({x: i for i, x in enumerate(words)}, unk_token="<unk>"))
    found.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    special = {f"{x}_token": f"<{x}>" for x in SPECIAL}
    return PreTrainedTokenizerFast(tokenizer_object=found, model_max_length=32, **special)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(calibration_text()[:6_000])
    return file


@pytest.mark.parametrize("name", sorted(PAGE_ARCHITECTURES.keys() - LEFT_OUT - RELATIVES))
def test_compress_a_folder_by_text(
    name: str, tokenizer: PreTrainedTokenizerFast, text: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    PAGE_ARCHITECTURES[name].dense.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    options = th.CompressOptions(calibration=text, calibration_tokens=512)
    config = tn.CompressionConfig(bits_per_weight=6, formats=("int4", "int8"), method="gptq")
    where = tmp_path / "dense", tmp_path / "small", config
    if name in REFUSED:
        with pytest.raises((TargetError, FormatError), match=r"not text|on text alone|another form"):
            th.compress_folder(*where, options)
        return
    report = th.compress_folder(*where, options)
    assert isinstance(report, tn.CompressionReport)
    assert 0 <= report.plan.predicted_loss_increase < 0.1
    if report.measured is not None:
        assert abs(report.measured.mean) < 0.1
    changed = [x for x in th.load(tmp_path / "small").modules() if isinstance(x, tn.nn.TensorNetworkLinear)]
    assert changed
