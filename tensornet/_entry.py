"""The console script `tensornet`.

It lives in the core because the script is installed even when the extras are not: without them, importing the
plugin would fail with a traceback instead of advice. So the plugin is imported by name, after its
dependencies were found.
"""

from __future__ import annotations

from importlib import import_module

from tensornet._util import missing_hint

# The packages of the extra `cli`; an architecture test compares this list with pyproject.toml.
CLI_MODULES = ("accelerate", "filelock", "jinja2", "matplotlib", "rich", "transformers", "typer")


def main() -> None:
    """Run the command line; without its packages print the pip command and exit with status 1."""
    hint = missing_hint(CLI_MODULES, extra="cli", user="the tensornet command")
    if hint is not None:
        raise SystemExit(f"tensornet: {hint}")
    import_module("tensornet_hf.cli").app()
