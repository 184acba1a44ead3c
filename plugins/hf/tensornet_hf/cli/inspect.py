"""`tensornet inspect`: list the layers of a model folder."""

from tensornet_hf.checkpoint import resolve_folder
from tensornet_hf.cli import options as shared
from tensornet_hf.inspect import Inspection, inspect_folder
from tensornet_hf.report.facts import compact_bytes


def run(path: shared.Source, as_json: shared.Json = False) -> None:
    """Show the layers of a saved model, their topologies and sizes, from file headers alone."""
    found = inspect_folder(resolve_folder(path))
    if as_json:
        shared.print_json(found.to_dict())
    else:
        _print(found)


def _print(found: Inspection) -> None:
    form = "not compressed" if found.format_version is None else f"tensornet format {found.format_version}"
    dtypes = ", ".join(f"{count:,} {dtype}" for dtype, count in found.dtypes.items())
    shared.print_lines(
        f"{found.architecture}, {form}",
        f"whole model: {found.params:,} parameters ({dtypes}), {compact_bytes(found.bytes)} of weight files",
    )
    if not found.layers:
        return
    shared.print_lines("")
    header = ("layer", "form", "shape", "bytes", "bits a weight", "parameters", "dtype")
    rows = []
    for layer in found.layers:
        dense = layer.dense_params
        stored = f"{layer.params:,}" if layer.params else f"as {_owner(found, layer.name)}"
        rows.append(
            (
                layer.name,
                layer.form,
                "" if layer.shape is None else f"{layer.shape[0]} x {layer.shape[1]}",
                f"{layer.bytes:,}" if layer.params else "",
                f"{8 * layer.bytes / dense:.2f}" if dense and layer.params else "",
                stored,
                layer.dtype or "",
            )
        )
    shared.print_table(header, rows)


def _owner(found: Inspection, layer: str) -> str:
    owner = next((o for name, o in found.ties.items() if name.startswith(f"{layer}.")), "another layer")
    return owner.rpartition(".")[0] or owner
