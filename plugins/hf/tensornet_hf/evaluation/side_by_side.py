"""Model folders side by side: bytes, bits, parameters, time of a token, loss and samples."""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import PreTrainedModel

from tensornet._util import import_optional, in_eval_mode, progress_bar
from tensornet.errors import TargetError
from tensornet.nn.embedding import MPOEmbedding
from tensornet.nn.linear import TensorNetworkLinear
from tensornet_hf.checkpoint import on_device, resolve_folder
from tensornet_hf.evaluation.quantizers import bytes_on_disk, count_weights, load_any, quantization_method
from tensornet_hf.report.page import display_name
from tensornet_hf.text.quality import Judge, Quality, judge_of
from tensornet_hf.text.tokens import continue_text, load_tokenizer, usual_context

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Tokens that are generated to take the time, how often, and the tokens of a pass of an encoder.
_TIMED_TOKENS, _REPEATS, _PASS = 16, 3, 128
#: Height and width of an image for models whose configuration names none.
_IMAGE = 224
_PROMPT_WORDS = 12


@dataclass(frozen=True)
class FolderFacts:
    """One model folder of a comparison.

    Args:
        name: of the folder, or the hub id.
        method: `"dense"`, `"tensornet"` or another quantizer.
        bytes: of the weight files.
        bits: a weight of the whole dense model, embeddings included.
        params: stored numbers; of quantizers that store codes of every weight, its weights.
        milliseconds: for one token, generated one by one or of a pass over 128 of an encoder, or one image.
        quality: on the text, None without one.
        sample: greedy continuation, None where nothing is written.
        timed: what the milliseconds are for, `"token"` or `"image"`.
    """

    name: str
    method: str
    bytes: int
    bits: float
    params: int
    milliseconds: float
    quality: Quality | None = None
    sample: str | None = None
    timed: Literal["token", "image"] = "token"

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON-ready form."""
        return {**asdict(self), "quality": None if self.quality is None else self.quality.to_dict()}


@dataclass(frozen=True)
class SideBySide:
    """Models side by side; the first is the one that the others are compared with.

    Args:
        folders: in the order they were given.
        prompt: that samples go on from, None without samples.
    """

    folders: tuple[FolderFacts, ...]
    prompt: str | None

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON-ready form."""
        return {"prompt": self.prompt, "models": [folder.to_dict() for folder in self.folders]}

    def rise(self, folder: FolderFacts) -> float | None:
        """Return the rise of the loss over that of the first model, None where none was measured."""
        first = self.folders[0].quality
        return None if first is None or folder.quality is None else folder.quality.loss - first.loss

    @property
    def timed(self) -> str:
        """Unit of the times, by the first model: `"a token"` or `"an image"`."""
        return {"token": "a token", "image": "an image"}[self.folders[0].timed]

    def plot(self) -> "Figure":
        """Draw loss over bytes, and milliseconds of a token.

        Raises:
            MissingDependencyError: matplotlib is not installed.
        """
        return _figure(self)


