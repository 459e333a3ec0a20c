"""The ``longthink`` command."""

from longthink.cli.app import main

__all__ = ["main"]
