"""Mutated files of every format that is read: only our own errors come out, and nothing large is made.

Address space is limited while the inputs are read, so an allocation that a file asks for by a wild number
ends in a MemoryError, which is not one of our errors, and the test fails.
"""

from __future__ import annotations

import json
import random
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from folder_runs import compress_files
from hf_models import gpt2
from pivoted_plans import pivoted
from sharded_folders import save

import tensornet as tn
import tensornet_hf as th
from tensornet.errors import TensorNetError
from tensornet.io import read_header, read_headers, write_tensors
from tensornet_hf.checkpoint import Checkpoint, read_checkpoint, read_compression
from tensornet_hf.lazy_model import open_lazily
from tensornet_hf.quantizer import check_layers

HEADERS, DESCRIPTIONS, PLANS, FOLDERS = 1_500, 1_000, 600, 150
#: Room for what a process of this size needs to read small files.
ROOM = 512 * 2**20

INTERESTING = [
    0, 1, -1, 2**31, 2**53, 2**63, 2**64, -(2**63), 10**30, 1e308, float("inf"), float("nan"), True, None,
    "", "a", "..", "/etc/passwd", "\0", "ä", "core_0", "weight", "tensornet", "9" * 50,
    [], [[]], [0] * 50, {}, {"a": []},
]  # fmt: skip


def mutate_bytes(data: bytes, draw: random.Random) -> bytes:
    """Flip, cut, insert, repeat: a few small damages."""
    made = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 5))):
        place = draw.randrange(len(made) + 1)
        kind = draw.randrange(6)
        if kind == 0 and place < len(made):
            made[place] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del made[place : place + draw.choice((1, 2, 8, 100))]
        elif kind == 2:
            made[place:place] = draw.choice((b"[" * 5000, b"{}", b'"', b"9" * 5000, b"\xff", b"-", b"1e999"))
        elif kind == 3:
            made[place:place] = made[place : place + 50]
        elif kind == 4:
            made[: min(8, len(made))] = draw.choice((2**64 - 1, 2**40, 10**8, 0, 7)).to_bytes(8, "little")
        elif place < len(made):
            made[place] = draw.randrange(256)
    return bytes(made)


def mutate_json(content: Any, draw: random.Random) -> Any:
    """A copy in which one entry, somewhere, is replaced, removed, doubled or renamed."""
    made = json.loads(json.dumps(content))
    node, path = made, []
    while isinstance(node, dict | list) and node and (not path or draw.random() < 0.8):
        key = draw.choice(list(node)) if isinstance(node, dict) else draw.randrange(len(node))
        path.append((node, key))
        node = node[key]
    if not path:
        return draw.choice(INTERESTING)
    parent, key = path[-1]
    kind = draw.randrange(5)
    if kind == 0:
        del parent[key]
    elif kind == 1 and isinstance(parent, dict):
        parent[str(draw.choice(INTERESTING))] = parent.pop(key)
    elif kind == 2 and isinstance(parent, list):
        parent.append(parent[key])
    elif kind == 3 and isinstance(node, int):
        parent[key] = draw.choice((-node, node + 1, node * 2**40, float(node), str(node)))
    else:
        parent[key] = draw.choice(INTERESTING)
    return made


