"""The program `tensornet`, whose commands call functions of the library."""

from tensornet_hf.cli.main import app

__all__ = ["app"]
