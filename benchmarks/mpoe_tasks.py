"""Tasks for mpoe_vs_switch.py, in which the two models of this package are fine-tuned on quotations.

The text is that of the Debian packages `fortunes` and `fortunes-min`: files with 14,646 quotations, separated
by lines with `%`. Any machine with apt can download and unpack the packages; they are not installed:

    apt-get download fortunes fortunes-min && for f in fortunes*.deb; do dpkg-deb -x $f texts; done
    # then --text texts/usr/share/games/fortunes

The text is split by quotation, so that no judged phrase occurs in training.
"""

from __future__ import annotations

import copy
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from tensornet_hf.embedded import gpt2_path, t5_path

sys.path.insert(0, str(Path(__file__).parent))
from train_embedded import sample_phrases, strip_vowels, verse_words

CONTEXT = 128
PICTURES = ("art", "ascii-art", "translate-me")  # files with drawings or other languages, which are skipped


#: Quotations in three parts: `train` for training, `tune` for choosing learning rates, `test` for results.
Quotations = dict[str, list[str]]


def fetch(cache: Path) -> Path:
    """Return the folder of the quotations; download them with apt if they are not in the cache."""
    folder = cache / "texts" / "usr" / "share" / "games" / "fortunes"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", "fortunes", "fortunes-min"], cwd=cache, check=True)
        for package in cache.glob("fortunes*.deb"):
            subprocess.run(["dpkg-deb", "-x", str(package), str(cache / "texts")], check=True)
    return folder


def read_quotations(folder: Path) -> Quotations:
    """Read and split the quotations of a folder.

    Raises:
        SystemExit: no quotation is found.
    """
    files = [p for p in sorted(folder.glob("*")) if p.is_file() and not p.is_symlink() and not p.suffix]
    texts = [p.read_text(encoding="utf-8", errors="replace") for p in files if p.name not in PICTURES]
    found = [q for text in texts for q in text.split("\n%\n")]
    if len(found) < 20:
        raise SystemExit(
            f"{len(found)} quotations under {folder}; see the docstring of {Path(__file__).name}"
        )
    return divided(found)


def divided(found: Sequence[str]) -> Quotations:
    """Split distinct quotations into parts: of every twenty, one is for tuning and two are for testing."""
    distinct = list(dict.fromkeys(q.strip() for q in found if q.strip()))
    place = {3: "tune", 7: "test", 17: "test"}
    quotations: Quotations = {"train": [], "tune": [], "test": []}
    for i, quotation in enumerate(distinct):
        quotations[place.get(i % 20, "train")].append(quotation)
    for part in quotations.values():
        random.Random(0).shuffle(part)
    return quotations


class LanguageModelling:
    """GPT-2, trained on the King James Bible and fine-tuned on quotations.

    Args:
        quotations: the text.
        train_size: number of tokens for training.
        judge_size: number of tokens for testing; half as many are for tuning.
        batch: number of windows of 128 tokens in a batch.
    """

    name, d_model, d_ff = "gpt2", 128, 512

    def __init__(self, quotations: Quotations, *, train_size: int, judge_size: int, batch: int) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(gpt2_path())
        self.dense = AutoModelForCausalLM.from_pretrained(gpt2_path())
        self.batch = batch
        self.train = self._stream(quotations["train"], train_size)
        self.parts = {
            "tune": self._stream(quotations["tune"], judge_size // 2),
            "test": self._stream(quotations["test"], judge_size),
        }

    def _stream(self, quotations: Sequence[str], count: int) -> Tensor:
        encode = self.tokenizer.backend_tokenizer.encode
        ids: list[int] = []
        for quotation in quotations:
            ids += [self.tokenizer.eos_token_id, *encode(f"{quotation}\n\n").ids]
            if len(ids) >= count:
                break
        return torch.tensor(ids[: max(count, CONTEXT)])

    def model(self) -> nn.Module:
        return copy.deepcopy(self.dense)

    def batches(self, seed: int) -> Iterator[dict[str, Tensor]]:
        """Yield training batches endlessly, with windows at another offset in each pass over the text."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            offset = int(torch.randint(min(CONTEXT, len(self.train) - CONTEXT + 1), (), generator=generator))
            count = (len(self.train) - offset) // CONTEXT
            windows = self.train[offset : offset + count * CONTEXT].view(count, CONTEXT)
            for rows in torch.randperm(count, generator=generator).split(self.batch):
                yield {"input_ids": windows[rows], "labels": windows[rows]}

    def judge(self, part: str) -> list[tuple[dict[str, Tensor], int]]:
        """Split a part of the text into batches of disjoint windows, with the number of predicted tokens."""
        stream = self.parts[part]
        windows = stream[: len(stream) // CONTEXT * CONTEXT].view(-1, CONTEXT).split(16)
        return [({"input_ids": w, "labels": w}, len(w) * (CONTEXT - 1)) for w in windows]


class VowelRestoration:
    """T5, trained to restore vowels in the King James Bible and fine-tuned on quotations.

    Args:
        quotations: the text.
        train_size: number of distinct phrases of two or three words for training.
        judge_size: number of phrases for testing; half as many are for tuning.
        batch: number of phrases in a batch.
    """

    name, d_model, d_ff = "t5", 96, 384

    def __init__(self, quotations: Quotations, *, train_size: int, judge_size: int, batch: int) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(t5_path())
        self.dense = AutoModelForSeq2SeqLM.from_pretrained(t5_path())
        self.batch = batch
        self.train = phrases(quotations["train"], train_size)
        self.parts = {
            "tune": phrases(quotations["tune"], judge_size // 2),
            "test": phrases(quotations["test"], judge_size),
        }

    def model(self) -> nn.Module:
        return copy.deepcopy(self.dense)

    def batches(self, seed: int) -> Iterator[dict[str, Tensor]]:
        """Yield training batches endlessly; phrases in a batch have similar lengths, which saves padding."""
        rng = random.Random(seed)
        while True:
            order = sorted(self.train, key=lambda phrase: (len(phrase), rng.random()))
            cuts = list(range(0, len(order), self.batch))
            rng.shuffle(cuts)
            for cut in cuts:
                yield self.encode(order[cut : cut + self.batch])

    def encode(self, targets: Sequence[str]) -> dict[str, Tensor]:
        """Make a batch from phrases: without vowels they are the inputs, with vowels the labels."""
        inputs = self.tokenizer([strip_vowels(t) for t in targets], padding=True, return_tensors="pt")
        labels = self.tokenizer(list(targets), padding=True, return_tensors="pt").input_ids
        return {
            "input_ids": inputs.input_ids,
            "attention_mask": inputs.attention_mask,
            "labels": labels.masked_fill(labels == self.tokenizer.pad_token_id, -100),
        }

    def judge(self, part: str) -> list[tuple[dict[str, Tensor], int]]:
        """List the batches of a part, each with its number of predicted tokens."""
        order = sorted(self.parts[part], key=len)
        batches = [self.encode(order[i : i + 100]) for i in range(0, len(order), 100)]
        return [(batch, int((batch["labels"] >= 0).sum())) for batch in batches]


def phrases(quotations: Sequence[str], count: int) -> list[str]:
    """Return up to `count` distinct phrases of two or three neighbouring words."""
    words = verse_words(["\n".join(" ".join(q.split()) for q in quotations)])
    drawn = sample_phrases(words, 4 * count, random.Random(1))
    return [p for p in dict.fromkeys(drawn) if " " in p][:count]


#: Task on which the rows of a table are trained and judged.
Task = LanguageModelling | VowelRestoration
