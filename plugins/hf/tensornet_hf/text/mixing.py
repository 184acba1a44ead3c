"""Texts of several sources as one, in which any beginning holds about as much of each."""

from collections.abc import Iterator, Sequence

#: Characters of one text at a time: some windows of a model, and a small part of what calibration reads.
PIECE = 6_000


def mix_texts(texts: Sequence[str]) -> str:
    r"""Take pieces of texts by turns, cut at ends of lines, until all are used up.

    Args:
        texts: one or more; a single one comes back as it is.

    Example:
        >>> from tensornet_hf.text.mixing import PIECE, mix_texts
        >>> mixed = mix_texts(["a" * 3 * PIECE, "b"])
        >>> mixed[0], mixed[PIECE : PIECE + 5]
        ('a', '\nb\naa')
    """
    if len(texts) == 1:
        return texts[0]
    left = [_pieces(text) for text in texts]
    found = []
    while left:
        running = []
        for pieces in left:
            piece = next(pieces, None)
            if piece is not None:
                found.append(piece)
                running.append(pieces)
        left = running
    return "".join(found)


def _pieces(text: str) -> Iterator[str]:
    """Cut a text behind the first end of a line after every `PIECE` characters; in very long lines there."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + PIECE, start + 2 * PIECE)
        stop = start + PIECE if end < 0 else end + 1
        stop = len(text) if end < 0 and len(text) <= start + 2 * PIECE else min(stop, len(text))
        piece = text[start:stop]
        yield piece if piece.endswith("\n") else piece + "\n"
        start = stop
