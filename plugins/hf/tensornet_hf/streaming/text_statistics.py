"""Collect statistics on a text for a model that is never loaded as a whole."""

import shutil
from pathlib import Path

import torch
from transformers import PreTrainedModel

import tensornet as tn
from tensornet.compression import CompressionConfig
from tensornet.errors import TargetError
from tensornet.nn.targets import find_targets
from tensornet_hf.streaming.calibrate import SPILL, calibrate_checkpoint, find_blocks
from tensornet_hf.streaming.journal import staging
from tensornet_hf.streaming.mapped_model import mapped_model
from tensornet_hf.streaming.source import digest, open_source
from tensornet_hf.text.calibration_data import calibration_data


def statistics_of_text(
    folder: Path,
    destination: str | Path,
    text: str,
    *,
    name: str,
    config: CompressionConfig,
    tokens: int,
    resume: bool = True,
    progress: bool = False,
) -> Path:
    """Run a model over a text block by block, and store the moments for planning.

    The file lies in the staging folder of `destination` and goes when the run that compresses is through.
    An interrupted run finds it there: it is used again for the same model, text and layers.

    Args:
        folder: of the model.
        destination: where the compressed model will be.
        text: like what the model will see; its beginning is used.
        name: how reports call the text.
        config: observe the layers it selects and that lie inside blocks.
        tokens: how much of the text to use.
        resume: use statistics that are there already.
        progress: show a progress bar.

    Returns:
        Path of the statistics, for `compress_checkpoint(stats=)`.

    Raises:
        TargetError: a model that cannot be run block by block, or for which text alone says too little.
        DestinationError: another run is writing the destination.
        ValueError: the text is too short.
    """
    source = open_source(folder)
    layers = (config.target_modules, config.exclude_modules)
    key = digest(
        [sorted(source.marks.items()), text, name, tokens, layers, tn.__version__, torch.__version__]
    )
    with staging(Path(destination).expanduser().absolute()) as work:
        path = work.folder / f"statistics-{key[:16]}.safetensors"
        if path.is_file() and resume:
            return path
        for left in work.folder.glob(f"{SPILL}*"):  # by a run that was killed
            shutil.rmtree(left)
        model = mapped_model(folder, spill=work.folder)
        _check_inside_blocks(model, config)  # before anything is run
        data = calibration_data(model, folder, text, tokens=tokens)
        calibrate_checkpoint(
            folder,
            data.batches,
            path,
            config=config,
            loss_fn=data.loss_fn,
            source=f"{data.tokens:,} tokens of {name}",
            progress=progress,
        )
    return path


def _check_inside_blocks(model: PreTrainedModel, config: CompressionConfig) -> None:
    stack, _ = find_blocks(model)
    targets = [x for x in find_targets(model, config) if not x.skip]
    outside = [x.name for x in targets if not x.name.startswith(f"{stack}.")]
    if outside:
        raise TargetError(
            f"{', '.join(outside)} of {type(model).__name__} lies outside its blocks ({stack}), of which "
            "alone statistics are collected without loading the model. Exclude it, or load the model (on the "
            "command line, leave out --workers)."
        )
