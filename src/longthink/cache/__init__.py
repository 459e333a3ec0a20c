"""Fixed page slots and the decode step over them, independent of any model library."""

from longthink.cache.books import Books, group_books
from longthink.cache.layer import LayerCache

__all__ = ["Books", "LayerCache", "group_books"]
