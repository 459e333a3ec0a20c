"""Bounded KV caches inside stock vLLM, as a plugin: nothing of vLLM is changed or copied.

vLLM calls `register` in each of its processes (entry point group ``vllm.general_plugins``). It makes a backend known
that serves only who asks for it: ``--attention-backend CUSTOM --additional-config '{"longthink": {...}}'``.
"""

from __future__ import annotations

from longthink.vllm.config import PluginOptions

__all__ = ["PluginOptions", "register"]


def register() -> None:
    """Make the backend and its kind of KV cache known to vLLM."""
    from longthink.vllm import compat, prompts, spec

    spec.register()
    prompts.register_renderers()
    compat.register_backend(f"{__name__}.choice.Backend", f"{__name__}.choice.CpuBackend")
