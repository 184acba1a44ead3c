"""Damaged model folders: `tensornet_hf.load` gives a model or a `FormatError`, whatever was changed."""

from __future__ import annotations

import json
import random
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hf_models import gpt2
from transformers.utils import logging

import tensornet as tn
import tensornet_hf as th
from tensornet.errors import FormatError, NonFiniteError

#: Mutations that are tried.
COUNT = 300
ODD: list[Any] = [
    None,
    True,
    0,
    -1,
    7,
    2**40,
    2**70,
    0.5,
    "",
    "x",
    [],
    {},
    [1],
    {"x": 1},
    "1e999",
    float("inf"),
]


def entries(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all entries of a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from entries(inner, (*path, key))


def mutate_json(text: bytes, rng: random.Random) -> bytes:
    """One entry removed, replaced, renamed or repeated."""
    content = json.loads(text)
    path = rng.choice([*entries(content)])
    holder = content
    for key in path[:-1]:
        holder = holder[key]
    key = path[-1]
    match rng.randrange(4):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[f"{key}x"] = holder.pop(key)
        case 2 if isinstance(holder[key], int) and not isinstance(holder[key], bool):
            holder[key] += rng.choice([-1, 1, 1000])
        case _:
            holder[key] = rng.choice(ODD)
    return json.dumps(content).encode()


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Some bytes flipped, cut off, left out or put in."""
    where = rng.randrange(len(data))
    match rng.randrange(4):
        case 0:
            return data[:where]
        case 1:
            return data[:where] + data[where + rng.randrange(1, 9) :]
        case 2:
            return data[:where] + rng.randbytes(rng.randrange(1, 9)) + data[where:]
        case _:
            changed = bytearray(data)
            for _ in range(rng.randrange(1, 4)):
                changed[rng.randrange(len(data))] = rng.randrange(256)
            return bytes(changed)


def mutate_header(data: bytes, rng: random.Random) -> bytes:
    """An entry of a safetensors header changed, its length kept true."""
    length = int.from_bytes(data[:8], "little")
    header = mutate_json(data[8 : 8 + length], rng)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def mutate(folder: Path, rng: random.Random) -> str:
    """Change one file of a folder at random; returns which, and how."""
    file = rng.choice(["config.json", "config.json", "model.safetensors", "generation_config.json"])
    path, data = folder / file, (folder / file).read_bytes()
    forms = [mutate_bytes, mutate_header if path.suffix == ".safetensors" else mutate_json]
    form = rng.choice(forms)
    path.write_bytes(form(data, rng))
    return f"{file} by {form.__name__}"


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_damaged_folders(part: int, tmp_path: Path) -> None:
    model = gpt2()
    config = tn.CompressionConfig(topology="low_rank", param_ratio=0.7, objective="weight", pivoted=True)
    tn.compress(model, config, progress=False)
    model.save_pretrained(tmp_path / "good")
    good = tmp_path / "good"
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    escaped = []
    try:
        for seed in range(part * COUNT // 10, (part + 1) * COUNT // 10):
            shutil.rmtree(tmp_path / "bad", ignore_errors=True)
            shutil.copytree(good, tmp_path / "bad")
            what = mutate(tmp_path / "bad", random.Random(seed))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    th.load(tmp_path / "bad")
                except (FormatError, NonFiniteError):
                    pass
                except Exception as error:
                    escaped.append(f"{seed}: {what}: {type(error).__name__}: {error!s:.200}")
    finally:
        logging.set_verbosity(verbosity)
    assert not escaped
