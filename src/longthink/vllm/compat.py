"""Everything of vLLM that may move from release to release, in one place.

Tested with vLLM 0.30 to 0.32; `docs/vllm.md` has the table.
"""

from __future__ import annotations

from typing import Any

from vllm.config import VllmConfig, get_current_vllm_config
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheLayout
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

__all__ = [
    "AttentionBackend",
    "AttentionBackendEnum",
    "AttentionCGSupport",
    "AttentionImpl",
    "AttentionMetadataBuilder",
    "CommonAttentionMetadata",
    "FullAttentionManager",
    "FullAttentionSpec",
    "KVCacheLayout",
    "MultipleOf",
    "VllmConfig",
    "ask_for_prompt_lengths",
    "get_current_vllm_config",
    "register_backend",
    "register_spec",
]


def register_backend(path: str, cpu_path: str) -> None:
    """Make a backend known as CUSTOM; `cpu_path` is for CPUs, where vLLM asks for one backend whatever was chosen."""
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends import registry

    registry.register_backend(AttentionBackendEnum.CUSTOM, path)
    if current_platform.is_cpu():
        registry.register_backend(AttentionBackendEnum.CPU_ATTN, cpu_path)


def register_spec(spec: type[Any], manager: type[Any]) -> None:
    """Tell the scheduler which manager serves a kind of KV cache."""
    # The registry fills itself only while it is empty: without this line the built-in kinds would be lost.
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(spec, manager, uniform_type_base_spec=spec)


def ask_for_prompt_lengths(config: VllmConfig) -> None:
    """Have the runners tell the backend how long each prompt is, which they do for sliding windows behind a prompt."""
    if config.model_config.rswa_window is None:
        config.model_config.model_arch_config.rswa_window = config.model_config.max_model_len
