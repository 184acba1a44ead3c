"""Files are written completely or not at all, and headers of safetensors files are read strictly."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

import tensornet as tn
import tensornet.io as atomic
from tensornet.errors import DestinationError, FormatError
from tensornet.io import read_header, read_headers, write_tensors


def header_of(text: str, data: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text.encode() + data


def test_a_file_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "x"
    atomic.write_file(path, [b"old"])

    def chunks():
        yield b"ne"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        atomic.write_file(path, chunks())
    assert path.read_bytes() == b"old"
    assert [x.name for x in tmp_path.iterdir()] == ["x"]
    written = atomic.write_file(path, [b"ne", b"w"])
    assert path.read_bytes() == b"new"
    assert written == atomic.file_digest(path)
    assert atomic.intact(path, written)
    path.write_bytes(b"now")
    assert not atomic.intact(path, written)


def test_a_plan_stays_until_the_new_one_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = tn.plan(torch.nn.Sequential(torch.nn.Linear(8, 8)), tn.CompressionConfig(max_bond=2))
    path = tmp_path / "plan.json"
    plan.save(path)
    before = path.read_bytes()

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(DestinationError, match=r"The plan cannot be written to .*No space left"):
        plan.save(path)
    assert path.read_bytes() == before
    assert [x.name for x in tmp_path.iterdir()] == ["plan.json"]
    with pytest.raises(DestinationError, match="name a file in a folder that exists"):
        plan.save(tmp_path / "none" / "plan.json")


def test_tensors_that_cannot_be_written_say_so_as_other_files_do(tmp_path: Path) -> None:
    for what, error in ((None, OSError), ("The file", DestinationError)):
        with pytest.raises(error):
            write_tensors(tmp_path / "none" / "x", {"x": torch.ones(2)}, what=what)


def test_a_name_that_occurs_twice(tmp_path: Path) -> None:
    """The safetensors package takes the last of the two."""
    entry = json.dumps({"dtype": "F32", "shape": [1], "data_offsets": [0, 4]})
    (tmp_path / "x").write_bytes(header_of(f'{{"a":{entry},"a":{entry}}}', b"0000"))
    with pytest.raises(FormatError, match="truncated or damaged: a name occurs twice in its header"):
        read_header(tmp_path / "x")


def test_every_dtype_is_located(tmp_path: Path) -> None:
    """Elements of 4 bits included, which torch cannot hold."""
    text = (
        '{"half":{"dtype":"F4","shape":[4],"data_offsets":[0,2]},'
        '"b":{"dtype":"BOOL","shape":[1,1],"data_offsets":[2,3]}}'
    )
    (tmp_path / "x").write_bytes(header_of(text, b"abc"))
    found = read_header(tmp_path / "x")
    data = (tmp_path / "x").read_bytes()
    assert {name: data[x.start : x.stop] for name, x in found.items()} == {"half": b"ab", "b": b"c"}
    assert (found["half"].dtype, found["b"].shape) == ("F4", (1, 1))


def test_two_files_with_one_name(tmp_path: Path) -> None:
    for name in "ab":
        write_tensors(tmp_path / name, {"x": torch.ones(2)})
    with pytest.raises(FormatError, match=r"b and .*a both store 'x'"):
        read_headers([tmp_path / "a", tmp_path / "b"])


def test_files_that_are_not_there(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(FormatError, match="Cannot read"):
            read_header(path)


def test_a_folder_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    for number in itertools.count():
        try:
            with atomic.new_folder(tmp_path / "x") as folder:
                (folder / "file").write_text(str(number))
                if number == 1:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            break
    assert (tmp_path / "x" / "file").read_text() == "0"
    assert [x.name for x in tmp_path.iterdir()] == ["x"]
    with atomic.new_folder(tmp_path / "x") as folder:
        (folder / "other").write_text("2")
    assert [x.name for x in (tmp_path / "x").iterdir()] == ["other"]


def replace_folder(target: Path) -> None:
    with atomic.new_folder(target) as folder:
        (folder / "file").write_text("new")


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "file").write_text("old")
    return tmp_path / "x"


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize(("renames", "found"), [(0, "old"), (1, "old"), (2, "new")])
def test_a_folder_survives_an_error_beside_either_rename(
    earlier: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], renames: int, found: str
) -> None:
    """After so many renames; an interrupt may come right after a rename that succeeded."""
    rename, done = Path.rename, itertools.count()

    def interrupted(self: Path, target: Path) -> Path:
        if (number := next(done)) == renames == 0:
            raise error
        result = rename(self, target)
        if number + 1 == renames:
            raise error
        return result

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(error):
        replace_folder(earlier)
    assert (earlier / "file").read_text() == found
    assert [x.name for x in earlier.parent.iterdir()] == ["x"]
