"""Bounded caches in vLLM beside dense vLLM, all with the same memory for the pool."""
