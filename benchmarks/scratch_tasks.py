"""Text and model for moe_from_scratch.py: several texts as tokens, and a GPT-2.

The texts are from Debian packages, unpacked but not installed (see `subjects.py` for the command):
`postgresql-doc-17`, `linux-doc-6.12`, `python3.13-doc`, `debian-handbook`, `fortunes` and `bible-kjv` with
`bible-kjv-text`. They are split by document into parts for training, tuning and testing. A paragraph that
occurs in several documents is kept only in the first, so that no paragraph is in several parts.
"""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

sys.path.insert(0, str(Path(__file__).parent))
from mpoe_tasks import read_quotations
from scratch_rows import KINDS, Row, Sizes
from subjects import plain_text
from train_embedded import read_chapters

END = "<|end|>"
#: Folders with HTML pages under `usr/share/doc`; pages in other languages are skipped.
PAGES = ("postgresql-doc-17/html", "linux-doc-6.12/html", "python3.13/html", "debian-handbook/html/en-US")
FOREIGN, QUOTATIONS_A_DOCUMENT, SHORTEST_REPEAT = "translations", 50, 60
PARTS = ("train", "tune", "test")


@dataclass(frozen=True)
class Corpus:
    """Text of the three parts as tokens.

    Args:
        parts: by name in `PARTS`, token indices of shape `(tokens,)`; an end token follows each document.
        vocabulary: number of distinct tokens.
        characters: number of characters in the training part, to convert losses per token to losses per
            character.
    """

    parts: dict[str, Tensor]
    vocabulary: int
    characters: int

    @property
    def fingerprint(self) -> str:
        """Digest of the vocabulary and all tokens."""
        digest = hashlib.sha256(str(self.vocabulary).encode())
        for name in PARTS:
            digest.update(self.parts[name].numpy().tobytes())
        return digest.hexdigest()[:16]

    def batch(self, step: int, *, windows: int, context: int, seed: int) -> Tensor:
        """Return the training batch of a step; it depends only on step and seed, so that runs can resume.

        Every pass over the text uses each window once, in another random order.

        Args:
            step: number of the step.
            windows: number of windows in a batch.
            context: number of tokens that the model reads.
            seed: seed of the order.

        Returns:
            Token indices, shape `(windows, context + 1)`.
        """
        stream = self.parts["train"]
        count = (len(stream) - 1) // context
        first = step * windows
        picked = []
        while len(picked) < windows:
            turn, place = divmod(first + len(picked), count)
            order = _order(count, seed, turn)
            picked += order[place : place + windows - len(picked)]
        return torch.stack([stream[i * context : (i + 1) * context + 1] for i in picked])

    def windows(self, part: str, *, context: int, limit: int) -> Tensor:
        """Return up to `limit` evenly spread windows of a part, shape `(windows, context + 1)`."""
        stream = self.parts[part]
        count = (len(stream) - 1) // context
        picked = torch.linspace(0, count - 1, min(limit, count)).long().tolist()
        return torch.stack([stream[i * context : (i + 1) * context + 1] for i in picked])


_ORDERS: dict[tuple[int, int, int], list[int]] = {}


def _order(count: int, seed: int, turn: int) -> list[int]:
    key = (count, seed, turn)
    if key not in _ORDERS:
        _ORDERS.clear()
        generator = torch.Generator().manual_seed(1_000 * seed + turn)
        _ORDERS[key] = torch.randperm(count, generator=generator).tolist()
    return _ORDERS[key]


def load_corpus(texts: Path, cache: Path, *, vocabulary: int) -> Corpus:
    """Read the corpus from the cache, or make it from the unpacked packages.

    Args:
        texts: folder in which the packages were unpacked.
        cache: folder in which the documents, and a tokenizer and tokens for each vocabulary, are stored.
        vocabulary: number of tokens of the byte-level BPE.
    """
    stored = cache / f"tokens-{vocabulary}.pt"
    if not stored.is_file():
        documents = _stored_documents(texts, cache)
        tokenizer = train_tokenizer(documents["train"], vocabulary)
        tokenizer.save(str(cache / f"tokenizer-{vocabulary}.json"))
        parts = {name: _encode(tokenizer, documents[name]) for name in PARTS}
        characters = sum(map(len, documents["train"]))
        torch.save({"parts": parts, "vocabulary": vocabulary, "characters": characters}, stored)
    return Corpus(**torch.load(stored))


