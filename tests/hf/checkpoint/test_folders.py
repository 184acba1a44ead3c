"""Folders and repositories are written completely or not at all, and nothing that was there is lost."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import huggingface_hub
import pytest
from hf_models import ARCHITECTURES, logits
from huggingface_hub.utils import filter_repo_objects
from safetensors import SafetensorError
from transformers import PreTrainedModel

import tensornet as tn
import tensornet_hf as th
from tensornet.errors import DestinationError, FormatError
from tensornet_hf.checkpoint import check_free, save, write_folder
from tensornet_hf.embedded import gpt2_path

GPT2 = ARCHITECTURES["gpt2"]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def write_and_fail(target: Path, failure: Exception, *, force: bool = False) -> None:
    with write_folder(target, force=force) as folder:
        (folder / "half").write_text("half")
        raise failure


@pytest.fixture
def old_model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "old").write_text("old")
    return folder


@pytest.mark.parametrize("force", [False, True])
def test_an_error_leaves_nothing_and_loses_nothing(tmp_path: Path, old_model: Path, force: bool) -> None:
    target = old_model if force else tmp_path / "new"
    before = contents(tmp_path)
    with pytest.raises(ZeroDivisionError):
        write_and_fail(target, ZeroDivisionError(), force=force)
    assert contents(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_existing_destination_is_refused_unless_forced(old_model: Path) -> None:
    for refuse in (check_free, lambda path: write_folder(path).__enter__()):
        with pytest.raises(DestinationError, match=r"exists already.*force"):
            refuse(old_model)
    assert contents(old_model).keys() == {"config.json", "old"}
    with write_folder(old_model, force=True) as folder:
        (folder / "a").write_text("a")
    assert contents(old_model.parent) == {"model/a": b"a"}


def test_what_is_no_model_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    with pytest.raises(DestinationError, match="model folder"):
        check_free(tmp_path / "home", force=True)
    with pytest.raises(DestinationError, match="is a file"):
        check_free(tmp_path / "file", force=True)
    (tmp_path / "empty").mkdir()
    check_free(tmp_path / "empty")  # as `mkdtemp` leaves it


def test_the_source_is_never_replaced(old_model: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(old_model)
    for target in (old_model, link, tmp_path):
        with pytest.raises(DestinationError, match="contains the source"):
            check_free(target, force=True, sources=(old_model,))


def test_the_working_directory_is_never_replaced(
    tmp_path: Path, old_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", old_model):
        monkeypatch.chdir(folder)
        for target in (".", folder, tmp_path):
            with pytest.raises(DestinationError, match="working directory"):
                th.save(GPT2.compressed, target, force=True)
        assert Path("x").absolute().parent == folder


#: Save a model of a given seed once the file `go` exists.
WRITER = """
import sys, time
from pathlib import Path
import torch, tensornet_hf as th
from tensornet.errors import DestinationError
model, place, number = th.load(th.embedded.gpt2_path()), Path(sys.argv[1]), int(sys.argv[2])
with torch.no_grad():
    model.transformer.wpe.weight.fill_(number)
(place / f"ready{number}").touch()
while not (place / "go").exists():
    time.sleep(0.001)
try:
    th.save(model, place / "model")
    print("saved")
except DestinationError as error:
    print("refused" if "exists" in str(error) else error)
