"""The program `tensornet`: thin commands over functions of the library."""

from tensornet_hf.cli.main import app

__all__ = ["app"]
