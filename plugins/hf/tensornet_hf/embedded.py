"""Texts and two small trained models that are part of the package.

The models are a GPT-2 of 0.94 million parameters and a T5 of 0.52 million, trained on the King James Bible.
With them the demo and the tests run without network access. A text of many kinds calibrates other models.
`data/README.md` and the `training.json` of each folder describe texts, models and their quality. Every
function raises FileNotFoundError if the package was installed without its data.
"""

import json
from importlib.resources import files
from pathlib import Path
from typing import Literal

__all__ = ["calibration_text", "dialogues", "gpt2_path", "heldout_text", "mixed_text", "t5_pairs", "t5_path"]


def data_path(name: str) -> Path:
    """Return the path of a file or folder within the package's data folder."""
    path = Path(str(files("tensornet_hf") / "data" / name))
    if not path.exists():
        raise FileNotFoundError(
            f"The embedded data {name!r} is missing: expected {path}. Install tensornet-torch again, and not "
            "as a zip file, from which the data cannot be read."
        )
    return path


def gpt2_path() -> Path:
    """Return the folder of the package's GPT-2, for `AutoModelForCausalLM` and `AutoTokenizer`.

    The context is 128 tokens; the language model head is tied to the embedding.

    Example:
        >>> from transformers import AutoTokenizer
        >>> len(AutoTokenizer.from_pretrained(th.embedded.gpt2_path()))
        1024
    """
    return data_path("gpt2")


def t5_path() -> Path:
    """Return the folder of the package's T5, for `AutoModelForSeq2SeqLM` and `AutoTokenizer`.

    The model restores the missing vowels of phrases of one to three words. A token is one character.

    Example:
        >>> from transformers import AutoModelForSeq2SeqLM
        >>> type(AutoModelForSeq2SeqLM.from_pretrained(th.embedded.t5_path())).__name__
        'T5ForConditionalGeneration'
    """
    return data_path("t5")


def calibration_text() -> str:
    """Return text for calibration: about 215 kB of the text on which the models were trained.

    Example:
        >>> len(th.embedded.calibration_text()) > 200_000
        True
    """
    return data_path("calibration.txt").read_text(encoding="utf-8")


def heldout_text() -> str:
    """Return about 100 kB of text that is in neither the training nor the calibration text.

    Example:
        >>> len(th.embedded.heldout_text()) > 90_000
        True
    """
    return data_path("heldout.txt").read_text(encoding="utf-8")


def mixed_text() -> str:
    """Return about 200 kB of text of many kinds: novels, one text in 16 languages, code, documentation.

    Example:
        >>> len(th.embedded.mixed_text().encode()) > 200_000
        True
    """
    return data_path("mixed.txt").read_text(encoding="utf-8")


def dialogues() -> list[list[dict[str, str]]]:
    """Return 38 dialogues of a user and an assistant, as messages for chat templates.

    Example:
        >>> th.embedded.dialogues()[0][0]["role"]
        'user'
    """
    lines = data_path("dialogues.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def t5_pairs(split: Literal["calibration", "heldout"]) -> list[tuple[str, str]]:
    """Return 400 pairs `(source, target)` for the package's T5, such as `("sstr nd", "sister and")`.

    Args:
        split: `"calibration"` (pairs from the training text) or `"heldout"` (pairs from other chapters).

    Raises:
        ValueError: unknown split.

    Example:
        >>> th.embedded.t5_pairs("heldout")[0]
        ('t yr nstrls', 'at your nostrils')
    """
    if split not in ("calibration", "heldout"):
        raise ValueError(f"Unknown split {split!r}: expected 'calibration' or 'heldout'")
    lines = data_path(f"t5_{split}.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return [(record["source"], record["target"]) for record in records]
