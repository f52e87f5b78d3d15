"""The command line, `visgraft`.

Here belongs what reads arguments and prints results. A verb is thin: what it does is a function of another room,
which Python users call as well.
"""

from visgraft.cli.app import main

__all__ = ["main"]
