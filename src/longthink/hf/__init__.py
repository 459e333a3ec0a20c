"""Hugging Face transformers: the cache, the attention function and `generate`."""

from longthink.hf.cache import PagedCache, make_cache
from longthink.hf.generation import generate

__all__ = ["PagedCache", "generate", "make_cache"]
