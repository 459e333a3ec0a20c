"""Hugging Face transformers: the cache, the attention function, `generate` and `Engine`.

From the model upwards: `attention` replaces the model's attention function and `binding` ties a cache to one model;
`layer` and `cache` are the `CacheLayerMixin` and `Cache` of transformers over `longthink.cache.LayerCache`; `saving`
writes a cache to a file, with the `fingerprint` of its model; `step` is one decode step, eager or compiled;
`generation` wraps ``model.generate`` (with `loop` where steps are compiled); `batch`, `scheduler` and `engine` are
continuous batching.
"""

from longthink.hf.cache import PagedCache, make_cache
from longthink.hf.engine import Engine, Handle
from longthink.hf.generation import generate
from longthink.hf.request import Finished, Request
from longthink.hf.sampling import Sampling
from longthink.hf.saving import load_cache
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
    "load_cache",
    "make_cache",
]
