"""Figures and tables from a result store."""
