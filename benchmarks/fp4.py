"""How much less does rounding with feedback to NVFP4 and MXFP4 increase the loss than rounding to nearest?

    OMP_NUM_THREADS=1 python benchmarks/fp4.py [--toy]

The embedded GPT-2 is written as GGUF files in which every matrix has one type, except position embeddings.
The files are read back by the package `gguf` and compared with the original on the held-out text. "nearest"
rounds each weight to the nearest value, with the scale that has the least squared error; "ours" knows 4,096
tokens of the calibration text. Q4_0 has the same number of bits as NVFP4. `seconds` are processor seconds of
the whole compression. Writes `fp4.json`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from harness import RECORDS, processor_seconds, record

import tensornet as tn
import tensornet_hf as th
from tensornet_hf.embedded import data_path, gpt2_path, heldout_text
from tensornet_hf.evaluate import divergence_by_block
from tensornet_hf.lazy_model import open_model
from tensornet_hf.text import load_tokenizer, token_ids

#: Number formats, by the name of the GGUF type.
FORMATS = {"NVFP4": "nvfp4", "MXFP4": "mxfp4", "Q4_0": "int4:g32:float16"}
CONTEXT = 128


def main(arguments: Sequence[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--toy", action="store_true", help="one type, few tokens")
    parser.add_argument("--records", type=Path, default=RECORDS)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    kinds, tokens, judged = ("NVFP4", "MXFP4", "Q4_0"), 4096, 32_768
    if given.toy:
        kinds, tokens, judged = kinds[:1], 256, 1024
    ids = token_ids(load_tokenizer(gpt2_path()), heldout_text())[:judged]
    rows: list[dict[str, Any]] = []
    for kind in kinds:
        for method in ("nearest", "ours"):
            how: dict[str, Any] = {"method": "nearest"} if method == "nearest" else {}
            config = tn.CompressionConfig(formats=(FORMATS[kind],), target_modules="all", **how)
            data: dict[str, Any] = {"calibration": data_path("calibration.txt"), "calibration_tokens": tokens}
            options = th.CompressOptions(**({} if method == "nearest" else data))
            with tempfile.TemporaryDirectory() as folder:
                start, file = processor_seconds(), Path(folder) / "model.gguf"
                done = th.compress_folder(gpt2_path(), file, config, options)
                seconds = processor_seconds() - start
                model = open_model(gpt2_path(), file, quantized=True)
                found = divergence_by_block(model, open_model(gpt2_path()), ids, context=CONTEXT)
            rows.append(
                {
                    "type": kind,
                    "method": method,
                    "loss_increase": found.loss_increase,
                    "kl": found.mean,
                    "same_top": found.same_top,
                    "predicted": done.plan.predicted_loss_increase,
                    "bytes": done.file_bytes_after,
                    "judged_tokens": len(ids),
                    "seconds": seconds,
                }
            )
            print(kind, method, found.loss_increase, found.mean, f"{seconds:.0f} s", flush=True)
    return record("fp4", rows, folder=given.records)


if __name__ == "__main__":
    print(main())
