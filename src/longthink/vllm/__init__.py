"""Bounded KV caches inside stock vLLM, as a plugin: nothing of vLLM is changed or copied.

vLLM calls `register` in each of its processes (entry point group ``vllm.general_plugins``). It makes a backend known
that serves only who asks for it: ``--attention-backend CUSTOM --additional-config '{"longthink": {...}}'``.
"""

from __future__ import annotations

from contextlib import suppress

from longthink.vllm.config import PluginOptions

__all__ = ["PluginOptions", "register"]


def register() -> None:
    """Make the backend and its kind of KV cache known to vLLM."""
    from longthink.vllm.versions import installed

    vllm = installed()
    if vllm is None or not vllm.in_range:
        # Who asks for longthink is told so; nobody else must notice, whatever has moved in that vLLM.
        with suppress(ImportError, AttributeError):
            _register_renderers()
        return
    from longthink.vllm import compat, spec

    spec.register()
    compat.register_backend(f"{__name__}.choice.Backend", f"{__name__}.choice.CpuBackend")
    _register_renderers()


def _register_renderers() -> None:
    from longthink.vllm.prompts import register_renderers

    register_renderers()