def compare_folders(
    paths: Sequence[str | Path],
    *,
    text: str | None = None,
    prompt: str | None = None,
    new_tokens: int = 40,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> SideBySide:
    """Measure model folders one after another, each loaded by itself.

    Encoders are judged by their distance from the first model, which stays in memory then.

    Args:
        paths: at least one folder or hub id: dense, compressed, or of another quantizer.
        text: to measure the loss on.
        prompt: to continue greedily; the beginning of the text if absent.
        new_tokens: length of the continuation.
        device: where the models run.
        progress: show a progress bar.

    Raises:
        FormatError: a folder is not a model, or cannot be loaded.
        MissingDependencyError: the package of another quantizer is not installed.
        TargetError: models of different kinds, or a text that has no labels for them.

    Example:
        >>> from tensornet_hf.embedded import gpt2_path
        >>> from tensornet_hf.evaluation.side_by_side import compare_folders
        >>> (facts,) = compare_folders([gpt2_path()], prompt="And", new_tokens=4).folders
        >>> facts.method, facts.params
        ('dense', 940800)
    """
    folders = [resolve_folder(path) for path in paths]
    methods = [quantization_method(folder) for folder in folders]  # before anything takes long
    if prompt is None and text is not None:
        prompt = " ".join(text.split()[:_PROMPT_WORDS])
    names = _names(paths)
    judge: Judge | None = None
    found: list[FolderFacts] = []
    work = zip(names, folders, methods, strict=True)
    bar = progress_bar(work, desc="comparing", unit="model", total=len(folders), disable=not progress)
    for name, folder, method in bar:
        model = on_device(load_any(folder), device)
        causal = model.can_generate() and not model.config.is_encoder_decoder
        if text is not None and (judge is None or causal):
            judge = judge_of(model, folder, text, name="the text")
        weights, size = count_weights(folder), bytes_on_disk(folder)
        sample = None
        if prompt is not None and model.can_generate():
            sample = continue_text(model, load_tokenizer(folder), prompt, max_new_tokens=new_tokens)
        facts = FolderFacts(
            name=name,
            method=method,
            bytes=size,
            bits=8 * size / weights,
            params=_stored_numbers(model, weights),
            milliseconds=_milliseconds(model),
            quality=None if judge is None else judge(model),
            sample=sample,
            timed="image" if _sees(model) else "token",
        )
        found.append(facts)
    shown = prompt if any(facts.sample is not None for facts in found) else None
    return SideBySide(tuple(found), shown)


def _names(paths: Sequence[str | Path]) -> list[str]:
    """Shorten the paths of folders to their names, with the parent folder where two are the same."""
    names = [display_name(path) for path in paths]
    twice = {name for name in names if names.count(name) > 1}
    return [
        f"{Path(path).resolve().parent.name}/{name}" if name in twice else name
        for path, name in zip(paths, names, strict=True)
    ]


def _stored_numbers(model: PreTrainedModel, weights: int) -> int:
    """Count stored numbers: the weights of the dense model, with those of networks in place of matrices."""
    networks = [x for x in model.modules() if isinstance(x, TensorNetworkLinear | MPOEmbedding)]
    layers = {tuple(map(id, module.stored.values())): module for module in networks}
    cores: dict[int, int] = {}  # numbers of every core, one that several layers share once
    for module in layers.values():
        topology, stored = module.topology, module.stored
        weights -= math.prod(topology.shape)
        for name in topology.core_names:
            size, _ = module.storage.core_size(topology, name, module.weight.dtype)
            cores[id(stored[f"core_{name}"])] = size
    return weights + sum(cores.values())


def _sees(model: PreTrainedModel) -> bool:
    """Return True if a model reads images and writes no text."""
    return bool(model.main_input_name == "pixel_values") and not model.can_generate()


def _image(model: PreTrainedModel) -> dict[str, Any]:
    """Make the inputs of a pass: one blank image of the size that a model reads."""
    size = getattr(model.config, "image_size", None) or _IMAGE
    height, width = size if isinstance(size, list | tuple) else (size, size)
    channels = getattr(model.config, "num_channels", 3)
    return {"pixel_values": torch.zeros(1, channels, height, width, dtype=model.dtype, device=model.device)}


def _tokens(model: PreTrainedModel, count: int) -> dict[str, Any]:
    """Make the inputs of a pass: one window of `count` tokens.

    Raises:
        TargetError: the model reads neither tokens nor images.
    """
    if model.main_input_name != "input_ids":
        raise TargetError(
            f"{type(model).__name__} reads {model.main_input_name}; models that read tokens (input_ids) or "
            "images (pixel_values) can be compared here. Compare others in Python, with their own inputs."
        )
    ids = torch.ones(1, count, dtype=torch.long, device=model.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.no_grad()
def _milliseconds(model: PreTrainedModel) -> float:
    """Measure the median time of a generated token, a token of an encoder's pass, or an image."""
    run: Any = model
    if _sees(model):
        count, inputs = 1, _image(model)
    elif model.can_generate():
        count, run = _TIMED_TOKENS, model.generate
        inputs = _tokens(model, 1)
        inputs |= {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
    else:
        count = usual_context(model, limit=_PASS)
        inputs = _tokens(model, count)
    taken = []
    with in_eval_mode(model):
        for _ in range(_REPEATS + 1):  # the first one warms up
            started = time.perf_counter()
            run(**inputs)
            if model.device.type == "cuda":
                torch.cuda.synchronize(model.device)
            taken.append(time.perf_counter() - started)
    return 1000 * median(taken[1:]) / count


def _figure(found: SideBySide) -> "Figure":
    module = import_optional("matplotlib.figure", extra="viz", user="comparison.plot()")
    from matplotlib.ticker import MaxNLocator

    rises = [found.rise(folder) for folder in found.folders]
    losses = any(rise is not None for rise in rises[1:])
    names = [folder.name for folder in found.folders]
    figure: Figure = module.Figure(figsize=(10.0, 1.4 + 0.5 * len(names)), layout="constrained")
    panels = figure.subplots(1, 3 if losses else 2, sharey=True)
    columns: list[tuple[str, list[float]]] = [
        ("weight files, MB", [folder.bytes / 1e6 for folder in found.folders]),
        (f"milliseconds {found.timed}", [folder.milliseconds for folder in found.folders]),
    ]
    if losses:
        measure = next(x.quality.measure for x in found.folders if x.quality is not None)
        title = "rise of the loss" if measure == "loss" else measure
        columns.append((title, [rise or 0.0 for rise in rises]))
    for axes, (title, values) in zip(panels, columns, strict=True):
        bars = axes.barh(range(len(names)), values, color=["#98a2b3", *["#2563eb"] * (len(names) - 1)])
        axes.bar_label(bars, [f"{value:.3g}" for value in values], padding=3, fontsize=8)
        axes.set_xlabel(title)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.margins(x=0.18)
        axes.set_yticks(range(len(names)), names)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(length=0)
    panels[0].invert_yaxis()
    return figure


def check_picture(path: Path) -> None:
    """Raise TargetError unless a picture can be written there.

    Raises:
        TargetError: another ending than .png, .svg or .pdf, or a folder that is not there.
    """
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise TargetError(f"{path} is not the name of a picture; end it in .png, .svg or .pdf.")
    if not path.absolute().parent.is_dir():
        raise TargetError(f"The picture cannot be written to {path}: its folder is not there.")
