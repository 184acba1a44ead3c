"""A GGUF file is laid out before its weights are there, and written tensor by tensor in any order."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_models import SIZES
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import tensornet as tn
import tensornet_hf as th
from tensornet.errors import DestinationError, TargetError
from tensornet.nn.module import NetworkModule
from tensornet.quantization import NumberFormat
from tensornet_hf.exporters.gguf import find_place, gguf_layout
from tensornet_hf.exporters.gguf_converter import ConvertedTensor, weight_sources
from tests.hf.export.test_gguf import compressed, model_of

pytestmark = [
    pytest.mark.slow,  # needs the extra `gguf`
]

FORMATS = ("int8:g32:float16", "int4:g32:float16", "nl4:g32:float16", "int5:g32:float16")
WIDE = {"hidden_size": 256, "intermediate_size": 512}
CASES: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "llama": ("llama", FORMATS, {}),
    "tied": ("llama", FORMATS, {"tie_word_embeddings": True}),
    "super-blocks": ("llama", ("int2:g16:s4:min", "nl4:g32:s6", "int6:g16:s8", "int3:g16:s6"), WIDE),
    "minima": ("llama", ("int5:g32:s6:min", "int4:g32:s6:min", "int2:g16:s4:min"), WIDE),
    "codebooks": ("llama", ("iq3_s", "iq3_xxs", "iq2_s", "iq2_xs", "iq2_xxs"), WIDE),
    "floats": ("llama", ("mxfp4", "nvfp4"), {}),
    "stacked with one type": ("mixtral", ("int4:g32:float16",), {}),
    "stacked with several types": ("qwen3_moe", FORMATS, {}),
    "fused": ("phi3", FORMATS, {}),
    "transposed": ("gpt2", FORMATS, {}),
    "shifted norms": ("gemma", FORMATS, {}),
    "reordered": ("gpt_neox", FORMATS, {}),
    "no GGUF type": ("llama", ("int4:g32:float16", "int7:g32:float16", "float"), {}),
}


def layers_of(model: PreTrainedModel) -> dict[str, NetworkModule]:
    """New modules by the name of the layer; a shared layer is listed once, as in a plan."""
    return {name: module for name, module in model.named_modules() if isinstance(module, NetworkModule)}


def formats_of(layers: dict[str, NetworkModule]) -> dict[str, NumberFormat]:
    return {name: module.storage.format_of(module.topology.core_names[0]) for name, module in layers.items()}


@pytest.mark.parametrize("case", CASES)
def test_layout_of_formats_is_the_file_of_the_compressed_model(case: str, tmp_path: Path) -> None:
    """Written layer by layer, from the last to the first, and with an interruption."""
    name, formats, options = CASES[case]
    model, layers = model_of(name, **options), layers_of(compressed(name, *formats, **options))
    report = th.export(compressed(name, *formats, **options), tmp_path / "model.gguf")
    layout = gguf_layout(model, None, formats_of(layers), title="model")
    assert layout.packed == report.packed
    assert {x: y for x, y in layout.dense.items() if x in layout.tensors} == {
        x: y for x, y in report.dense.items() if x in layout.tensors
    }
    assert layout.nbytes == (tmp_path / "model.gguf").stat().st_size
    known: dict[str, NetworkModule] = {}
    file, left = layout.open(tmp_path / "unfinished"), set(layout.tensors)
    for number, layer in enumerate(reversed([*layers, None])):
        known |= {} if layer is None else {layer: layers[layer]}
        for tensor in reversed(layout.ready(known)):
            if tensor in left:
                layout.write(file, tensor, known)
                left.remove(tensor)
        if number % 4 == 0:
            file = layout.open(tmp_path / "unfinished")  # as after an interruption
            assert set(file.missing()) == left
    file.finish(tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "model.gguf").read_bytes()


def rounded(model: PreTrainedModel, number_format: str, *patterns: str) -> dict[str, NetworkModule]:
    """Round some layers of a model in place, and return them."""
    config = tn.CompressionConfig(
        bits_per_weight=9, formats=(number_format,), objective="weight", rounding="nearest",
        target_modules=patterns,
    )  # fmt: skip
    tn.compress(model, config, progress=False)
    return layers_of(model)


def tensors_of(file: Path) -> dict[str, np.ndarray]:
    import gguf

    reader = gguf.GGUFReader(file)
    return {x.name: gguf.quants.dequantize(x.data, x.tensor_type) for x in reader.tensors}


def test_a_model_without_weights(tmp_path: Path) -> None:
    """All weights are given when they are written; dense ones keep their dtype."""
    layers = rounded(model_of("llama").bfloat16(), "int4:g32:float16", "*up_proj")
    model = model_of("llama").bfloat16()
    parameters = dict(model.state_dict())
    layout = gguf_layout(model.to(device="meta"), None, formats_of(layers))  # type: ignore[call-arg]
    assert layout.tensors["blk.0.ffn_down.weight"].kind == "BF16"
    assert layout.tensors["blk.0.attn_norm.weight"].kind == "F32"
    file = layout.open(tmp_path / "unfinished")
    with pytest.raises(ValueError, match=r"model\.norm\.weight"):
        layout.write(file, "output_norm.weight", layers)
    for name in layout.tensors:
        layout.write(file, name, {**layers, **parameters})
    file.finish(tmp_path / "model.gguf")
    found = tensors_of(tmp_path / "model.gguf")
    for name, layer in {"ffn_norm": "post_attention_layernorm", "ffn_down": "mlp.down_proj"}.items():
        expected = parameters[f"model.layers.1.{layer}.weight"].float()
        assert np.array_equal(found[f"blk.1.{name}.weight"], expected)
    up = layers["model.layers.1.mlp.up_proj"].to_matrix().float().detach()
    torch.testing.assert_close(torch.from_numpy(found["blk.1.ffn_up.weight"]), up, rtol=2**-8, atol=0)


def test_weights_that_are_missing_or_of_another_format(tmp_path: Path) -> None:
    layers = rounded(model_of("mixtral"), "int4:g32:float16", "*experts*gate_up*")
    layout = gguf_layout(model_of("mixtral"), None, formats_of(layers))
    name = "blk.0.ffn_gate_exps.weight"
    first, *others = layout.tensors[name].layers
    assert len(others) == 3
    assert name not in layout.ready(others)
    assert name in layout.ready([first, *others])
    assert "token_embd.weight" in layout.ready([])
    file = layout.open(tmp_path / "unfinished")
    with pytest.raises(ValueError, match="experts"):
        layout.write(file, name, {layer: layers[layer] for layer in others})
    finer = rounded(model_of("mixtral"), "int8:g32:float16", "*experts*gate_up*")
    with pytest.raises(TargetError, match="Q4_0"):
        layout.write(file, name, finer)
    layout.write(file, name, layers)
    with pytest.raises(ValueError, match="already"):
        layout.write(file, name, layers)
    with pytest.raises(ValueError, match="have not been written"):
        file.finish(tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


def test_small_parameters_that_the_converter_reads(tmp_path: Path) -> None:
    """It writes the learned activation of Apertus to the metadata."""
    import gguf

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("apertus", **SIZES))
    activation = model.model.layers[1].mlp.act_fn
    activation.alpha_p.data.fill_(0.25)
    th.export(model, tmp_path / "model.gguf")
    found = gguf.GGUFReader(tmp_path / "model.gguf").fields["xielu.alpha_p"].contents()
    assert found[1] == 0.25


# --- what the converter does to rows and columns --------------------------------------------------

MOVES: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "nothing": (lambda x: x, True),
    "rows": (lambda x: x.reshape(4, 2, 8, 64).swapaxes(1, 2).reshape(64, 64), True),
    "columns": (lambda x: x.reshape(64, 4, 2, 8).swapaxes(1, 2).reshape(64, 64), True),
    "both": (lambda x: x.flip(0).roll(5, 1), True),
    "some rows": (lambda x: x[8:24], True),
    "rows repeated": (lambda x: x.repeat_interleave(2, 0), True),
    "a stack": (lambda x: x.reshape(4, 16, 64), True),
    "one is added": (lambda x: x + 1, False),
    "negated": (lambda x: -x, False),
    "doubled": (lambda x: 2 * x, False),
    "transposed": (lambda x: x.T, False),
    "some columns": (lambda x: x[:, :32], False),
    "padded": (lambda x: nn.functional.pad(x, (0, 0, 0, 1)), False),
    "each row in another order": (lambda x: torch.stack([row.roll(k) for k, row in enumerate(x)]), False),
    "summed": (lambda x: x + x.flip(0), False),
    "exponential": (lambda x: -torch.exp(x), False),
}


@pytest.mark.parametrize("move", MOVES)
def test_places_of_rows_and_columns(move: str) -> None:
    function, found = MOVES[move]
    name = "model.layers.0.mlp.down_proj"
    sources, _ = weight_sources(model_of("llama", intermediate_size=64).to(device="meta"))  # type: ignore[call-arg]
    matrix = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    moved = function(matrix)
    tensor = ConvertedTensor(
        tuple(moved.shape), False, (f"{name}.weight",), lambda read: function(read(f"{name}.weight"))
    )
    place = find_place(tensor, sources)
    assert (place is not None) == found
    if place is not None:
        assert place.layers == {name: 64}
        again = matrix.numpy()[place.rows][:, place.columns]
        assert np.array_equal(again, moved.reshape(-1, 64).numpy())


# --- interrupted runs -----------------------------------------------------------------------------

PROGRAM = """
import os, signal, sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
sys.path.append("tests")
from tensornet.io import ResumableFile
from tensornet_hf.exporters.gguf import gguf_layout
from tests.hf.export.test_gguf import compressed, model_of
from tests.hf.export.test_gguf_layout import FORMATS, formats_of, layers_of
layers = layers_of(compressed("mixtral", *FORMATS))
layout = gguf_layout(model_of("mixtral"), None, formats_of(layers), title="model")
file = layout.open(Path(sys.argv[1]) / "unfinished", key="mixtral")
for number, name in enumerate(reversed(file.missing()), start=1):
    layout.write(file, name, layers)
    if number == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
file.finish(Path(sys.argv[1]) / "model.gguf", force=False)
"""


@pytest.mark.skipif(os.name == "nt", reason="there is no SIGKILL")
def test_a_killed_run_is_continued(tmp_path: Path) -> None:
    for stop in (9, 5, 0):
        command = [sys.executable, "-c", PROGRAM, str(tmp_path), str(stop)]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        assert ended.returncode == (-signal.SIGKILL if stop else 0), ended.stderr
        assert (tmp_path / "model.gguf").exists() == (not stop)
    found = (tmp_path / "model.gguf").read_bytes()
    th.export(compressed("mixtral", *FORMATS), tmp_path / "model.gguf", force=True)
    assert found == (tmp_path / "model.gguf").read_bytes()
    assert [x.name for x in tmp_path.iterdir()] == ["model.gguf"]


@pytest.mark.skipif(os.name == "nt", reason="there is no RLIMIT_FSIZE")
def test_a_full_disk(tmp_path: Path) -> None:
    model = compressed("llama", *FORMATS)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(DestinationError, match="The model"):
            th.export(model, tmp_path / "model.gguf")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())
