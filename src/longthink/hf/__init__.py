"""Hugging Face transformers: the cache, the attention function, `generate` and `decode_stream`."""

from longthink.hf.cache import PagedCache, make_cache
from longthink.hf.generation import generate
from longthink.hf.sampling import Sampling
from longthink.hf.step import PAYS_FROM, DecodeStep
from longthink.hf.stream import Finished, Request, decode_stream

__all__ = [
    "PAYS_FROM",
    "DecodeStep",
    "Finished",
    "PagedCache",
    "Request",
    "Sampling",
    "decode_stream",
    "generate",
    "make_cache",
]
