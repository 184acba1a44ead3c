"""Files are written completely or not at all, and headers of safetensors files are read strictly."""

from __future__ import annotations

import itertools
import json
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
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
    plan = tn.plan(
        torch.nn.Sequential(torch.nn.Linear(8, 8)), tn.CompressionConfig(topology_options={"max_bond": 2})
    )
    path = tmp_path / "plan.json"
    plan.save(path)
    before = path.read_bytes()

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(DestinationError, match=r"The plan.*No space left"):
        plan.save(path)
    assert path.read_bytes() == before
    assert [x.name for x in tmp_path.iterdir()] == ["plan.json"]
    with pytest.raises(DestinationError, match="name a file"):
        plan.save(tmp_path / "none" / "plan.json")


def test_tensors_that_cannot_be_written_say_so_as_other_files_do(tmp_path: Path) -> None:
    for what, error in ((None, OSError), ("The file", DestinationError)):
        with pytest.raises(error):
            write_tensors(tmp_path / "none" / "x", {"x": torch.ones(2)}, what=what)


def test_a_name_that_occurs_twice(tmp_path: Path) -> None:
    """The safetensors package takes the last of the two."""
    entry = json.dumps({"dtype": "F32", "shape": [1], "data_offsets": [0, 4]})
    (tmp_path / "x").write_bytes(header_of(f'{{"a":{entry},"a":{entry}}}', b"0000"))
    with pytest.raises(FormatError, match="occurs twice"):
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
    with pytest.raises(FormatError, match="both store 'x'"):
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
    with atomic.new_folder(tmp_path / "x", force=True) as folder:
        (folder / "other").write_text("2")
    assert [x.name for x in (tmp_path / "x").iterdir()] == ["other"]


def replace_folder(target: Path) -> None:
    with atomic.new_folder(target, force=True) as folder:
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


def test_a_folder_that_appears_during_the_work_is_not_replaced(tmp_path: Path) -> None:
    def write() -> None:
        with atomic.new_folder(tmp_path / "x") as folder:
            (folder / "file").write_text("new")
            (tmp_path / "x").mkdir()
            (tmp_path / "x" / "file").write_text("old")

    with pytest.raises(DestinationError, match="exists"):
        write()
    assert (tmp_path / "x" / "file").read_text() == "old"
    assert [x.name for x in tmp_path.iterdir()] == ["x"]


def test_a_file_that_appears_during_the_work_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "x"

    def write(what: str | None) -> None:
        path.unlink(missing_ok=True)
        with atomic.new_file(path, what=what, force=False) as partial:
            partial.write_text("new")
            path.write_text("old")

    for what, error in ((None, FileExistsError), ("The model", DestinationError)):
        with pytest.raises(error, match="exists"):
            write(what)
    assert path.read_text() == "old"
    assert [x.name for x in tmp_path.iterdir()] == ["x"]


def together(count: int, work: Callable[[int], None]) -> list[Exception | None]:
    """Call a function in several threads that start at once, and return the error of each call."""
    errors: list[Exception | None] = [None] * count
    barrier = threading.Barrier(count)

    def run(number: int) -> None:
        barrier.wait()
        try:
            work(number)
        except Exception as error:
            errors[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


@pytest.mark.parametrize("force", [False, True])
def test_threads_that_write_one_folder(tmp_path: Path, force: bool) -> None:
    """Without force one of them succeeds; with force all do. No files of two runs are mixed."""

    def write(number: int) -> None:
        with atomic.new_folder(tmp_path / "x", force=force) as folder:
            (folder / "a").write_text(str(number))
            (folder / "b").write_text(str(number))

    errors = together(8, write)
    succeeded = [str(number) for number, error in enumerate(errors) if error is None]
    assert len(succeeded) == (8 if force else 1), errors
    assert all(isinstance(error, DestinationError) for error in errors if error is not None)
    a, b = ((tmp_path / "x" / name).read_text() for name in "ab")
    assert a == b
    assert a in succeeded
    assert [x.name for x in tmp_path.iterdir()] == ["x"]


def test_threads_that_save_to_one_file(tmp_path: Path) -> None:
    models = [torch.nn.Linear(64, 64) for _ in range(8)]
    path = tmp_path / "model.safetensors"
    assert together(8, lambda number: tn.save_model(models[number], path)) == [None] * 8
    found = tn.load_model(torch.nn.Linear(64, 64), path).weight
    assert any(torch.equal(found, model.weight) for model in models)
    assert [x.name for x in tmp_path.iterdir()] == [path.name]


def test_writing_through_links(tmp_path: Path) -> None:
    """The link stays, and its target has the new content."""
    for name in ("real", "links"):
        (tmp_path / name).mkdir()
    for kind in ("file", "folder", "missing"):
        (tmp_path / "links" / kind).symlink_to(tmp_path / "real" / kind)
    (tmp_path / "real" / "file").write_text("old")
    (tmp_path / "real" / "folder").mkdir()
    atomic.write_file(tmp_path / "links" / "file", [b"new"])
    for kind in ("folder", "missing"):
        with atomic.new_folder(tmp_path / "links" / kind) as folder:
            (folder / "x").write_text("new")
    assert all(link.is_symlink() for link in (tmp_path / "links").iterdir())
    assert (tmp_path / "real" / "file").read_text() == "new"
    assert [(tmp_path / "real" / kind / "x").read_text() for kind in ("folder", "missing")] == ["new"] * 2


@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_permissions_follow_the_umask(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        tn.save_model(model, tmp_path / "model")
        tn.calibrate(model, [torch.randn(64, 8)], loss_fn=lambda m, x: m(**x).square().sum(-1)).save(
            tmp_path / "statistics"
        )
        with atomic.new_folder(tmp_path / "folder") as folder:
            write_tensors(folder / "model", {"x": torch.ones(2)})
    finally:
        os.umask(before)
    for path in tmp_path.rglob("*"):
        expected = (0o777 if path.is_dir() else 0o666) & ~mask
        assert stat.S_IMODE(path.stat().st_mode) == expected, path


def killed_after(renames: int, target: Path) -> None:
    """Replace a folder in a process that is killed after so many renames."""
    program = f"""
import os, shutil, signal
from pathlib import Path
import tensornet.io as atomic
rename, remove, done = Path.rename, shutil.rmtree, []
def killed():
    if len(done) == {renames}:
        os.kill(os.getpid(), signal.SIGKILL)
def counted(self, target):
    killed()
    done.append(rename(self, target))
    return done[-1]
def never(*arguments, **options):
    killed()
    remove(*arguments, **options)
Path.rename, shutil.rmtree = counted, never
with atomic.new_folder(Path({str(target)!r}), force=True) as folder:
    (folder / "file").write_text("new")
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="there is no SIGKILL")
@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_folder_survives_a_killed_process(earlier: Path, renames: int) -> None:
    """The first rename moves the old folder, the second one places the new folder."""
    killed_after(renames, earlier)
    aside = atomic.moved_aside(earlier)
    if renames == 1:
        assert not earlier.exists()
        assert (aside / "file").read_text() == "old"
        with pytest.warns(UserWarning, match="restored"):
            atomic.restore(earlier)
    assert (earlier / "file").read_text() == ("new" if renames == 2 else "old")
    remains = sorted(x.suffix for x in earlier.parent.iterdir() if x != earlier)
    assert remains == {0: [".old", ".partial"], 1: [".partial"], 2: [".old"]}[renames]
    with pytest.warns(UserWarning, match="interrupted"):
        replace_folder(earlier)
    assert (earlier / "file").read_text() == "new"
