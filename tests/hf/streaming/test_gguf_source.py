"""Weights from a GGUF file are those of the folder from which the file was converted, bit by bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from folder_runs import compress_files
from gguf_models import MODELS
from sharded_folders import contents
from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

import tensornet as tn
import tensornet_hf as th
from tensornet.errors import FormatError
from tensornet_hf.gguf_source import ARCHITECTURES
from tensornet_hf.lazy_model import open_model

pytestmark = pytest.mark.slow  # needs the extra `gguf`
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CONFIG = tn.CompressionConfig(bits_per_weight=5, formats=("int4",), method="nearest")


def model_of(name: str, dtype: torch.dtype) -> PreTrainedModel:
    """Random model; no value is special, not even those of norms and biases."""
    config = AutoConfig.for_model(name, **MODELS[name])
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).eval()
    for x in {id(x): x for x in model.parameters()}.values():
        x.data.copy_((torch.randn(x.shape) / 8).bfloat16())  # exact in BF16 and, with this scale, in F32 + 1
    return model.to(dtype)  # type: ignore[arg-type,no-any-return]


def convert(folder: Path, file: Path, kind: str) -> Path:
    """Convert a folder by llama.cpp's converter, and then the matrices to another type."""
    import gguf

    whole = file.with_suffix(".first.gguf")
    th.export(th.load(folder).float(), whole)
    reader = gguf.GGUFReader(whole)
    writer = gguf.GGUFWriter(file, reader.fields["general.architecture"].contents())
    wanted = gguf.GGMLQuantizationType[kind]
    for info in reader.tensors:
        values = gguf.quants.dequantize(info.data, info.tensor_type)
        used = wanted if values.ndim > 1 else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(values, used)
        writer.add_tensor(info.name, data, raw_dtype=used)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def folders(name: str, kind: str, path: Path) -> tuple[Path, Path, Path]:
    """A dense folder, a folder without weights, and the GGUF file."""
    model_of(name, DTYPES[kind]).save_pretrained(path / "dense")
    (path / "dense" / "tokenizer.json").write_text('{"made": "up"}')
    (path / "bare").mkdir()
    for file in ("config.json", "tokenizer.json", "generation_config.json"):
        if (path / "dense" / file).exists():
            (path / "bare" / file).write_bytes((path / "dense" / file).read_bytes())
    (path / "dense" / "tokenizer.json").unlink()
    file = convert(path / "dense", path / "model.gguf", kind)
    (path / "dense" / "tokenizer.json").write_text('{"made": "up"}')
    return path / "dense", path / "bare", file


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("name", sorted(MODELS.keys() & ARCHITECTURES))
def test_every_weight(name: str, kind: str, tmp_path: Path) -> None:
    dense, bare, file = folders(name, kind, tmp_path)
    lazy, expected = open_model(bare, file), th.load(dense)
    assert lazy.model.config.dtype == DTYPES[kind]
    with lazy.loaded(lazy.model.modules(), dtype=None):
        found = lazy.model.state_dict()
        assert found.keys() == expected.state_dict().keys()
        for key, x in expected.state_dict().items():
            assert found[key].dtype == x.dtype, key
            assert torch.equal(found[key], x), key
        ids = torch.randint(96, (2, 7))
        with torch.no_grad():
            torch.testing.assert_close(lazy.model(ids).logits, expected(ids).logits)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_same_files_as_from_a_folder(name: str, tmp_path: Path) -> None:
    dense, bare, file = folders(name, "F16", tmp_path)
    compress_files(dense, tmp_path / "theirs", CONFIG)
    compress_files(bare, tmp_path / "ours", CONFIG, weights=file)
    made = [contents(tmp_path / x) for x in ("ours", "theirs")]
    assert made[0].pop("receipt.json") != made[1].pop("receipt.json")  # they name their sources
    assert made[0] == made[1]
    done = th.compress_folder(bare, tmp_path / "loaded", CONFIG, th.CompressOptions(weights=file))
    ours, theirs = (tmp_path / x / "model.safetensors" for x in ("loaded", "theirs"))
    assert ours.read_bytes() == theirs.read_bytes()
    assert done.file_bytes_before == file.stat().st_size


def test_files_that_are_refused(tmp_path: Path) -> None:
    import gguf

    _, bare, file = folders("llama", "F16", tmp_path)

    def refused(match: str, source: Path = bare, weights: Path = file) -> None:
        with pytest.raises(FormatError, match=match):
            compress_files(source, tmp_path / "out", CONFIG, weights=weights)
        assert not (tmp_path / "out").exists()

    config = json.loads((bare / "config.json").read_text())
    (tmp_path / "other").mkdir()
    for kind, match in (("qwen2", "architecture 'llama'.*'qwen2'"), ("olmo", "types: bloom")):
        (tmp_path / "other" / "config.json").write_text(json.dumps({**config, "model_type": kind}))
        refused(match, source=tmp_path / "other")
    (bare / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    refused(r"layers\.2\..* not stored")
    (bare / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    refused("does not have")
    (bare / "config.json").write_text(json.dumps({**config, "vocab_size": 95}))
    refused("embed_tokens.*shape")
    (bare / "config.json").write_text(json.dumps(config))
    (whole := tmp_path / "short.gguf").write_bytes(file.read_bytes()[:-100])
    refused("truncated|damaged", weights=whole)
    reader = gguf.GGUFReader(file)
    for offset in (2**64 - 64, 32):  # wraps around to the header; overlaps the first tensor
        offsets = reader.tensors[-1].field.parts[-1]
        place = offsets.ctypes.data - reader.data.ctypes.data
        data = bytearray(file.read_bytes())
        data[place : place + 8] = offset.to_bytes(8, "little")
        whole.write_bytes(data)
        refused("damaged", weights=whole)
    whole.write_bytes(b"GGUF and nothing else")
    refused("damaged", weights=whole)
    refused("not a GGUF file", weights=tmp_path / "absent.gguf")
    writer = gguf.GGUFWriter(tmp_path / "q.gguf", "llama")
    data = gguf.quants.quantize(torch.randn(96, 64).numpy(), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("token_embd.weight", data, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refused("token_embd.weight as Q8_0", weights=tmp_path / "q.gguf")
