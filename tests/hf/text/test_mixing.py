"""Several texts as one: nothing is lost, and any beginning holds about as much of each."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from tensornet_hf.text import PIECE, mix_texts

#: Texts of lines that are short or longer than a piece, with and without an end of the last line.
LINES = st.lists(st.sampled_from([1, 40, PIECE - 1, PIECE, 3 * PIECE]), min_size=1, max_size=12)


def text(letter: str, lengths: list[int], *, ended: bool) -> str:
    return "\n".join(letter * length for length in lengths) + ("\n" if ended else "")


@given(st.lists(LINES, min_size=2, max_size=3), st.booleans())
def test_every_line_is_kept_in_its_order(several: list[list[int]], ended: bool) -> None:
    letters = "abc"[: len(several)]
    mixed = mix_texts([text(a, x, ended=ended) for a, x in zip(letters, several, strict=True)])
    for letter, lengths in zip(letters, several, strict=True):
        assert mixed.count(letter) == sum(lengths)
        short = [len(line) for line in mixed.split("\n") if line[:1] == letter and len(line) < PIECE - 1]
        assert Counter(short)[40] >= lengths.count(40)  # no short line is cut
    assert all(len(set(line)) <= 1 for line in mixed.split("\n") if len(line) < PIECE)


def test_a_beginning_holds_as_much_of_each() -> None:
    mixed = mix_texts([(letter * 79 + "\n") * 2_000 for letter in "ab"])
    for size in (3 * PIECE, 10 * PIECE, 20 * PIECE):
        seen = Counter(mixed[:size])
        assert abs(seen["a"] - seen["b"]) <= 1.1 * PIECE


def test_one_text_stays_as_it_is_and_a_long_one_goes_on_alone() -> None:
    assert mix_texts(["no end"]) == "no end"
    mixed = mix_texts(["a" * 10 * PIECE, "b"])
    assert mixed[PIECE : PIECE + 4] == "\nb\na"
    assert mixed.endswith("a\n")
