"""Figures and tables from a result store."""

from longthink.report.builder import PAGE, build

__all__ = ["PAGE", "build"]
