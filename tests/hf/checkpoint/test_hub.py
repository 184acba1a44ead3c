"""Uploads: a repository that exists is replaced on request only, and keeps no weights of the old model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import huggingface_hub
import pytest
from hf_models import ARCHITECTURES
from huggingface_hub.utils import filter_repo_objects
from transformers import PreTrainedModel

from tensornet.errors import DestinationError
from tensornet_hf.checkpoint import save


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
    with pytest.raises(DestinationError, match=r"^Cannot upload to hf://new: network down\. .*force=True"):
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
