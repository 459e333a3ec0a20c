"""Bounded KV caches in stock vLLM, as a plugin.

vLLM calls `register` in each of its processes (entry point group ``vllm.general_plugins``). The plugin takes effect
only with ``--attention-backend CUSTOM --additional-config '{"longthink": {...}}'``.
"""

from contextlib import suppress
from typing import Any

from longthink.vllm.config import PluginOptions
from longthink.vllm.renderer import register_renderers
from longthink.vllm.versions import installed

__all__ = ["PluginOptions", "register"]


def register() -> None:
    """Register the attention backend, the KV cache spec with its manager, and the renderers."""
    vllm = installed()
    if vllm is None or not vllm.in_range:
        # Unsupported vLLM: the renderers refuse it, but only for users who enabled longthink.
        with suppress(ImportError, AttributeError):
            register_renderers()
        return
    from longthink.vllm import compat
    from longthink.vllm.manager import BoundedManager
    from longthink.vllm.spec import BoundedSpec

    compat.register_spec(BoundedSpec, BoundedManager)
    compat.register_backends(f"{__name__}.backend.BoundedBackend", f"{__name__}.CpuBackend")
    register_renderers()


def __getattr__(name: str) -> Any:
    """Backend for a CPU, where vLLM ignores ``--attention-backend``: ours for CUSTOM, else vLLM's own."""
    if name != "CpuBackend":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vllm.config import get_current_vllm_config
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    if get_current_vllm_config().attention_config.backend is AttentionBackendEnum.CUSTOM:
        from longthink.vllm.backend import BoundedBackend

        return BoundedBackend
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    return CPUAttentionBackend
