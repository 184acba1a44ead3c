"""Damaged, contradictory and hostile model folders: one clear error each, before anything is allocated."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import ARCHITECTURES
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import tensornet_hf as th
from tensornet.errors import FormatError, NonFiniteError

CORE = "transformer.h.0.mlp.c_fc.core_1"
LAYER = "transformer.h.0.mlp.c_fc"

load_either_way = pytest.mark.parametrize(
    "load", [th.load, AutoModelForCausalLM.from_pretrained], ids=["load", "from_pretrained"]
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    ARCHITECTURES["gpt2"].compressed.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def spec(config: dict[str, Any]) -> dict[str, Any]:
    return config["quantization_config"]["layers"][LAYER]


# --- damaged folders ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nobody-has-this/model", "not a hub id!"])
def test_neither_folder_nor_hub_id(name: str) -> None:
    with pytest.raises(FormatError, match="hub id"):
        th.load(name)


def test_what_is_no_model_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path, word in (
        (tmp_path / "no", "does not exist"),
        (tmp_path / "file", "a file"),
        (tmp_path, "json"),
    ):
        with pytest.raises(FormatError, match=word):
            th.load(path)


@pytest.mark.parametrize("content", ["{", "[]", '{"a": ' * 100_000, "\xff"])
def test_config_that_is_not_json(folder: Path, content: str) -> None:
    (folder / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(FormatError, match=r"config\.json"):
        th.load(folder)


def _cut(keep: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:keep]


def _entry(**changed: Any) -> Callable[[bytes], bytes]:
    """Change the header entry of the first tensor."""

    def damage(data: bytes) -> bytes:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        next(entry for name, entry in header.items() if name != "__metadata__").update(changed)
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + data[8 + length :]

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        *(_cut(keep) for keep in (0, 100, -1)),
        *(_entry(shape=x) for x in ([2**40, 2**40], [-1, -24])),
        _entry(data_offsets=[4, 4 + 24]),  # overlaps
        lambda data: data + b"surplus",
        lambda data: data[:20] + bytes(20) + data[40:],
        lambda data: (2**62).to_bytes(8, "little") + data[8:],  # a header that claims to be huge
    ],
)
@load_either_way
def test_damaged_weights(
    folder: Path, load: Callable[[Path], object], damage: Callable[[bytes], bytes]
) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(FormatError, match="truncated or damaged"):
        load(folder)


def test_shards_that_are_missing_or_lie_outside(folder: Path, tmp_path: Path) -> None:
    ARCHITECTURES["gpt2"].compressed.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    index = tmp_path / "parts" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name = next(iter(content["weight_map"]))
    shard = tmp_path / "parts" / content["weight_map"][name]
    content["weight_map"][name] = "../outside.safetensors"
    shutil.copy(shard, tmp_path / "outside.safetensors")
    whole = index.read_text()
    index.write_text(json.dumps(content))
    with pytest.raises(FormatError, match="index"):
        th.load(tmp_path / "parts")
    index.write_text(whole)
    shard.unlink()
    with pytest.raises(FormatError, match=rf"lacks {shard.name}"):
        th.load(tmp_path / "parts")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FormatError, match="contains no weights"):
        th.load(folder)


# --- configuration and weights that do not belong together ----------------------------------------------

Tensors = dict[str, Tensor]
#: Name of what is wrong, the change of the weights that makes it so, and the decisive words.
WEIGHTS: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "no core": (lambda x: x.pop(CORE), rf"{re.escape(CORE)} is missing"),
    "no bias": (lambda x: x.pop(f"{LAYER}.bias"), r"bias is missing"),
    "surplus core": (
        lambda x: x.update({f"{LAYER}.core_7": torch.zeros(2, 2)}),
        "config.json does not describe",
    ),
    "surplus weight": (
        lambda x: x.update({f"{LAYER}.weight": torch.zeros(2, 2)}),
        "config.json does not describe",
    ),
    "core of another": (
        lambda x: x.update({"transformer.h.0.ln_1.core_0": torch.zeros(2)}),
        "config.json does not describe",
    ),
    "shape": (lambda x: x.update({CORE: x[CORE][..., :-1].contiguous()}), "stored with shape"),
    "integers": (lambda x: x.update({CORE: x[CORE].to(torch.int8)}), "stored as int8"),
}


@pytest.mark.parametrize("case", WEIGHTS)
@load_either_way
def test_wrong_tensors_of_a_compressed_layer(folder: Path, load: Callable[[Path], object], case: str) -> None:
    change, message = WEIGHTS[case]
    edit_weights(folder, change)
    with pytest.raises(FormatError, match=message):
        load(folder)


@load_either_way
def test_cores_that_are_not_finite(folder: Path, load: Callable[[Path], object]) -> None:
    edit_weights(folder, lambda tensors: tensors[CORE].view(-1)[3:4].fill_(float("nan")))
    with pytest.raises(NonFiniteError, match=rf"{re.escape(CORE)} contains NaN"):
        load(folder)


def test_wrong_tensors_elsewhere(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.update({"transformer.extra": torch.zeros(2)}))
    with pytest.raises(FormatError, match=r"transformer\.extra"):
        th.load(folder)
    edit_weights(folder, lambda tensors: tensors.pop("transformer.ln_f.weight"))
    with pytest.raises(FormatError, match=r"lacks weights: transformer\.ln_f\.weight"):
        th.load(folder)


def test_weights_and_config_of_different_saves(folder: Path, tmp_path: Path) -> None:
    ARCHITECTURES["gpt2"].dense.save_pretrained(tmp_path / "dense")
    for names in ((folder, tmp_path / "dense"), (tmp_path / "dense", folder)):
        mixed = Path(shutil.copytree(names[0], tmp_path / f"mixed{names[0].name}"))
        shutil.copy(names[1] / "model.safetensors", mixed)
        with pytest.raises(FormatError, match=r"is missing|contains cores"):
            th.load(mixed)


@pytest.mark.parametrize("version", [2, "1", None])
@load_either_way
def test_unknown_version(folder: Path, load: Callable[[Path], object], version: object) -> None:
    edit_config(folder, lambda config: config["quantization_config"].update(format_version=version))
    with pytest.raises(FormatError, match=rf"format version {re.escape(repr(version))}"):
        load(folder)


# --- hostile descriptions ------------------------------------------------------------------------


def _size(size: object) -> Callable[[dict[str, Any]], None]:
    def change(config: dict[str, Any]) -> None:
        sizes = spec(config)["topology"]["sizes"]
        sizes[list(sizes)[1]] = size

    return change


HOSTILE: dict[str, Callable[[dict[str, Any]], object]] = {
    "negative size": _size(-3),
    "huge size": _size(10**12),
    "absurd size": _size(10**400),
    "text": _size("7"),
    "no topology": lambda config: spec(config).pop("topology"),
    "no cores": lambda config: spec(config)["topology"].update(cores={}),
    "huge features": lambda config: spec(config)["topology"].update(shape=[10**15, 24]),
    "unknown type": lambda config: spec(config).update(type="os.system"),
    "no such module": lambda config: config["quantization_config"]["layers"].update(nowhere=spec(config)),
    "a module of another kind": lambda config: config["quantization_config"]["layers"].update(
        {"transformer.h.0.ln_1": spec(config)}
    ),
    "auxiliary losses are a word": lambda config: config["quantization_config"].update(aux_losses="no"),
    "layers is a list": lambda config: config["quantization_config"].update(layers=[1, 2]),
    "ties to nowhere": lambda config: config["quantization_config"]["ties"].update(a="b"),
    "ties to itself": lambda config: config["quantization_config"]["ties"].update({CORE: CORE}),
    "tied to another shape": lambda config: config["quantization_config"]["ties"].update(
        {CORE: f"{LAYER}.core_0"}
    ),
    "an option of no meaning": lambda config: config["quantization_config"].update(compression={"a": 1}),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE.keys())
@load_either_way
def test_hostile_descriptions(
    folder: Path, load: Callable[[Path], object], change: Callable[[dict[str, Any]], object]
) -> None:
    edit_config(folder, change)
    with pytest.raises((FormatError, ValueError)) as raised:
        load(folder)
    assert len(str(raised.value)) < 1000
    if load is th.load:
        assert isinstance(raised.value, FormatError)


@pytest.mark.parametrize("names", [None, [], ["GPT2Config"], [7]])
def test_a_class_that_transformers_does_not_have(folder: Path, names: object) -> None:
    edit_config(folder, lambda config: config.update(architectures=names))
    with pytest.raises(FormatError, match="architectures"):
        th.load(folder)


def test_another_quantization_method(folder: Path) -> None:
    edit_config(folder, lambda config: config["quantization_config"].update(quant_method="gptq"))
    with pytest.raises(FormatError, match="quantized by 'gptq'"):
        th.load(folder)


# --- pickles -------------------------------------------------------------------------------------


class Bomb:
    """Leaves a trace when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, ...]]:
        return Path.touch, (self.trace,)  # type: ignore[return-value]


