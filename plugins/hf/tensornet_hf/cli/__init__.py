"""The program `tensornet`: one command for each file, a thin shell over functions of the library."""

from tensornet_hf.cli.main import app

__all__ = ["app"]
