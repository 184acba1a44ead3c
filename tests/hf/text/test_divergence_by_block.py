"""Two models are compared block by block, with the figures of both in memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from folder_runs import compress_files
from gguf_models import MODELS, WORDS
from sharded_folders import save
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import tensornet as tn
import tensornet_hf as th
from tensornet.errors import TargetError
from tensornet_hf.checkpoint import load_gguf
from tensornet_hf.embedded import gpt2_path, heldout_text
from tensornet_hf.evaluate import Divergence, divergence, divergence_by_block
from tensornet_hf.lazy_model import LazyModel, open_model
from tensornet_hf.text import load_tokenizer, token_ids

CONFIG = tn.CompressionConfig(formats=("int4:g32:float16",), method="nearest")


def assert_equal(found: Divergence, expected: Divergence) -> None:
    for name, value in asdict(expected).items():
        assert asdict(found)[name] == pytest.approx(value, abs=1e-5), name


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("stride", [None, 8])
def test_the_figures_are_those_of_models_in_memory(kind: str, stride: int | None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = tmp_path / "dense"
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **MODELS[kind])).save_pretrained(source)
    other = th.decompress(th.load(compress(source, tmp_path / "small")))
    other.save_pretrained(tmp_path / "other")
    ids = torch.randint(3, WORDS, (100,), generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"context": 16, "stride": stride, "batch_size": 3}
    dense = th.load(source)
    expected = divergence(other, dense, ids, **options)
    assert expected.mean[0] > 1e-4
    lazy = open_model(tmp_path / "other"), open_model(source)
    assert_equal(divergence_by_block(*lazy, ids, **options), expected)
    assert_equal(divergence_by_block(th.load(tmp_path / "small"), lazy[1], ids, **options), expected)


def compress(source: Path, destination: Path) -> Path:
    compress_files(source, destination, tn.CompressionConfig(formats=("int3",), method="nearest"))
    return destination


def test_one_block_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, sizes, most = save("llama", tmp_path / "dense"), [0], 0
    loaded = LazyModel.loaded

    @contextmanager
    def counting(self: LazyModel, modules: Any, **options: Any) -> Iterator[None]:
        nonlocal most
        modules = list(modules)
        sizes.append(sizes[-1] + sum(x.numel() for m in modules for x in m.parameters(recurse=False)))
        most = max(most, sizes[-1])
        with loaded(self, modules, **options):
            yield
        sizes.pop()

    monkeypatch.setattr(LazyModel, "loaded", counting)
    ids = torch.randint(3, 32, (40,), generator=torch.Generator().manual_seed(0))
    divergence_by_block(open_model(source), open_model(source), ids, context=20)
    model = th.load(source)
    ends = sum(x.numel() for name, x in model.named_parameters() if ".layers." not in name)
    block = sum(x.numel() for x in model.model.layers[0].parameters())
    assert most == max(2 * ends, ends + block)


class WithoutBlocksForCausalLM(nn.Module):
    """Predicts the next token from this one, without blocks."""

    config = SimpleNamespace(vocab_size=8, is_encoder_decoder=False)

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Embedding(8, 8)

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        return SimpleNamespace(logits=self.head(input_ids))


def test_a_model_without_blocks_is_refused() -> None:
    model: Any = WithoutBlocksForCausalLM()
    with pytest.raises(TargetError, match="chain of blocks"):
        divergence_by_block(model, model, torch.arange(8), context=4)


@pytest.mark.slow  # needs the extra `gguf`
def test_the_program_compares_a_file_with_its_source(tmp_path: Path) -> None:
    th.compress_folder(gpt2_path(), tmp_path / "small.gguf", CONFIG)
    (tmp_path / "held.txt").write_text(text := heldout_text()[:20_000])
    expected = divergence(
        load_gguf(tmp_path / "small.gguf"),
        th.load(gpt2_path()),
        token_ids(load_tokenizer(gpt2_path()), text),
        context=128,
    )
    words = ("eval", "small.gguf", "--reference", gpt2_path(), "--text", "held.txt", "--context", 128)
    command = [sys.executable, "-c", "from tensornet_hf.cli.main import app; app()", *map(str, words)]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert "as a whole" not in done.stderr
    found = json.loads(done.stdout)["divergence"]
    for name in ("mean", "median", "percentile_99", "same_top", "loss_increase"):
        assert found[name] == pytest.approx(getattr(expected, name), abs=1e-5), name
    assert found["mean"][0] > 0.001
