"""Check a written model against its receipt, and its weights against the model that it was made of."""

import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2LMHeadModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.pytorch_utils import Conv1D

from tensornet._util import compact_bytes
from tensornet.compression.plan import CompressionPlan
from tensornet.errors import FormatError, TargetError
from tensornet.io import Slice, load_slice, read_slices
from tensornet.nn.module import NetworkModule, build_module
from tensornet.nn.targets import list_weights
from tensornet.nn.unfuse import unfused
from tensornet_hf.checkpoint import read_checkpoint, resolve_folder
from tensornet_hf.exporters.gguf_converter import (
    WeightSource,
    convert,
    dense_skeleton,
    packages,
    weight_sources,
)
from tensornet_hf.exporters.mlx import EXPERT, name_in_gpt2, name_in_stack
from tensornet_hf.exporters.unpacking import LAYOUTS, written_tensors
from tensornet_hf.lazy_model import LazyModel, open_lazily, read_source
from tensornet_hf.quantizer import is_inside, without_guards
from tensornet_hf.receipts import Digests, Receipt, digests_of, receipt_path, source_paths, written_paths
from tensornet_hf.rotation import rotated_folder

#: Number of names that a message lists.
_NAMED = 5
#: Relative difference of two computations of one error in float32, and error that counts as none.
_SLACK, _NOTHING = 1e-3, 1e-6
#: Number of values that are compared at a time.
_CHUNK = 1 << 22


@dataclass(frozen=True)
class TensorError:
    """Distance of a written tensor from the same tensor of the source.

    Args:
        name: name of the tensor in the file, or of the layer in a folder of this library.
        scheme: how it is stored.
        error: relative Frobenius distance.
        largest: the largest distance that the receipt explains: the error of its layers when they were
            rounded, and 0 for tensors that were not rounded. None if layers were trained afterwards.
    """

    name: str
    scheme: str
    error: float
    largest: float | None

    @property
    def explained(self) -> bool:
        """True if the distance is not larger than the receipt explains."""
        return self.largest is None or self.error <= (1 + _SLACK) * self.largest + _NOTHING


@dataclass(frozen=True)
class Verification:
    """Result of `verify`; all files have the digests of the receipt.

    Args:
        path: the file or folder.
        receipt: the receipt.
        unlisted: files in the folder that the receipt does not list, such as some added later.
        tensors: errors of all tensors, if they were compared with the source.

    Example:
        >>> config = tn.CompressionConfig(formats=("int8",), method="nearest")
        >>> _ = th.compress_folder(th.embedded.gpt2_path(), "eight", config)
        >>> print(th.verify("eight"))
        7 files, 1.50 MB, are those of the receipt
    """

    path: Path
    receipt: Receipt
    unlisted: tuple[str, ...] = ()
    tensors: tuple[TensorError, ...] = ()

    @property
    def unexplained(self) -> tuple[TensorError, ...]:
        """Tensors that are further from the source than the receipt explains."""
        return tuple(x for x in self.tensors if not x.explained)

    def to_dict(self) -> dict[str, Any]:
        """Return a dict for JSON."""
        tensors = [{**asdict(x), "explained": x.explained} for x in self.tensors]
        return {
            "path": str(self.path),
            "files": self.receipt.files,
            "unlisted": self.unlisted,
            "tensors": tensors,
        }

    def __str__(self) -> str:
        files = self.receipt.files
        size = compact_bytes(sum(x["bytes"] for x in files.values()))
        lines = [f"{len(files)} files, {size}, are those of the receipt"]
        if self.unlisted:
            lines.append(f"not in the receipt: {', '.join(self.unlisted)}")
        if self.tensors:
            exact = sum(x.error <= _NOTHING for x in self.tensors)
            lines.append(f"{len(self.tensors)} tensors compared with the source, {exact} of them are equal")
        lines += [
            f"{x.name}: {x.error:.4f} from the source, but its scheme ({x.scheme}) explains {x.largest:.4f}"
            for x in self.unexplained
        ]
        return "\n".join(lines)


