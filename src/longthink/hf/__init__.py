"""Hugging Face transformers: the cache, the attention function, `generate` and `Engine`."""

from longthink.hf.cache import PagedCache, make_cache
from longthink.hf.engine import Engine, Handle
from longthink.hf.generation import generate
from longthink.hf.request import Finished, Request
from longthink.hf.sampling import Sampling
from longthink.hf.step import PAYS_FROM, DecodeStep

__all__ = [
    "PAYS_FROM",
    "DecodeStep",
    "Engine",
    "Finished",
    "Handle",
    "PagedCache",
    "Request",
    "Sampling",
    "generate",
    "make_cache",
]
