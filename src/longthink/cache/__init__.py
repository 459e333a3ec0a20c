"""Fixed page slots and the decode step over them, independent of any model library."""

from longthink.cache.layer import LayerCache

__all__ = ["LayerCache"]