def corpus_of(text: str, *, vocabulary: int) -> Corpus:
    """Make a small corpus for tests from one text, whose paragraphs are the documents."""
    documents = split(text.split("\n\n"), every=8)
    tokenizer = train_tokenizer(documents["train"], vocabulary)
    parts = {name: _encode(tokenizer, documents[name]) for name in PARTS}
    return Corpus(parts, vocabulary, sum(map(len, documents["train"])))


def split(documents: Iterable[str], *, every: int = 40) -> dict[str, list[str]]:
    """Split documents into parts for training, tuning and testing.

    Of `every` consecutive documents, one is for tuning and one for testing. All others are for training, in
    random order.
    """
    parts: dict[str, list[str]] = {name: [] for name in PARTS}
    for i, document in enumerate(documents):
        place = {3: "tune", every // 2 + 3: "test"}.get(i % every, "train")
        parts[place].append(document)
    random.Random(0).shuffle(parts["train"])
    return parts


def train_tokenizer(documents: Iterable[str], vocabulary: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer with one special token, for the end of a document."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def _encode(tokenizer: Tokenizer, documents: list[str]) -> Tensor:
    end = tokenizer.token_to_id(END)
    ids: list[int] = []
    for encoding in tokenizer.encode_batch_fast(documents):
        ids += [*encoding.ids, end]
    return torch.tensor(ids, dtype=torch.int16)


def _stored_documents(texts: Path, cache: Path) -> dict[str, list[str]]:
    file = cache / "documents.json"
    if not file.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(split(_distinct(_documents(texts)))))
    stored: dict[str, list[str]] = json.loads(file.read_text())
    return stored


def _documents(texts: Path) -> Iterator[str]:
    """Yield all documents (pages, chapters, groups of quotations) in the same order on all machines."""
    for folder in PAGES:
        root = texts / "usr" / "share" / "doc" / folder
        pages = [p for p in sorted(root.rglob("*.html")) if FOREIGN not in p.relative_to(root).parts]
        if not pages:
            raise SystemExit(f"No pages under {root}; see the docstring of {Path(__file__).name}.")
        for page in pages:
            yield plain_text(page.read_text(encoding="utf-8", errors="replace"))
    quotations = read_quotations(texts / "usr" / "share" / "games" / "fortunes")
    every = [*quotations["train"], *quotations["tune"], *quotations["test"]]
    for start in range(0, len(every), QUOTATIONS_A_DOCUMENT):
        yield "\n\n".join(every[start : start + QUOTATIONS_A_DOCUMENT])
    yield from read_chapters(_bible(texts))


def _bible(texts: Path) -> Path:
    """Save the text that the Debian package `bible-kjv` prints, for train_embedded.py."""
    data = texts / "usr" / "lib"  # the reader looks for its data in the current folder
    command = [str((texts / "usr" / "bin" / "bible").resolve()), "-f", "Gen1:1-Rev22:21"]
    verses = subprocess.run(command, cwd=data, check=True, capture_output=True, text=True).stdout
    file = texts / "kjv.txt"
    file.write_text(verses)
    return file


def _distinct(documents: Iterable[str]) -> Iterator[str]:
    """Remove repeated long paragraphs from documents, and skip documents that are then nearly empty."""
    seen: set[str] = set()
    for document in documents:
        kept = []
        for block in document.split("\n\n"):
            if len(block) >= SHORTEST_REPEAT:
                if block in seen:
                    continue
                seen.add(block)
            kept.append(block)
        text = "\n\n".join(kept)
        if len(text) >= 4 * SHORTEST_REPEAT:
            yield text


def build_gpt2(row: Row, sizes: Sizes, seed: int) -> GPT2LMHeadModel:
    """Build the model of a row; models of one seed differ only in their feed-forward networks."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=sizes.vocabulary,
        n_positions=sizes.context,
        n_embd=sizes.width,
        n_inner=sizes.hidden,
        n_layer=sizes.layers,
        n_head=sizes.heads,
        initializer_range=sizes.width**-0.5 / 2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    model = GPT2LMHeadModel(config)
    networks, owner = KINDS[row.kind](row, sizes, torch.Generator().manual_seed(seed + 1))
    if owner is not None:
        model.add_module("owner", owner)
    for block, network in zip(model.transformer.h, networks, strict=True):
        block.mlp = network
    return model


def cross_entropy(model: nn.Module, batch: Tensor) -> Tensor:
    """Compute the mean cross entropy of the next token in nats for windows `(windows, context + 1)`."""
    ids = batch.long()
    logits = model(input_ids=ids[:, :-1]).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def gpt2_networks(model: nn.Module) -> list[nn.Module]:
    return [block.mlp for block in model.get_submodule("transformer.h").children()]
