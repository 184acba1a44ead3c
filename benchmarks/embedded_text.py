"""The text of the embedded models: chapters, which of them are held out, and phrases without their vowels."""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Sequence
from pathlib import Path

VERSE = re.compile(r"^(\d?[A-Za-z]+)(\d+):(\d+) (.+)$")
WORD = re.compile(r"[a-z']*[a-z]")
ALPHABET = "abcdefghijklmnopqrstuvwxyz '"


@dataclasses.dataclass(frozen=True)
class Split:
    """Whole chapters, one verse per line; `calibration` is a part of `train`, `heldout` is not."""

    train: list[str]
    calibration: list[str]
    heldout: list[str]


def read_chapters(path: Path) -> list[str]:
    """Return the chapters of the file in order, each as its verses joined by newlines.

    Raises:
        ValueError: a line is not `<book><chapter>:<verse> <text>`.
    """
    chapters: dict[tuple[str, str], list[str]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        match = VERSE.match(line)
        if match is None:
            raise ValueError(
                f"{path}, line {number}: expected one verse such as 'Ge1:1 In the beginning', "
                f"got {line[:60]!r}; make the file as the docstring of train_embedded.py says"
            )
        book, chapter, _, text = match.groups()
        chapters.setdefault((book, chapter), []).append(text.strip())
    return ["\n".join(verses) for verses in chapters.values()]


def split_chapters(chapters: Sequence[str]) -> Split:
    """Hold out every 40th chapter, and calibrate on every 20th; no chapter is both."""
    train = [c for i, c in enumerate(chapters) if i % 40 != 7]
    return Split(
        train=train,
        calibration=[c for i, c in enumerate(chapters) if i % 20 == 3],
        heldout=[c for i, c in enumerate(chapters) if i % 40 == 7],
    )


def join_chapters(chapters: Sequence[str]) -> str:
    """Return the chapters separated by blank lines, as GPT-2 sees them in training."""
    return "".join(f"{chapter}\n\n" for chapter in chapters)


def strip_vowels(phrase: str) -> str:
    """Drop a, e, i, o, u from every word; words of vowels alone (`i`, `a`) stay as they are."""
    return " ".join(re.sub("[aeiou]", "", word) or word for word in phrase.split(" "))


def verse_words(chapters: Sequence[str]) -> list[list[str]]:
    """Return the words of every verse of three words or more, in lower case, without punctuation."""
    verses = (WORD.findall(verse.lower()) for chapter in chapters for verse in chapter.split("\n"))
    return [verse for verse in verses if len(verse) >= 3]


def sample_phrases(verses: Sequence[Sequence[str]], count: int, rng: random.Random) -> list[str]:
    """Return `count` phrases of one to three neighbouring words of one verse."""
    # Long verses weigh more, so that every word of the text is about equally likely.
    picked = rng.choices(verses, weights=[len(verse) for verse in verses], k=count)
    phrases = []
    for verse in picked:
        length = rng.randint(1, 3)
        start = rng.randint(0, len(verse) - length)
        phrases.append(" ".join(verse[start : start + length]))
    return phrases


def distinct_pairs(chapters: Sequence[str], count: int, seed: int) -> list[tuple[str, str]]:
    """Return up to `count` distinct (source, target) pairs for evaluation or calibration."""
    phrases = dict.fromkeys(sample_phrases(verse_words(chapters), 4 * count, random.Random(seed)))
    return [(strip_vowels(phrase), phrase) for phrase in list(phrases)[:count]]
