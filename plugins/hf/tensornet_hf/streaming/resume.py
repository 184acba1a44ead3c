"""Resume an interrupted run from its journal, with every piece verified by checksum."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

import tensornet as tn
from tensornet.errors import FormatError
from tensornet.io import Written, intact
from tensornet.streaming.worker import Piece
from tensornet_hf.streaming.journal import Staging
from tensornet_hf.streaming.source import Mark, Source, check_unchanged, digest

JOURNAL_VERSION = 1


@dataclass(frozen=True)
class Past:
    """Finished work of an interrupted run.

    Args:
        pieces: layers by name.
        shards: files of weights by name, with the keys of the parts they hold.
    """

    pieces: Mapping[str, Piece]
    shards: Mapping[str, tuple[Written, list[str]]]

    def entries(self) -> list[dict[str, Any]]:
        """Return the lines of the journal for this work."""
        shards = [
            {"file": name, "sha256": written.sha256, "nbytes": written.nbytes, "parts": keys}
            for name, (written, keys) in self.shards.items()
        ]
        return [*({"piece": piece.to_dict()} for piece in self.pieces.values()), *shards]


def identity(source: Source, options: Mapping[str, Any]) -> dict[str, Any]:
    """Describe everything that the work depends on, for the first line of a journal.

    Args:
        source: read from.
        options: everything else that decides the bytes of the result.
    """
    return {
        "version": JOURNAL_VERSION,
        "library": f"tensornet {tn.__version__}, torch {torch.__version__}",
        "options": digest(options),
        "marks": {name: list(mark) for name, mark in source.marks.items()},
    }


def take_over(work: Staging, me: Mapping[str, Any], source: Source) -> Past:
    """Read the journal of an interrupted run, keep verified pieces and delete the rest.

    Raises:
        FormatError: the source changed since then, or the run had other options or library versions.
    """
    first, *entries = work.entries() or [{}]
    if not first:
        work.clear()
        return Past({}, {})
    marks = first.get("marks")
    if first.get("version") != JOURNAL_VERSION or not isinstance(marks, dict):
        raise FormatError(f"{work.journal} is damaged or of another version. Start again with resume=False.")
    check_unchanged(
        source, {name: _mark(value) for name, value in marks.items()}, since="the interrupted run"
    )
    for key, what in (("options", "other options"), ("library", "other versions of the library")):
        if first.get(key) != me[key]:
            raise FormatError(
                f"The interrupted run in {work.folder} had {what}. Repeat them to continue it, or start "
                "again with resume=False (--no-resume)."
            )
    shards = dict(filter(None, (_shard(entry, work) for entry in entries)))
    covered = {key for _, keys in shards.values() for key in keys}
    pieces = {}
    for entry in entries:
        piece = _piece(entry, work)
        if piece is not None and (piece.plan.name in covered or _there(piece, work)):
            pieces[piece.plan.name] = piece
    return Past(pieces, shards)


def _piece(entry: Mapping[str, Any], work: Staging) -> Piece | None:
    if "piece" not in entry:
        return None
    try:
        return Piece.from_dict(entry["piece"], work.pieces)
    except FormatError:
        return None  # done again


def _shard(entry: Mapping[str, Any], work: Staging) -> tuple[str, tuple[Written, list[str]]] | None:
    name, keys = entry.get("file"), entry.get("parts")
    if not isinstance(name, str) or not isinstance(keys, list):
        return None
    written = Written(name, entry.get("nbytes", -1), entry.get("sha256", ""))
    return (name, (written, keys)) if intact(work.out / name, written) else None


def _there(piece: Piece, work: Staging) -> bool:
    return piece.written is None or intact(work.pieces / piece.written.name, piece.written)


def _mark(value: Any) -> Mark | None:
    return tuple(value) if isinstance(value, list) and len(value) == 3 else None
