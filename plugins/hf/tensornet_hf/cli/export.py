"""`tensornet export`: integer layers as a compressed-tensors checkpoint."""

from pathlib import Path
from typing import Annotated

import typer

from tensornet_hf.checkpoint import resolve_folder
from tensornet_hf.cli import options as shared
from tensornet_hf.export.compressed_tensors import export_compressed_tensors


def run(
    source: shared.Source,
    destination: Annotated[Path, typer.Argument(help="Folder to write.")],
    force: shared.Force = False,
    as_json: shared.Json = False,
) -> None:
    """Export int4 and int8 layers for transformers with compressed-tensors, or vLLM.

    Layers of other forms are written dense and listed.
    """
    report = export_compressed_tensors(resolve_folder(source), destination, force=force)
    if as_json:
        shared.print_json({"destination": str(destination), "packed": report.packed, "dense": report.dense})
    else:
        shared.print_lines(str(report))
