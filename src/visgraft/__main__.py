"""`python -m visgraft`."""

from visgraft.cli import main

main()
