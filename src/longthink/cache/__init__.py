"""Bounded KV cache of one attention layer, independent of any model library."""

from longthink.cache.layer import FusedStep, LayerCache

__all__ = ["FusedStep", "LayerCache"]
