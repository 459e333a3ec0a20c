"""Benchmarks of this project that stay outside the wheel: see docs/bench.md. Run them from the repository's root.

This package and `bench.protocol` use the standard library alone: they are imported in the environments of peers too.
"""