"""


def number_in(folder: Path) -> int:
    return int(th.load(folder).transformer.wpe.weight[0, 0])


@pytest.mark.slow
def test_one_of_two_processes_saves_and_the_other_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    runs = [subprocess.Popen([*command, str(number)], stdout=subprocess.PIPE, text=True) for number in (1, 2)]
    while not all((tmp_path / f"ready{number}").exists() for number in (1, 2)):
        assert all(run.poll() is None for run in runs)
        time.sleep(0.01)
    (tmp_path / "go").touch()
    said = [run.communicate(timeout=600)[0].strip() for run in runs]
    assert sorted(said) == ["refused", "saved"]
    assert number_in(tmp_path / "model") == said.index("saved") + 1
    assert not list(tmp_path.glob(".*"))


def test_a_model_saved_during_the_work_is_not_replaced(tmp_path: Path) -> None:
    def write(target: Path, other: str, *, force: bool) -> None:
        with write_folder(target, force=force) as folder:
            (folder / "config.json").write_text("{}")
            target.mkdir()
            (target / other).write_text("other")

    with pytest.raises(DestinationError, match="exists"):
        write(tmp_path / "model", "config.json", force=False)
    with pytest.raises(DestinationError, match="model folder"):
        write(tmp_path / "home", "thesis.tex", force=True)
    assert contents(tmp_path) == {"model/config.json": b"other", "home/thesis.tex": b"other"}


def test_a_model_that_a_killed_run_moved_aside(tmp_path: Path, old_model: Path) -> None:
    aside = tmp_path / ".model.1-00000000.old"
    aside.mkdir()
    old_model.rename(aside / "model")
    with pytest.raises(FormatError, match=re.escape(str(aside))):
        th.load(old_model)
    with (
        pytest.warns(UserWarning, match="restored"),
        pytest.raises(DestinationError, match="exists"),
    ):
        check_free(old_model)
    assert contents(tmp_path) == {"model/config.json": b"{}", "model/old": b"old"}
    assert not aside.exists()


def test_full_disk(tmp_path: Path) -> None:
    failure = SafetensorError("I/O error: No space left on device")  # which names no file
    with pytest.raises(DestinationError, match="No space left"):
        write_and_fail(tmp_path / "model", failure)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_full_disk_while_a_model_is_saved(tmp_path: Path) -> None:
    """A limit on the size of files makes the write of the weights fail for real."""
    ARCHITECTURES["gpt2"].compressed.save_pretrained(tmp_path / "source")
    before = contents(tmp_path)
    code = f"""
import resource, tensornet as tn, tensornet_hf as th
model = th.load({str(tmp_path / "source")!r})
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    th.save(model, {str(tmp_path / "small")!r}, source={str(tmp_path / "source")!r})
except tn.errors.DestinationError as error:
    raise SystemExit(0 if "failed" in str(error) else f"unclear: {{error}}")
raise SystemExit("no error")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path) == before


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DestinationError, match="Cannot write"), write_folder(tmp_path / "file" / "model"):
        pass


def test_save_model_copies_what_belongs_to_the_model(tmp_path: Path) -> None:
    architecture = ARCHITECTURES["gpt2"]
    source = tmp_path / "source"
    architecture.dense.save_pretrained(source)
    kept, left = {"tokenizer.json", "vocab.txt", "LICENSE", "chat_template.jinja"}, {"code.py", "README.md"}
    for name in kept | left | {"pytorch_model.bin", "model.safetensors.index.json"}:
        (source / name).write_text(name)
    before = contents(source)
    model = architecture.compressed
    assert th.save(model, tmp_path / "small", source=source) == tmp_path / "small"
    assert contents(source) == before
    got = contents(tmp_path / "small")
    written = {"config.json", "generation_config.json", "model.safetensors", "README.md"}
    assert got.keys() == kept | written
    assert b"import tensornet_hf" in got["README.md"]
    found = logits(th.load(tmp_path / "small"), architecture)
    assert found.allclose(logits(model, architecture), rtol=1e-4, atol=1e-4)
    with pytest.raises(DestinationError, match="exists already"):
        th.save(model, tmp_path / "small", source=source)
    th.save(th.decompress(model), tmp_path / "small", source=source, force=True)
    assert "README.md" not in contents(tmp_path / "small")  # an ordinary model again


