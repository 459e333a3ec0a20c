"""Figures and tables from a result store, and the attention page from traces."""

from longthink.lab.report.attention import ATTENTION_PAGE, build_attention
from longthink.lab.report.builder import PAGE, build

__all__ = ["ATTENTION_PAGE", "PAGE", "build", "build_attention"]
