"""The program `tensornet`. One command a file, each a thin shell over functions of the library."""

from tensornet_hf.cli.main import app

__all__ = ["app"]