@contextmanager
def limited_memory(extra: int) -> Iterator[None]:
    """Let the address space of this process grow by at most so many bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + extra, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def attack(read: Callable[[Any], object], inputs: Iterator[Any]) -> tuple[int, int]:
    """Read every input.

    Returns:
        How many were accepted and refused.
    """
    accepted, messages = 0, []
    with limited_memory(ROOM):
        for given in inputs:
            try:
                read(given)
                accepted += 1
            except TensorNetError as error:
                messages.append(str(error))
            except Exception as error:
                raise AssertionError(f"{type(error).__name__}: {error} from {given!r:.2000}") from error
    assert max(map(len, messages), default=0) < 20_000, max(messages, key=len)[:3000]
    return accepted, len(messages)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """In memory where there is such a place: tens of thousands of files are slow on a disk."""
    memory = Path("/dev/shm")
    if not memory.is_dir():
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as made:
        yield Path(made)


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    config = tn.CompressionConfig(target_modules=["wte", "h.1.mlp.c_fc"], topology="mpo", param_ratio=0.7)
    compress_files(save("gpt2", folder / "dense", shard="1GB"), folder / "out", config)
    return folder / "out"


def test_safetensors_headers(folder: Path) -> None:
    path, draw = folder / "x.safetensors", random.Random(1)
    write_tensors(path, {"a.weight": torch.ones(3, 4), "b": torch.ones(5).half(), "ä": torch.ones(())})
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])

    def inputs() -> Iterator[bytes]:
        for number in range(HEADERS):
            if number % 2:
                yield mutate_bytes(whole, draw)
            else:
                text = json.dumps(mutate_json(header, draw)).encode()
                yield len(text).to_bytes(8, "little") + text + whole[8 + length :]

    def read(data: bytes) -> None:
        path.write_bytes(data)
        for part in read_header(path).values():
            assert 8 <= part.start <= part.stop <= len(data)
        read_headers([path])

    accepted, refused = attack(read, inputs())
    assert refused > HEADERS / 2
    assert accepted > 50  # the mutations are not all nonsense


def test_configurations_of_whole_models(compressed: Path, folder: Path) -> None:
    """The class of the model is built from the numbers, on the meta device."""
    draw, tensors = random.Random(8), read_header(compressed.parent / "dense" / "model.safetensors")
    whole = json.loads((compressed.parent / "dense" / "config.json").read_text())

    def read(content: Any) -> None:
        (folder / "config.json").write_text(json.dumps(content))
        open_lazily(Checkpoint(folder, content, None, tensors))

    dicts = (made for _ in range(150) if isinstance(made := mutate_json(whole, draw), dict))
    accepted, refused = attack(read, dicts)
    assert refused > 30
    assert accepted > 30


def test_descriptions_of_compressed_layers(compressed: Path) -> None:
    draw, tensors = random.Random(3), read_checkpoint(compressed).tensors
    whole = json.loads((compressed / "config.json").read_text())["quantization_config"]

    def read(entry: Any) -> None:
        compression = read_compression({"quantization_config": entry})
        if compression is not None:
            check_layers(compression, tensors, where="here")

    accepted, refused = attack(read, (mutate_json(whole, draw) for _ in range(DESCRIPTIONS)))
    assert refused > DESCRIPTIONS / 2
    assert accepted > 50


def test_plans(folder: Path) -> None:
    draw, path = random.Random(6), folder / "plan.json"
    model = torch.nn.Sequential(torch.nn.Linear(12, 8), torch.nn.Linear(8, 6))
    whole = tn.plan(model, tn.CompressionConfig(topology="mpo", topology_options={"max_bond": 3})).to_dict()

    def read(content: Any) -> None:
        path.write_text(json.dumps(content))
        tn.CompressionPlan.load(path)

    _, refused = attack(read, (mutate_json(whole, draw) for _ in range(PLANS)))
    assert refused > PLANS / 4


def test_names_of_tensors(compressed: Path, folder: Path) -> None:
    """Tensors are matched with parameters by names that anybody may have written."""
    config = json.loads((compressed.parent / "dense" / "config.json").read_text())
    path, draw = folder / "x.safetensors", random.Random(7)
    parts = ["a", "0", "", ".", "..", "weight", "bias", "embed", "lm_head", "_modules", "forward", "ä"]
    for _ in range(100):
        names = {".".join(draw.choices(parts, k=draw.randint(1, 5))) for _ in range(4)}
        write_tensors(path, {name: torch.ones(2, 2) for name in names})
        checkpoint = Checkpoint(compressed.parent / "dense", config, None, read_header(path))
        attack(open_lazily, iter([checkpoint]))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_folders(tmp_path: Path) -> None:
    """Whole folders: a model or one of our errors, whatever was changed in whichever file."""
    model, draw = gpt2(), random.Random(9)
    config = tn.CompressionConfig(topology="low_rank", param_ratio=0.7, method="svd")
    tn.apply_plan(model, pivoted(tn.plan(model, config)))
    model.save_pretrained(tmp_path / "good")
    names = ("config.json", "config.json", "model.safetensors", "generation_config.json")

    def damaged() -> Iterator[str]:
        for number in range(FOLDERS):
            bad = Path(shutil.copytree(tmp_path / "good", tmp_path / f"bad{number}"))
            path = bad / draw.choice(names)
            data = path.read_bytes()
            if path.suffix == ".json" and number % 2:
                path.write_text(json.dumps(mutate_json(json.loads(data), draw)))
            else:
                path.write_bytes(mutate_bytes(data, draw))
            yield str(bad)
            shutil.rmtree(bad)

    accepted, refused = attack(th.load, damaged())
    assert min(accepted, refused) > FOLDERS / 20
