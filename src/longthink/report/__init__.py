"""Figures and tables from a result store."""

from longthink.report.build import PAGE, build

__all__ = ["PAGE", "build"]