def verify(
    path: str | Path, source: str | Path | None = None, *, weights: str | Path | None = None
) -> Verification:
    """Check a written model: each file against the digest in the receipt, each tensor against the source.

    With `source`, one tensor after the other is read from both models, so that neither is in memory. Folders
    of this library, GGUF files, and folders for MLX, GPTQ and compressed-tensors can be compared.

    Args:
        path: a folder or file that `compress_folder` or `export` has written.
        source: folder or hub id of the dense model that the receipt names.
        weights: GGUF file with the weights of the source, as for `compress_folder`.

    Raises:
        FormatError: there is no receipt; the receipt is of other files; a file was changed; the source is not
            the one of the receipt; or tensors are missing.
        TargetError: the receipt has no source, or weights of this target cannot be read back.

    Example:
        >>> config = tn.CompressionConfig(formats=("int8",), method="nearest")
        >>> _ = th.compress_folder(th.embedded.gpt2_path(), "eight", config)
        >>> checked = th.verify("eight", th.embedded.gpt2_path())
        >>> checked.unexplained, max(x.error for x in checked.tensors) < 0.01
        ((), True)
    """
    path = Path(path)
    if not path.exists():
        raise FormatError(f"{path} does not exist.")
    receipt = Receipt.load(path)
    there = written_paths(path)
    if not path.is_dir():  # the receipt also lists the adapter of a file
        there |= {name: path.with_name(name) for name in receipt.files if path.with_name(name).is_file()}
    where = receipt_path(path)
    if path.is_file() and path.name not in receipt.files:
        raise FormatError(f"{where} is the receipt of {', '.join(receipt.files)}, not of {path.name}.")
    if missing := [name for name in receipt.files if name not in there]:
        raise FormatError(f"{where} is the receipt of other files: it lists {_some(missing)}, not in {path}.")
    if changed := _changed(receipt.files, {name: there[name] for name in receipt.files}):
        raise FormatError(
            f"{_some(changed)} changed after {where} was written. Restore or write the model again."
        )
    unlisted = tuple(sorted(there.keys() - receipt.files.keys()))
    tensors: tuple[TensorError, ...] = ()
    if source is not None:
        tensors = tuple(_compared(path, receipt, resolve_folder(source), weights))
    return Verification(path, receipt, unlisted, tensors)


def _changed(expected: Digests, paths: Mapping[str, Path]) -> list[str]:
    """Return the names of files whose length or content is not the expected one."""
    sizes = [name for name, x in paths.items() if x.stat().st_size != expected[name]["bytes"]]
    same = {name: x for name, x in paths.items() if name not in sizes}
    digests = digests_of(same)
    return sizes + [name for name in same if digests[name] != expected[name]]


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{', '.join(names[:_NAMED])}{more}"


@torch.no_grad()
def _compared(
    path: Path, receipt: Receipt, folder: Path, weights: str | Path | None
) -> Iterator[TensorError]:
    """Yield the errors of all tensors.

    Raises:
        FormatError: the source is another one, or tensors are missing.
        TargetError: these weights cannot be read back.
    """
    if receipt.source is None:
        raise TargetError(
            f"The receipt of {path} names no source: the model was in memory when it was written."
        )
    if receipt.target not in (None, "gguf", *LAYOUTS):
        raise TargetError(
            f"Weights of the target {receipt.target} cannot be read back, only those of gguf, "
            f"{', '.join(LAYOUTS)} and folders of this library. Without a source, the digests alone are "
            "checked."
        )
    if receipt.options.get("networks") == "lora":
        raise TargetError("Weights that are divided between a file and its adapter cannot be read back.")
    paths = source_paths(folder, weights)
    names = [x for x in receipt.source_files if x not in paths]
    if names or (names := _changed(receipt.source_files, {x: paths[x] for x in receipt.source_files})):
        raise FormatError(
            f"{folder} is not the source of {path}, which was made of {receipt.source}: {_some(names)} "
            "differ."
        )
    plan = None if receipt.plan is None else CompressionPlan.from_dict(dict(receipt.plan))
    errors = {} if plan is None else {x.name: x.error or 0.0 for x in plan if x.topology is not None}
    schemes = {} if plan is None else {x.name: x.scheme for x in plan}
    trained = any(receipt.options.get(x) for x in ("refine", "heal"))
    with tempfile.TemporaryDirectory() as work:
        if receipt.options.get("rotate"):
            folder, weights = rotated_folder(folder, weights, Path(work)), None
        lazy = open_lazily(read_source(folder, weights))
        if receipt.target is None:
            found = _of_folder(path, lazy, errors, schemes)
        elif receipt.target in LAYOUTS:
            found = _of_packed_folder(path, receipt.target, lazy, errors)
        else:
            found = _of_gguf(path, lazy, folder, errors)
        floor = {"float16": 2**-11, "bfloat16": 2**-8}.get(str(receipt.options.get("dtype")), 0.0)
        for name, scheme, error, largest in found:
            unknown = trained and largest > 0
            yield TensorError(name, scheme, error, None if unknown else max(largest, floor))


