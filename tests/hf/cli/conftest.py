"""The program in this process, and small folders of encoders and classifiers."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertModel, BertTokenizerFast
from transformers.utils import logging

from tensornet_hf.cli.main import run

Run = Callable[..., tuple[int, str, str]]
WORDS = ["rain", "sun", "cat", "kitten", "falls", "shines", "a", "the", "wet", "warm"]


@pytest.fixture
def tensornet(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Run]:
    """Run the program in an empty folder: status, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()

    def call(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        status = run([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return status, out, err

    yield call
    logging.set_verbosity(verbosity)  # the program sets both for its whole process
    if bars:
        logging.enable_progress_bar()


def _folder(kind: type, folder: Path) -> Path:
    folder.mkdir()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (folder / "vocab.txt").write_text("\n".join([*special, *WORDS]))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(special) + len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        initializer_range=0.4,  # layers that matter
        id2label={0: "dry", 1: "wet"},
        label2id={"dry": 0, "wet": 1},
    )
    kind(config).eval().save_pretrained(folder)
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random encoder with a tokenizer of ten words."""
    return _folder(BertModel, tmp_path_factory.mktemp("encoder") / "encoder")


@pytest.fixture(scope="session")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random classifier with the same tokenizer."""
    return _folder(BertForSequenceClassification, tmp_path_factory.mktemp("classifier") / "classifier")
