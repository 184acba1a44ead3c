"""The whole workflow on a model that is part of the package, without network access."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tensornet.compression.config import CompressionConfig
from tensornet_hf.checkpoint import on_device
from tensornet_hf.compress import DEFAULT, CompressOptions, FolderReport, compress_folder
from tensornet_hf.embedded import data_path, gpt2_path
from tensornet_hf.text import continue_text, load_tokenizer

PROMPT = "And it came to pass in those days, that"
CALIBRATION_TOKENS = 16_384


@dataclass(frozen=True)
class Demo:
    """Result of the demo.

    Args:
        result: result of the compression, with baselines of the same size.
        sample: text generated after `PROMPT` by the saved model, loaded with transformers.
        folder: the saved model.
        report: the HTML page.
    """

    result: FolderReport
    sample: str
    folder: Path
    report: Path

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON-ready form."""
        files = {"folder": str(self.folder), "report": str(self.report)}
        return {**self.result.to_dict(), **files, "prompt": PROMPT, "sample": self.sample}


def run_demo(
    output: Path,
    *,
    bits: float = 4.25,
    seed: int = 0,
    device: torch.device | str = "cpu",
    force: bool = False,
    command: str = "tensornet demo",
    progress: bool = False,
) -> Demo:
    """Compress the embedded GPT-2, measure it, write `model/` and `report.html` in `output`, and load it.

    Round to nearest, GPTQ and the truncated SVD of the same size are measured too, on text that was used
    neither for training nor for calibration.

    Args:
        output: folder; created if it does not exist.
        bits: bits per weight of the linear layers, scales included.
        seed: seed of the generated sample.
        device: device where the models run.
        force: replace an existing model.
        command: command line, shown in the report.
        progress: show progress bars.

    Raises:
        BudgetError: no plan has so few bits.
        DestinationError: `output/model` exists already.
    """
    output.mkdir(parents=True, exist_ok=True)
    folder, report = output / "model", output / "report.html"
    options = CompressOptions(
        calibration=DEFAULT,
        calibration_tokens=CALIBRATION_TOKENS,
        held_out=data_path("heldout.txt"),
        device=device,
        report=report,
        force=force,
        command=command,
        progress=progress,
    )
    result = compress_folder(gpt2_path(), folder, CompressionConfig(bits_per_weight=bits), options)
    # Users load the folder with transformers, after importing tensornet_hf.
    model = on_device(AutoModelForCausalLM.from_pretrained(folder), device)
    sample = continue_text(model, load_tokenizer(folder), PROMPT, temperature=0.7, seed=seed)
    return Demo(result, sample, folder, report)
