"""Describe the folder of a compressed model that transformers loads with this library."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tensornet.io import CHUNK, MAPPED, contents, write_file
from tensornet.nn.unfuse import Compound
from tensornet_hf.checkpoint import CARD, other_files, write_card
from tensornet_hf.file_sink import (
    NAMES,
    Chunks,
    Files,
    Made,
    New,
    PlannedModel,
    chunks_of,
    sharded,
    tensor_bytes,
)
from tensornet_hf.lazy_model import LazyModel, Origin
from tensornet_hf.quantizer import GUARD_SHAPE, config_of, replaced_names


def lay_out_folder(planned: PlannedModel) -> Files:
    """Find out which files and tensors the folder of a planned model will contain.

    Tensors of the source keep their bytes, and so do all files but the configuration and the weights.
    """
    model, lazy = planned.model, planned.lazy
    assert lazy is not None
    before = lazy.model.state_dict()
    after, described = model.state_dict(keep_vars=True), config_of(model)

    # Matrices of an unfused module whose other matrices were replaced are stored one by one.
    copied: dict[str, Chunks] = {
        name: origin.contents for name, origin in lazy.origins.items() if name in after
    }
    for name, compound in model.named_modules():
        for _, _, number, stack in compound.rows() if isinstance(compound, Compound) else ():
            origin = lazy.origins.get(f"{name}.{stack.parameter}")
            full = f"{name}.{stack.names[number]}.matrix"
            if compound.compressed and full not in before and origin is not None:
                copied[full] = partial(
                    _row, origin, number, len(stack.names), stack.columns, stack.transposed
                )

    tensors: dict[str, tuple[str, tuple[int, ...], int]] = {}
    for name, x in after.items():
        if name not in described.ties and (name not in before or name in copied):
            tensors[name] = stored_form(lazy, name, x)
    for name in replaced_names(before, after, described.layers):
        tensors[name] = NAMES[lazy.model.dtype], GUARD_SHAPE, 0
    for name, part in lazy.others.items():
        tensors[name] = part.dtype, part.shape, part.nbytes
        copied[name] = partial(contents, [part])
    copied = {name: x for name, x in copied.items() if name in tensors}
    dtypes = {name: dtype for name, (dtype, _, _) in tensors.items()}
    made = []
    for layer, names in planned.targets.items():
        own = [x for x in tensors if x.startswith(f"{names[0]}.") and x not in copied]
        made.append(Made((layer,), tuple(own), partial(_new_tensors, layer, names, dtypes)))

    def complete(folder: Path) -> None:
        source = lazy.source
        others = other_files(source.folder)
        for name in others:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            with (source.folder / name).open("rb") as opened:
                write_file(folder / name, iter(partial(opened.read, CHUNK), b""))
        entry = {"quantization_config": described.to_dict()} if planned.targets else {}
        content = {**source.config, **entry}
        text = json.dumps(content, indent=2, sort_keys=True) + "\n"
        write_file(folder / "config.json", [text.encode()])
        if CARD not in others and planned.targets:
            write_card(folder, type(model).__name__)

    return Files(sharded(tensors, planned.max_shard_bytes), made, copied, complete)


def _new_tensors(layer: str, names: tuple[str, ...], dtypes: dict[str, str], new: New) -> dict[str, Chunks]:
    pairs: list[tuple[str, nn.Module]] = list(zip(names, new[layer], strict=True))
    tensors = {f"{name}.{key}": x for name, module in pairs for key, x in module.state_dict().items()}
    return chunks_of(tensors, dtypes)


def stored_form(lazy: LazyModel, name: str, x: Tensor) -> tuple[str, tuple[int, ...], int]:
    """Return the dtype, the shape and the length in bytes of a tensor to write (see `sharded`).

    Args:
        lazy: the dense model.
        name: name of the tensor.
        x: tensor of this shape and, unless it is copied from the source, of this dtype.
    """
    origin = lazy.origins.get(name)
    if origin is None:
        return NAMES[x.dtype], tuple(x.shape), x.nbytes
    if origin.change is None:  # not computed from the dtype, since torch may not have it
        return origin.dtype, tuple(x.shape), sum(part.nbytes for part in origin.parts)
    return origin.dtype, tuple(x.shape), x.numel() * MAPPED[origin.dtype].itemsize


def _row(origin: Origin, number: int, count: int, columns: int, transposed: bool) -> Iterator[Any]:
    """Yield the bytes of one of the matrices that a tensor contains (see `StackedMatrices`)."""
    matrix = origin.read(number, count).reshape(-1, columns)
    yield from tensor_bytes(matrix.T if transposed else matrix)()
