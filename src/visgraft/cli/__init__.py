"""The command line, `visgraft`."""

from visgraft.cli.app import main

__all__ = ["main"]
