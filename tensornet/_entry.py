"""The console script `tensornet`.

The script is installed even without the extra `cli`. The command line itself is part of the plugin
`tensornet_hf`. The plugin is imported only after its dependencies have been found; otherwise a missing
package would end in a traceback instead of installation advice.
"""

from __future__ import annotations

from importlib import import_module

from tensornet._util import missing_hint

# The packages of the extra `cli`; an architecture test compares this list with pyproject.toml.
CLI_MODULES = ("accelerate", "filelock", "jinja2", "matplotlib", "rich", "transformers", "typer")


def main() -> None:
    """Run the command line, or exit with status 1 and a pip command if a package is missing."""
    hint = missing_hint(CLI_MODULES, extra="cli", user="the tensornet command")
    if hint is not None:
        raise SystemExit(f"tensornet: {hint}")
    import_module("tensornet_hf.cli").app()
