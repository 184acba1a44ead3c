"""A GGUF file is laid out before its weights are there, and written tensor by tensor in any order."""

from __future__ import annotations

import copy
import os
import resource
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
from tensornet.compression.write import compress_blocks
from tensornet.errors import DestinationError, TargetError
from tensornet.nn.module import NetworkModule
from tensornet_hf.checkpoint import read_dense
from tensornet_hf.exporters.gguf import find_place, lay_out_gguf
from tensornet_hf.exporters.gguf_converter import ConvertedTensor, weight_sources
from tensornet_hf.file_sink import FileSink, PlannedModel
from tensornet_hf.lazy_model import open_lazily
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


def planned_of(model: PreTrainedModel, **options: Any) -> PlannedModel:
    """The model as it is before its new layers are known: their tensors are on the meta device."""
    targets: dict[int, tuple[str, ...]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, NetworkModule):
            first = id(next(iter(module.stored.values())))
            targets[first] = (*targets.get(first, ()), name)
    empty = copy.deepcopy(model)
    for name, module in empty.named_modules():
        if isinstance(module, NetworkModule):
            module.to(device="meta")
            if getattr(module, "bias", None) is not None:
                module.bias = model.get_submodule(name).bias
    return PlannedModel(empty, {names[0]: names for names in targets.values()}, **options)


@pytest.mark.parametrize("case", CASES)
def test_layout_of_formats_is_the_file_of_the_compressed_model(case: str, tmp_path: Path) -> None:
    """Written layer by layer, from the last to the first, and with interruptions."""
    name, formats, options = CASES[case]
    model = compressed(name, *formats, **options)
    report = th.export(model, tmp_path / "model.gguf")
    planned = planned_of(model)
    files = lay_out_gguf(planned)
    names = set(files.layouts["model.gguf"].places)
    assert files.packed == report.packed
    assert {x: y for x, y in files.dense.items() if x in names} == {
        x: y for x, y in report.dense.items() if x in names
    }
    assert files.nbytes == (tmp_path / "model.gguf").stat().st_size
    sink, put = FileSink(files, tmp_path / "again.gguf", tmp_path), set[str]()
    for number, target in enumerate(reversed(planned.targets)):
        modules: Any = [model.get_submodule(x) for x in planned.targets[target]]
        sink.put("", {target: (modules, 0.0)})
        put.add(target)
        if number % 4 == 0:  # an interruption: what waited for other layers is lost
            sink = FileSink(files, tmp_path / "again.gguf", tmp_path)
            lost = {x for x in put if not sink.written(x)}
            assert all(sink.written(x) for x in put - lost)
            sink.put("", {x: ([model.get_submodule(y) for y in planned.targets[x]], 0.0) for x in lost})
    sink.finish()
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "model.gguf").read_bytes()


def rounded(model: PreTrainedModel, number_format: str, *patterns: str) -> dict[str, NetworkModule]:
    """Round some layers of a model in place, and return them."""
    config = tn.CompressionConfig(
        bits_per_weight=9, formats=(number_format,), method="nearest", target_modules=patterns
    )
    tn.compress(model, config, progress=False)
    return layers_of(model)


def tensors_of(file: Path) -> dict[str, np.ndarray]:
    import gguf

    reader = gguf.GGUFReader(file)
    return {x.name: gguf.quants.dequantize(x.data, x.tensor_type) for x in reader.tensors}


def test_parameters_that_can_only_be_read_with_others(tmp_path: Path) -> None:
    """Experts that are stored one by one are on the meta device, and read when they are written."""
    model = model_of("mixtral").bfloat16()
    model.save_pretrained(tmp_path / "dense")
    config = tn.CompressionConfig(
        bits_per_weight=9, formats=("int4:g32:float16",), method="nearest", target_modules="*q_proj"
    )
    plan = tn.plan(model, config)
    source = read_dense(tmp_path / "dense")
    planned = PlannedModel.of(open_lazily(source), plan)
    sink = FileSink(lay_out_gguf(planned), tmp_path / "model.gguf", tmp_path)
    for _, layers in compress_blocks(model, plan, []):
        sink.put("", layers)
    sink.finish()
    found = tensors_of(tmp_path / "model.gguf")
    down = model.state_dict()["model.layers.1.mlp.experts.down_proj"].float()
    assert np.array_equal(found["blk.1.ffn_down_exps.weight"], down)


def test_weights_that_are_missing_or_of_another_format(tmp_path: Path) -> None:
    model = model_of("mixtral")
    layers = rounded(model, "int4:g32:float16", "*experts*gate_up*")
    finer = rounded(model_of("mixtral"), "int8:g32:float16", "*experts*gate_up*")
    first, *others = [x for x in layers if "layers.0." in x]
    assert len(others) == 3
    sink = FileSink(lay_out_gguf(planned_of(model)), tmp_path / "model.gguf", tmp_path)
    sink.put("", {x: ([layers[x]], 0.0) for x in layers if x != first})
    assert not any(sink.written(x) for x in (first, *others))
    assert all(sink.written(x) for x in layers if "layers.1." in x)
    with pytest.raises(TargetError, match="Q4_0"):
        sink.put("", {x: ([finer[x]], 0.0) for x in (first, *others)})
    with pytest.raises(ValueError, match="have not been written"):
        sink.finish()
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


# --- a full disk ----------------------------------------------------------------------------------


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