# --- folders of sentence encoders ------------------------------------------------------------------------


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """As sentence-transformers writes it: the model, and modules in folders of their own."""
    folder = tmp_path / "encoder"
    GPT2.dense.save_pretrained(folder)
    modules = [{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]
    (folder / "modules.json").write_text(json.dumps(modules))
    for name in ("1_Pooling", "2_Dense", "unnamed"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(f'"{name}"')
    (folder / "2_Dense" / "model.safetensors").write_bytes(b"weights")
    (folder / "2_Dense" / "pytorch_model.bin").write_bytes(b"pickle")
    return folder


def test_modules_of_sentence_encoders_are_copied(encoder: Path, tmp_path: Path) -> None:
    made = th.save(th.load(encoder), tmp_path / "made", source=encoder)
    names = {path.relative_to(made).as_posix() for path in made.rglob("*") if path.parent != made}
    assert names == {"1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"}
    assert (made / "2_Dense" / "model.safetensors").read_bytes() == b"weights"
    for content in ("[1]", '[{"path": "../.."}]', "{"):
        (encoder / "modules.json").write_text(content)
        with pytest.raises(FormatError, match=r"list of modules|outside"):
            th.save(th.load(encoder), tmp_path / "other", source=encoder)
    assert not (tmp_path / "other").exists()


# --- the hub ---------------------------------------------------------------------------------------------


@dataclass
class Hub:
    """The functions of the hub's client that are used; a name without an owner belongs to `me`."""

    files: dict[str, set[str]] = field(default_factory=dict)
    upload_error: Exception | None = None

    def repo_exists(self, repo_id: str) -> bool:
        return repo_id in self.files

    def create_repo(self, repo_id: str, *, exist_ok: bool = False) -> huggingface_hub.RepoUrl:
        name = repo_id if "/" in repo_id else f"me/{repo_id}"
        if name in self.files and not exist_ok:
            raise RuntimeError("409 Conflict: You already created this model repo")
        self.files.setdefault(name, set())
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{name}")

    def upload_folder(
        self, *, repo_id: str, folder_path: Path, delete_patterns: list[str] | None = None
    ) -> None:
        if self.upload_error is not None:
            raise self.upload_error
        there = self.files[repo_id]
        if delete_patterns is not None:
            there -= set(filter_repo_objects(list(there), allow_patterns=delete_patterns))
        there |= {path.name for path in folder_path.iterdir()}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub()
    for name in ("repo_exists", "create_repo", "upload_folder"):
        monkeypatch.setattr(huggingface_hub, name, getattr(hub, name))
    return hub


@pytest.fixture
def model() -> PreTrainedModel:
    return ARCHITECTURES["gpt2"].dense


def test_a_failed_upload_can_be_repeated(hub: Hub, model: PreTrainedModel, tmp_path: Path) -> None:
    hub.upload_error = OSError("network down\nand much more")
    with pytest.raises(DestinationError, match="hf://new: network down"):
        save(model, "hf://new", source=tmp_path)
    assert hub.files == {"me/new": set()}
    hub.upload_error = None
    save(model, "hf://new", source=tmp_path, force=True)
    assert hub.files["me/new"] >= {"config.json", "model.safetensors"}


@pytest.mark.parametrize("name", ["me/old", "old"])
def test_a_repository_that_exists_is_not_replaced_unasked(
    hub: Hub, model: PreTrainedModel, tmp_path: Path, name: str
) -> None:
    """Nor where the name of its owner is left out and the first look does not find it."""
    hub.files["me/old"] = {"config.json"}
    hub.upload_error = OSError("network down")
    with pytest.raises(DestinationError, match=r"exists already|409 Conflict"):
        save(model, f"hf://{name}", source=tmp_path)
    with pytest.raises(DestinationError, match="network down"):
        save(model, f"hf://{name}", source=tmp_path, force=True)
    assert hub.files == {"me/old": {"config.json"}}


def test_weights_of_the_model_before_are_replaced(hub: Hub, model: PreTrainedModel, tmp_path: Path) -> None:
    shards = {f"model-0000{k}-of-00002.safetensors" for k in (1, 2)} | {"model.safetensors.index.json"}
    others = {"pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5", "onnx/model.onnx"}
    kept = {".gitattributes", "LICENSE", "README.md", "tokenizer.json"}
    hub.files["me/old"] = shards | others | kept
    save(model, "hf://me/old", source=tmp_path, force=True)
    assert hub.files["me/old"] == kept | {"config.json", "generation_config.json", "model.safetensors"}


def test_a_compressed_folder_is_uploaded_complete(hub: Hub, tmp_path: Path) -> None:
    config = tn.CompressionConfig(topology_options={"max_bond": 4}, method="svd", target_modules="c_fc")
    done = th.compress_folder(gpt2_path(), "hf://me/new", config)
    assert done.file_bytes_after >= done.model_bytes_after
    assert done.destination == "hf://me/new"
    assert hub.files["me/new"] >= {"config.json", "model.safetensors", "tokenizer.json", "README.md"}
    with pytest.raises(DestinationError, match="me/new exists already"):
        th.compress_folder(gpt2_path(), "hf://me/new", config)
    with pytest.raises(DestinationError, match="not an address"):
        th.compress_folder(gpt2_path(), "hf://a/b/c", config)
