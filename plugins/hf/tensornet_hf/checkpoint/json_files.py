"""Read JSON from untrusted files: one kind of error, bounded in size."""

import json
from pathlib import Path
from typing import Any

from tensornet.errors import FormatError

#: No configuration and no index comes near this many bytes.
MAX_JSON = 256_000_000


def read_json(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file.

    Raises:
        FormatError: absent, unreadable, too large, not JSON, nested without end, or not an object.
    """
    try:
        size = path.stat().st_size
        if size > MAX_JSON:
            raise FormatError(f"{path} has {size:,} bytes; at most {MAX_JSON:,} are read of a JSON file.")
        content = json.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise FormatError(f"Cannot read {path}: {error.strerror or error}.") from error
    except FormatError:
        raise
    except (ValueError, RecursionError) as error:  # also bad UTF-8, bad JSON, numbers of thousands of digits
        raise FormatError(f"{path} is not valid JSON ({error!s:.200}). Copy or download it again.") from error
    if not isinstance(content, dict):
        raise FormatError(f"{path} must hold a JSON object, it holds a {type(content).__name__}.")
    return content
