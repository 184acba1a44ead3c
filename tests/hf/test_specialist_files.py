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
        tn.CompressionConfig(bits_per_weight=4.25, formats=("int4",), objective="weight"),
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

    s.shared_parameters()[0].data += 1
    newer = s.save(tmp_path / "newer")
    (folder / "code.safetensors").write_bytes((newer / "code.safetensors").read_bytes())
    with pytest.raises(FormatError, match="trained with other shared cores"):
        th.load_specialists(folder, trunk())
    (folder / "shared.safetensors").write_bytes((newer / "shared.safetensors").read_bytes())
    with pytest.raises(FormatError, match="somebody trained the"):
        th.load_specialists(folder, trunk())
    (newer / "law.safetensors").write_bytes(b"x")
    with pytest.raises(FormatError, match="missing or damaged"):
        th.load_specialists(newer, trunk())
    description = json.loads((newer / "specialists.json").read_text())
    (newer / "specialists.json").write_text(json.dumps({**description, "format_version": 99}))
    with pytest.raises(FormatError, match="another version"):
        th.load_specialists(newer, trunk())
