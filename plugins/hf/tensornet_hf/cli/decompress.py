"""`tensornet decompress`: convert a compressed model to an ordinary one."""

from tensornet.compression.report import model_size
from tensornet_hf import pipeline as conversion
from tensornet_hf.checkpoint import HUB, check_free, decompress, on_device, resolve_folder, save
from tensornet_hf.cli import options as shared
from tensornet_hf.inspect import weight_bytes
from tensornet_hf.report.facts import compact_bytes


def run(
    source: shared.Source,
    destination: shared.Destination,
    dtype: shared.Dtype = None,
    device: shared.Device = shared.CPU,
    force: shared.Force = False,
    as_json: shared.Json = False,
) -> None:
    """Multiply all cores out and save an ordinary model, which loads without this library.

    What compression cut away does not come back.
    """
    stored = conversion.dtype_of(dtype)
    folder = resolve_folder(source)
    check_free(destination, force=force, sources=(folder,))
    model = on_device(conversion.open_compressed(folder), device)
    before, _ = model_size(model)
    decompress(model)
    save(conversion.stored_as(model, stored), destination, source=folder, force=force)
    after, _ = model_size(model)
    size = None if destination.startswith(HUB) else weight_bytes(destination)
    if as_json:
        numbers = {"params_before": before, "params_after": after, "file_bytes_after": size}
        shared.print_json({"source": source, "destination": destination, **numbers})
    else:
        files = "" if size is None else f", {compact_bytes(size)} of weight files"
        shared.print_lines(
            f"{before:,} -> {after:,} parameters of the whole model{files}", f"written to {destination}"
        )
