"""Which text should a model be calibrated on, if there is no text like its later input?

    OMP_NUM_THREADS=1 python benchmarks/texts.py [--models gpt2 smollm2 qwen] [--bits 3.25] [--cache FOLDER]
        [--toy]

Each model is compressed once for each calibration text, and compared with the dense model on five held-out
texts. The text that the model wrote itself and the package's text are the ones that need no file; the Bible
and the Python documentation are two texts of one kind. `subjects.py` describes models and texts; those of the
Bible and of code are part of this package and of Python's standard library.
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
import tempfile
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

import tensornet as tn
import tensornet_hf as th
from tensornet_hf.embedded import data_path, gpt2_path, heldout_text
from tensornet_hf.evaluate import divergence_by_block
from tensornet_hf.lazy_model import open_model
from tensornet_hf.text import load_tokenizer, token_ids

sys.path.insert(0, str(Path(__file__).parent))
import subjects
from harness import RECORDS, processor_seconds, record

#: Calibration texts: some name a text of the library, the others a file.
CALIBRATIONS = ("own", "default", "own and default", "Bible", "Python documentation")
#: Languages of the handbook in which each is read in turn; they have six scripts.
LANGUAGES = ("de-DE", "fr-FR", "ru-RU", "zh-CN", "ja-JP", "ar-MA", "pt-BR", "el-GR")
#: Modules of the standard library whose source code is the text of code.
MODULES = ("argparse", "dataclasses", "fractions", "heapq", "statistics", "textwrap")


def judged_texts(cache: Path) -> dict[str, str]:
    """Return the held-out texts, by kind."""
    texts = cache / "texts"
    handbook = texts / "usr/share/doc/debian-handbook/html"
    pages = [
        subjects.plain_text(page.read_text(errors="replace"))[2_000:2_700]
        for name in ("sect.apt-get.html", "sect.package-meta-information.html", "sect.become-root.html")
        for language in LANGUAGES
        if (page := handbook / language / name).is_file()
    ]
    return {
        "Bible": heldout_text(),
        "handbook": subjects.read_text(texts, "heldout"),
        "languages": "\n\n".join(pages),
        "database manual": subjects.read_text(texts, "training"),
        "code": "\n\n".join(inspect.getsource(import_module(name))[3_000:7_000] for name in MODULES),
    }


def model_folder(name: str, cache: Path) -> Path:
    """Return the folder of a model that is off the grid of its source."""
    if name == "gpt2":
        return gpt2_path()
    dense = subjects.qwen(cache) if name == "qwen" else subjects.prepare_models(cache)[0]
    rotated = cache / f"{name}-rotated"
    subjects.rotate(dense, rotated)
    return rotated


def calibration_of(name: str, cache: Path, work: Path) -> Any:
    """Return the value of `CompressOptions.calibration` for a calibration text."""
    if name == "Bible":
        return data_path("calibration.txt")
    if name == "Python documentation":
        file = work / "documentation.txt"
        file.write_text(subjects.read_text(cache / "texts", "calibration"))
        return file
    return tuple(name.split(" and "))


def main(arguments: Sequence[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["gpt2"], choices=("gpt2", "smollm2", "qwen"))
    parser.add_argument("--calibrations", nargs="+", default=CALIBRATIONS, choices=CALIBRATIONS)
    parser.add_argument("--bits", type=float, default=3.25, help="bits per weight of the linear layers")
    parser.add_argument("--tokens", type=int, default=4_096, help="tokens of each judged text")
    parser.add_argument("--cache", type=Path, default=Path("cache"), help="folder of models and texts")
    parser.add_argument("--toy", action="store_true", help="one block, one judged text, two calibrations")
    parser.add_argument("--records", type=Path, default=RECORDS)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    layers = "all"
    if given.toy:
        given.calibrations, given.tokens, layers = ("default", "Bible"), 512, "*.h.0.mlp.*"
    texts = {"Bible": heldout_text()} if given.toy else judged_texts(given.cache)
    rows = []
    for name in given.models:
        dense = model_folder(name, given.cache)
        tokenizer = load_tokenizer(dense)
        for calibration in given.calibrations:
            with tempfile.TemporaryDirectory() as work:
                small, start = Path(work) / "small", processor_seconds()
                options = th.CompressOptions(
                    calibration=calibration_of(calibration, given.cache, Path(work)), progress=False
                )
                config = tn.CompressionConfig(layers, bits_per_weight=given.bits)
                report = th.compress_folder(dense, small, config, options)
                seconds = processor_seconds() - start
                compressed = th.load(small)
                for judged, text in texts.items():
                    ids = token_ids(tokenizer, text)[: given.tokens]
                    context = 128 if name == "gpt2" else 512
                    found = divergence_by_block(compressed, open_model(dense), ids, context=context)
                    rows.append(
                        {
                            "model": name,
                            "calibration": calibration,
                            "judged": judged,
                            "tokens": len(ids),
                            "kl": found.mean[0],
                            "kl_standard_error": found.mean[1],
                            "loss_increase": found.loss_increase[0],
                            "loss_increase_standard_error": found.loss_increase[1],
                            "predicted": report.plan.predicted_loss_increase,
                            "bits_per_weight": report.plan.bits_per_weight,
                            "bytes": report.model_bytes_after,
                            "seconds": round(seconds, 1),
                        }
                    )
                    print(json.dumps(rows[-1]), flush=True)
    return record("texts", rows, folder=given.records)


if __name__ == "__main__":
    main()