@pytest.mark.parametrize("compressed", [True, False])
def test_pickles_are_never_opened(folder: Path, tmp_path: Path, compressed: bool) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "trace")))
    if not compressed:
        edit_config(folder, lambda config: config.pop("quantization_config"))
    with pytest.raises(FormatError, match=r"only pytorch_model\.bin.*save_pretrained"):
        th.load(folder)
    options = (
        {}
        if compressed
        else {"quantization_config": th.TensorNetworkConfig(topology_options={"max_bond": 4})}
    )
    with pytest.raises(FormatError, match=r"pytorch_model\.bin: only safetensors"):
        AutoModelForCausalLM.from_pretrained(folder, **options)
    assert not (tmp_path / "trace").exists()


# --- compressing while loading -------------------------------------------------------------------


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    model = ARCHITECTURES["gpt2"].dense
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.weight[0, 0] = float("inf")
    model.save_pretrained(tmp_path)
    with pytest.raises(NonFiniteError, match=r"transformer\.h\.1\.mlp\.c_proj"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=th.TensorNetworkConfig(topology_options={"max_bond": 4})
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_byte": 4}, "max_byte.*options are.*max_bytes"),
        ({"param_ratio": -1.0}, "param_ratio"),
        ({"topology": "moebius"}, "moebius"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        th.TensorNetworkConfig(**options)


def test_state_dict_without_a_core(folder: Path) -> None:
    """No file to check beforehand: what was not given is noticed afterwards."""
    state = load_file(folder / "model.safetensors")
    del state[CORE]
    config = GPT2Config.from_pretrained(folder)
    with pytest.raises(FormatError, match=rf"{re.escape(CORE)} is missing"):
        GPT2LMHeadModel.from_pretrained(None, config=config, state_dict=state)
