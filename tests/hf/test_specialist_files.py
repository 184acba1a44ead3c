"""Folders of specialists: a round trip, what is stored once, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import GPT2LMHeadModel, PreTrainedModel

import tensornet as tn
import tensornet_hf as th
import tensornet_moe as tm
from tensornet.errors import DestinationError, FormatError, TargetError
from tensornet_hf.inspect import inspect_specialists
from tensornet_hf.specialist_files import weight_digests

RANK = 4
IDS = torch.arange(30).reshape(3, 10)


@pytest.fixture
def trunk() -> Callable[[], PreTrainedModel]:
    return lambda: th.load(th.embedded.gpt2_path()).eval()


def randomized(s: tm.Specialists, *names: str) -> None:
    for name in names:
        s.add(name)
        for core in s.tensors(name).values():
            torch.nn.init.normal_(core, std=0.2)


def logits(s: tm.Specialists, which: Any) -> Tensor:
    with torch.no_grad(), s.use(which):
        return s.model(IDS).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("share", "pool"), [("ends", None), ("ends", "shape"), ("center", None), ("none", None)]
)
def test_specialists_come_back_and_shared_cores_are_stored_once(
    trunk: Callable[[], PreTrainedModel], tmp_path: Path, share: Any, pool: Any
) -> None:
    s = th.specialists(trunk(), rank=RANK, share=share, pool=pool)
    randomized(s, "law", "code")
    expected = logits(s, ["law", "code", None])
    folder = s.save(tmp_path / "s", trunk=str(th.embedded.gpt2_path()))
    names = ["code.safetensors", "law.safetensors", "shared.safetensors", "specialists.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    sizes = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            sizes[path.stem] = sum(file.get_tensor(key).nbytes for key in file.keys())  # noqa: SIM118
    assert sizes == {key: size for key, size in s.bytes().items() if key != "next"}
    back = th.load_specialists(folder)
    assert back.frozen
    assert back.names == ["law", "code"]
    assert torch.equal(logits(back, ["law", "code", None]), expected)
    assert th.load_specialists(folder, trunk(), names=["code"]).names == ["code"]


def test_adding_to_a_folder_keeps_the_other_files(
    trunk: Callable[[], PreTrainedModel], tmp_path: Path
) -> None:
    s = th.specialists(trunk(), rank=RANK)
    randomized(s, "law", "code")
    folder = s.save(tmp_path / "s")
    kept = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    back = th.load_specialists(folder, trunk())
    randomized(back, "perl")
    back.save(folder)
    assert {name: (folder / name).read_bytes() for name in kept} == kept
    assert th.load_specialists(folder, trunk()).names == ["law", "code", "perl"]
    # A folder is protected from losing a specialist, and from other shared cores.
    part = th.load_specialists(folder, trunk(), names=["law"])
    with pytest.raises(DestinationError, match="code, perl, which would be lost"):
        part.save(folder)
    back.shared_parameters()[0].data += 1
    with pytest.raises(DestinationError, match="were trained since"):
        back.save(folder)
    assert {name: (folder / name).read_bytes() for name in kept} == kept
    part.save(folder, force=True)
    assert sorted(path.name for path in folder.iterdir()) == [
        "law.safetensors",
        "shared.safetensors",
        "specialists.json",
    ]


def test_the_trunk_may_be_compressed_or_have_mixtures(
    trunk: Callable[[], PreTrainedModel], tmp_path: Path
) -> None:
    model = trunk()
    tn.compress(
        model,
        tn.CompressionConfig(bits_per_weight=4.25, formats=("int4",), method="nearest"),
        progress=False,
    )
    th.save(model, tmp_path / "int4")
    mixture = trunk()
    th.upcycle(mixture, share="base", experts=2, rank=2, progress=False)
    th.save(mixture, tmp_path / "mixture")
    for name in ("int4", "mixture"):
        s = th.specialists(th.load(tmp_path / name).eval(), rank=RANK)
        randomized(s, "law")
        expected = logits(s, "law")
        back = th.load_specialists(s.save(tmp_path / f"s-{name}"))
        assert torch.equal(logits(back, "law"), expected)
        with pytest.raises(TargetError, match="Adapters are attached"):
            th.save(back.model, tmp_path / "wrong")


def test_other_trunks_and_damaged_folders_are_refused(
    trunk: Callable[[], PreTrainedModel], tmp_path: Path
) -> None:
    s = th.specialists(trunk(), rank=RANK)
    with pytest.raises(TargetError, match="no specialist to save"):
        s.save(tmp_path / "s")
    randomized(s, "law", "code")
    folder = s.save(tmp_path / "s")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "note.txt").write_text("mine")
    with pytest.raises(DestinationError, match="not a folder of specialists"):
        s.save(tmp_path / "other", force=True)
    with pytest.raises(FormatError, match="not a folder of specialists"):
        th.load_specialists(tmp_path / "other")
    with pytest.raises(TargetError, match="has no specialist perl"):
        th.load_specialists(folder, names=["perl"])
    other = GPT2LMHeadModel(trunk().config)
    before = list(other.state_dict())
    with pytest.raises(TargetError, match="of another trunk"):
        th.load_specialists(folder, other)
    assert list(other.state_dict()) == before
    assert th.load_specialists(folder, other, check_trunk=False).names == ["law", "code"]
    half = trunk().to(torch.bfloat16)  # a rounded trunk is the same trunk
    assert th.load_specialists(folder, half).names == ["law", "code"]
    small = GPT2LMHeadModel(type(other.config)(n_layer=1, n_embd=32, n_head=2, vocab_size=64))
    with pytest.raises(TargetError, match="of another trunk"):
        th.load_specialists(folder, small)


def damaged(folder: Path, **entries: Any) -> Path:
    """Replace entries of the description of a folder."""
    file = folder / "specialists.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))
    return folder


def test_a_file_that_changed_is_refused(trunk: Callable[[], PreTrainedModel], tmp_path: Path) -> None:
    s = th.specialists(trunk(), rank=RANK)
    randomized(s, "law", "code")
    folder = s.save(tmp_path / "s")
    for name in ("code", "shared"):
        file = folder / f"{name}.safetensors"
        kept = file.read_bytes()
        for content in (kept[:-64] + bytes(64), kept[:-64], b"x"):
            file.write_bytes(content)
            with pytest.raises(FormatError, match=f"{name}.safetensors"):
                th.load_specialists(folder, trunk())
        file.write_bytes(kept)
    # Files of specialists with other shared cores do not fit either.
    s.shared_parameters()[0].data += 1
    s.tensors("code")["transformer.h.0.mlp.c_fc.core_1"].data += 1
    newer = s.save(tmp_path / "newer")
    for name in ("code", "shared"):
        (folder / f"{name}.safetensors").write_bytes((newer / f"{name}.safetensors").read_bytes())
        with pytest.raises(FormatError, match="was changed since"):
            th.load_specialists(folder, trunk())


def test_every_weight_of_the_trunk_is_compared(trunk: Callable[[], PreTrainedModel], tmp_path: Path) -> None:
    s = th.specialists(trunk(), rank=RANK, target_modules="*.mlp.*")
    randomized(s, "law")
    folder = s.save(tmp_path / "s")
    for name in (
        "transformer.wte",
        "transformer.h.0.attn.c_attn",
        "transformer.h.1.mlp.c_fc",
        "transformer.ln_f",
    ):
        other = trunk()
        weight = other.get_submodule(name).weight.data
        weight.flatten()[-8:] *= 1.1  # the last numbers, not the first ones
        with pytest.raises(TargetError, match=f"of another trunk.*{name}"):
            th.load_specialists(folder, other)
    attached = th.load_specialists(folder, trunk())
    assert weight_digests(attached.model) == weight_digests(trunk())


@pytest.mark.parametrize(
    "wrong",
    [
        {"format_version": 99},
        {"format_version": "1"},
        *(
            {key: value}
            for key in ("weights", "layers", "specialists")
            for value in (1, "x", [], ["a"], None)
        ),
        *({key: value} for key in ("shared", "trunk") for value in (1, [], {})),
        {"layers": {"transformer.h.0.mlp.c_fc": 1}},
        {"layers": {"transformer.h.0.mlp.c_fc": {"topology": [], "shared": ["0"]}}},
        {"weights": {"x": 1}},
        {"specialists": {"law": {"file": "law.safetensors"}}},
        {"specialists": {"../law": "0"}},
        {"specialists": {}},
    ],
    ids=str,
)
def test_a_wrong_description_is_one_error(
    wrong: dict[str, Any], trunk: Callable[[], PreTrainedModel], tmp_path: Path
) -> None:
    s = th.specialists(trunk(), rank=RANK, target_modules="*.mlp.c_fc")
    randomized(s, "law")
    folder = damaged(s.save(tmp_path / "s"), **wrong)
    for read in (th.load_specialists, inspect_specialists):
        with pytest.raises(FormatError, match="damaged, or of another version"):
            read(folder)


def test_entries_of_a_layer_are_checked(trunk: Callable[[], PreTrainedModel], tmp_path: Path) -> None:
    s = th.specialists(trunk(), rank=RANK, target_modules="*.mlp.c_fc")
    randomized(s, "law")
    folder = s.save(tmp_path / "s")
    layers = json.loads((folder / "specialists.json").read_text())["layers"]
    name = next(iter(layers))
    for changed in (
        {"shared": ["9"]},
        {"shared": "02"},
        {"shared": [0, 2]},
        {"owner": "x"},
        {"owner": 1},
        {"topology": None},
    ):
        damaged(folder, layers={**layers, name: {**layers[name], **changed}})
        with pytest.raises(FormatError, match="damaged"):
            th.load_specialists(folder, trunk())
