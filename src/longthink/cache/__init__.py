"""Bounded KV cache of one attention layer, independent of any model library."""

from longthink.cache.layer import LayerCache
from longthink.cache.step import QKV, FusedStep
from longthink.kernels.rotation import Rotation

__all__ = ["QKV", "FusedStep", "LayerCache", "Rotation"]
