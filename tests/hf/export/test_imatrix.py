"""Importance matrices: another reader finds the same numbers, and bad files are refused by name."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch

from tensornet.errors import FormatError
from tensornet_hf.imatrix import Importance, read_imatrix, write_imatrix

pytestmark = pytest.mark.slow  # needs the extra `gguf`


def entries() -> dict[str, Importance]:
    torch.manual_seed(0)
    return {
        "blk.0.attn_q.weight": Importance(torch.rand(1, 32), torch.tensor([640])),
        "blk.0.ffn_up_exps.weight": Importance(torch.rand(4, 32), torch.tensor([7, 100, 1, 320])),
    }


@pytest.mark.parametrize("suffix", ["gguf", "dat"])
def test_other_programs_read_the_same(suffix: str, tmp_path: Path) -> None:
    import libgguf

    file = tmp_path / f"im.{suffix}"
    write_imatrix(file, entries(), source="text.txt")
    found, back = libgguf.load_imatrix(file), read_imatrix(file)
    assert found.keys() == entries().keys() == back.keys()
    for name, (squares, counts) in entries().items():
        assert torch.allclose(torch.from_numpy(found[name]), squares.flatten(), rtol=1e-6)
        assert torch.allclose(back[name].squares.flatten(), squares.flatten(), rtol=1e-6)
        assert suffix == "dat" or torch.equal(back[name].counts, counts)


def test_the_metadata_are_those_of_llama_imatrix(tmp_path: Path) -> None:
    import gguf

    write_imatrix(tmp_path / "im.gguf", entries(), source="text.txt", chunk_size=64)
    reader = gguf.GGUFReader(tmp_path / "im.gguf")
    found = {name: x.contents() for name, x in reader.fields.items() if not name.startswith("GGUF.")}
    assert found == {
        "general.type": "imatrix",
        "imatrix.datasets": ["text.txt"],
        "imatrix.chunk_count": 10,
        "imatrix.chunk_size": 64,
    }
    shapes = {x.name: tuple(map(int, x.shape)) for x in reader.tensors}
    assert shapes["blk.0.ffn_up_exps.weight.in_sum2"] == (32, 4)
    assert shapes["blk.0.ffn_up_exps.weight.counts"] == (1, 4)


def test_a_legacy_file_of_llama_cpp(tmp_path: Path) -> None:
    """The layout in words: entries; length and name, calls, numbers, sums of means; then the last chunk."""
    name, values = b"blk.0.attn_q.weight", [8.0, 16.0, 24.0]
    data = struct.pack("<i", 1) + struct.pack("<i", len(name)) + name + struct.pack("<ii", 8, 3)
    (tmp_path / "im.dat").write_bytes(data + struct.pack("<3f", *values) + struct.pack("<i", 8))
    (squares, counts) = read_imatrix(tmp_path / "im.dat")["blk.0.attn_q.weight"]
    assert squares.tolist() == [[1.0, 2.0, 3.0]]
    assert counts.tolist() == [8]


def test_bad_files(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.gguf", tmp_path / "bad"
    write_imatrix(good, entries(), source="text.txt")
    legacy = tmp_path / "im.dat"
    write_imatrix(legacy, entries(), source="text.txt")
    for data in (good.read_bytes()[:300], legacy.read_bytes()[:100], b"", b"some text that is no matrix"):
        bad.write_bytes(data)
        with pytest.raises(FormatError, match="bad is not an importance matrix"):
            read_imatrix(bad)
    name = b"blk.0.attn_q.weight"
    for size in (-5, -1, 0):  # the last integers are the number of chunks and the length of the text's name
        bad.write_bytes(struct.pack("<ii", 1, len(name)) + name + struct.pack("<iiii", 8, size, 8, 0))
        with pytest.raises(FormatError, match=f"has {size} numbers"):
            read_imatrix(bad)
    with pytest.raises(FormatError, match="Cannot read"):
        read_imatrix(tmp_path / "absent.gguf")
    worse = {"blk.0.attn_q.weight": Importance(torch.tensor([[1.0, -1.0]]), torch.tensor([2]))}
    write_imatrix(bad, worse, source="")
    with pytest.raises(FormatError, match=r"blk\.0\.attn_q\.weight.*negative"):
        read_imatrix(bad)


def test_a_model_is_no_importance_matrix(tmp_path: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "model.gguf", arch="llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(FormatError, match=r"general\.type"):
        read_imatrix(tmp_path / "model.gguf")