def _gap(found: Tensor, expected: Tensor) -> float:
    """Return the relative distance of two tensors, computed in float64, some values at a time."""
    if found.shape != expected.shape:
        return float("inf")
    pairs = zip(found.reshape(-1).split(_CHUNK), expected.reshape(-1).split(_CHUNK), strict=True)
    apart, norm = (
        sum(float((a.double() - b.double()).square().sum()) for a, b in pairs) ** 0.5,
        _norm(expected),
    )
    return apart / norm if norm else float("inf") if apart else 0.0


def _norm(tensor: Tensor) -> float:
    """Return the Frobenius norm, computed in float64, some values at a time."""
    return sum(float(x.double().square().sum()) for x in tensor.reshape(-1).split(_CHUNK)) ** 0.5


def _of_folder(
    path: Path, lazy: LazyModel, errors: Mapping[str, float], schemes: Mapping[str, str]
) -> Iterator[tuple[str, str, float, float]]:
    """Yield name, scheme, error and explained error of the tensors in a folder of this library."""
    checkpoint = read_checkpoint(path)
    stored, compression = without_guards(checkpoint.tensors), checkpoint.compression
    layers = {} if compression is None else compression.layers
    ties = {} if compression is None else compression.ties
    read = set()
    with unfused(lazy.model):
        for target in list_weights(lazy.model):
            if target.name not in layers:
                continue
            made = build_module(layers[target.name], device="meta")
            if not isinstance(made, NetworkModule):
                raise TargetError(f"{target.name} is a mixture, whose weights cannot be read back.")
            names = {key: f"{target.name}.{key}" for key in made.state_dict()}
            parts = {key: stored[ties.get(name, name)] for key, name in names.items()}
            read |= {name for key, name in names.items() if key != "bias"}
            made.load_state_dict({key: load_slice(x) for key, x in parts.items()}, assign=True)
            with lazy.loaded(target.modules, dtype=None):
                error = _gap(made.to_matrix(), target.matrix)
            yield target.name, schemes.get(target.name, "dense"), error, errors.get(target.name, 0.0)
    for name, part in stored.items():
        if name in read or (is_inside(name, layers) and not name.endswith(".bias")):
            continue
        origin = lazy.origins.get(name)
        expected = lazy.others.get(name) if origin is None else origin.read()
        if expected is None:
            raise FormatError(f"{path} has a tensor {name} that the source does not have.")
        values = read_slices([expected]) if isinstance(expected, Slice) else expected
        yield name, part.dtype, _gap(read_slices([part]).reshape(-1), values.reshape(-1)), 0.0


