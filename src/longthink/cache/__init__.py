"""Bounded KV cache of one attention layer, independent of any model library."""

from longthink.cache.layer import LayerCache
from longthink.cache.step import QKV, FusedStep
from longthink.cache.tiered_layer import TieredCache, with_pages
from longthink.kernels.rotation import Rotation

__all__ = ["QKV", "FusedStep", "LayerCache", "Rotation", "TieredCache", "with_pages"]
