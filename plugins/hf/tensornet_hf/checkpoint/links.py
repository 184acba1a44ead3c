"""Path checks for untrusted folders: no symbolic link may lead out of the folder."""

from pathlib import Path

from tensornet.errors import FormatError


def inside(folder: Path, name: str) -> Path:
    """Resolve the path of a file in a folder, and refuse links that lead out of it.

    Hub caches are the exception: `snapshots/REVISION/name` is a link to `blobs/HASH` of the same repository.

    Raises:
        FormatError: a link leads out; the message names it, and where it leads.
    """
    real, root = (folder / name).resolve(), folder.resolve()
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else None
    if not real.is_relative_to(root) and (blobs is None or real.parent != blobs):
        raise FormatError(
            f"{folder / name} is a link to {real}, outside the folder, which is neither read nor copied. "
            "Put the file itself there."
        )
    return folder / name