def _of_gguf(
    path: Path, lazy: LazyModel, folder: Path, errors: Mapping[str, float]
) -> Iterator[tuple[str, str, float, float]]:
    """Yield name, type, error and explained error of the tensors in a GGUF file.

    The converter computes what each tensor of the file would be with the weights of the source.
    """
    gguf, _ = packages()
    stock = dense_skeleton(lazy.model)
    sources, first = weight_sources(stock)
    shapes = {name: x.shape for name, x in stock.state_dict().items()}
    known = {name: x.detach() for name, x in lazy.model.state_dict().items() if not x.is_meta}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # writing the file has shown them
        _, tensors = convert(stock, known, source=folder, title=path.stem)
    errors = {first.get(name, name): x for name, x in errors.items()}
    reader = gguf.GGUFReader(path)
    if missing := tensors.keys() ^ {x.name for x in reader.tensors}:
        raise FormatError(f"{path} and the source do not have the same tensors: {_some(missing)}.")

    def read(name: str) -> Tensor:
        if name not in lazy.origins:
            return known[name]
        return lazy.origins[name].read().reshape(shapes[name])

    for info in reader.tensors:
        tensor, kind = tensors[info.name], info.tensor_type.name
        values = torch.from_numpy(gguf.quants.dequantize(info.data, info.tensor_type).copy())
        expected = tensor.compute(read).reshape(values.shape)
        # The tensor may consist of several layers, or of some rows of them, which have at most all the error.
        squares = sum(
            sum(_squares(sources[name], read(name), errors)) for name in tensor.parameters if name in sources
        )
        largest = squares**0.5 / _norm(expected) if squares else 0.0
        yield info.name, kind, _gap(values, expected), largest


def _squares(source: WeightSource, parameter: Tensor, errors: Mapping[str, float]) -> list[float]:
    """Return the squared error of each layer of a parameter, from the relative errors of the layers."""
    if not any(layer in errors for layer in source.layers):
        return [0.0] * len(source.layers)
    parts = [parameter] if source.stack is None else source.split(parameter)
    return [
        (_norm(part) * errors.get(layer, 0.0)) ** 2 for layer, part in zip(source.layers, parts, strict=True)
    ]


def _of_packed_folder(
    path: Path, target: str, lazy: LazyModel, errors: Mapping[str, float]
) -> Iterator[tuple[str, str, float, float]]:
    """Yield name, number format, error and explained error of the tensors in a folder of packed matrices.

    transformers computes from each parameter of the source the tensors that checkpoints store of it.
    """
    written = written_tensors(path, target)
    stock = dense_skeleton(lazy.model)
    sources, first = weight_sources(stock)
    errors = {first.get(name, name): x for name, x in errors.items()}
    of_gpt2 = target == "mlx" and isinstance(stock, GPT2LMHeadModel)
    # mlx-lm stores all matrices of GPT-2 as (out, in).
    turned = {f"{x}.weight" for x, module in stock.named_modules() if of_gpt2 and isinstance(module, Conv1D)}

    def compared(key: str, expected: Tensor, squares: float) -> tuple[str, str, float, float]:
        name = key
        if of_gpt2:
            name = name_in_gpt2(key)
        elif key not in written and (expert := EXPERT.fullmatch(key)):
            name = f"{name_in_stack(key)}[{expert[2]}]"
        if name not in written:
            raise FormatError(f"{path} has no tensor {name}, which the source stores as {key}.")
        found, scheme = written.pop(name)()
        return name, scheme, _gap(found, expected), squares**0.5 / _norm(expected) if squares else 0.0

    state = lazy.model.state_dict()
    for name, values in state.items():
        whole = lazy.origins[name].read().reshape(values.shape) if name in lazy.origins else values
        tied = lazy.model.all_tied_weights_keys.get(name) in state
        if whole.is_meta or (tied and name not in written):
            continue  # it is stored in another form, which is compared below, or under another name
        squares = _squares(sources[name], whole, errors) if name in sources else [0.0]
        if name in written or name in turned:
            yield compared(name, whole.T if name in turned else whole, sum(squares))
            continue
        # The layers of which a piece has rows have at most all the error.
        size = whole.shape[:-1].numel() // len(squares)
        layers = (torch.arange(size * len(squares), dtype=torch.int32) // size).view(*whole.shape[:-1], 1)
        owners = revert_weight_conversion(lazy.model, {name: layers.expand(whole.shape)})
        for key, piece in revert_weight_conversion(lazy.model, {name: whole}).items():
            inside = {*owners[key][..., 0].flatten().tolist(), *owners[key][..., -1].flatten().tolist()}
            yield compared(key, piece, sum(squares[k] for k in inside))
    for key, part in lazy.others.items():
        yield compared(key, load_slice(part), 0.0)
    if written:
        raise FormatError(f"{path} has tensors that the source does not have: {_some(written)}.")
