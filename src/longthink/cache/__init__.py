"""Fixed page slots and the decode step over them, independent of any model library."""

from longthink.cache.layer import FusedStep, LayerCache

__all__ = ["FusedStep", "LayerCache"]
