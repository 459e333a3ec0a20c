"""Everything of vLLM that may move from release to release, in one place.

Written beside vLLM 0.32; `docs/vllm.md` says what was tried with which version.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from vllm.config import CompilationMode, VllmConfig, get_current_vllm_config
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

from vllm import envs

__all__ = [
    "AttentionBackend",
    "AttentionBackendEnum",
    "AttentionCGSupport",
    "AttentionImpl",
    "AttentionMetadataBuilder",
    "CommonAttentionMetadata",
    "CpuReading",
    "FullAttentionManager",
    "FullAttentionSpec",
    "KVCacheLayout",
    "MultipleOf",
    "VllmConfig",
    "agree_over_ranks",
    "ask_for_prompt_lengths",
    "compiles",
    "cpu_kernel_serves",
    "cpu_read",
    "cpu_write",
    "get_current_vllm_config",
    "kv_caches",
    "layer_facts",
    "layer_index",
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
    """Have the runners say how long each prompt is, as they do for windows that slide behind a prompt."""
    if config.model_config.rswa_window is None:
        config.model_config.model_arch_config.rswa_window = config.model_config.max_model_len


def compiles(config: VllmConfig) -> bool:
    """Whether vLLM compiles the model: not with ``--enforce-eager``."""
    return config.compilation_config.mode not in (None, CompilationMode.NONE)


_CPU_ISA = "vec16"
"""The one of the CPU kernel's layouts that pages of 16 tokens have on x86: keys of a block D x T, values T x D."""


class CpuReading:
    """What vLLM's kernel for CPUs needs to know of a batch, the same for all layers.

    Parameters
    ----------
    start, length
        Where each row's queries begin among all, and how many tokens it reads; int32.
    """

    def __init__(
        self, start: Tensor, length: Tensor, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> None:
        self.start, self.length = start, length
        self.schedule = _cpu_ops().cpu_attn_get_scheduler_metadata(
            num_reqs=len(length),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            seq_lens=length,
            dtype=dtype,
            query_start_loc=start,
            causal=True,
            sliding_window_size=-1,
            isa=_CPU_ISA,
            enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
        )


def cpu_write(keys: Tensor, values: Tensor, key: Tensor, value: Tensor, slot: Tensor) -> None:
    """Write tokens into slots (block x page size + offset)."""
    _cpu_ops().cpu_attn_reshape_and_cache(key, value, keys, values, slot, _CPU_ISA)


def cpu_read(
    keys: Tensor,
    values: Tensor,
    query: Tensor,
    out: Tensor,
    blocks: Tensor,
    scaling: float,
    reading: CpuReading,
) -> None:
    """Attention of each row's queries, its last tokens, over its blocks."""
    _cpu_ops().cpu_attention_with_kv_cache(
        query=query,
        key_cache=keys,
        value_cache=values,
        output=out,
        query_start_loc=reading.start,
        seq_lens=reading.length,
        scale=scaling,
        causal=True,
        alibi_slopes=None,
        sliding_window=-1,
        block_table=blocks,
        softcap=0,
        scheduler_metadata=reading.schedule,
        s_aux=None,
    )


def cpu_kernel_serves(head_dim: int, page_size: int, dtype: torch.dtype) -> bool:
    """Whether vLLM's kernel for CPUs reads such pages, and lays them out as we read them: tried on one page."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    if page_size != 16 or head_dim not in CPUAttentionBackend.get_supported_head_sizes():
        return False
    key, value = torch.arange(2 * page_size * head_dim, dtype=dtype).view(2, page_size, 1, head_dim) % 64
    keys, values = torch.zeros(2, 1, 1, page_size, head_dim, dtype=dtype)
    try:
        cpu_write(keys, values, key, value, torch.arange(page_size))
    except (RuntimeError, AttributeError):  # built for another processor
        return False
    transposed = keys.view(head_dim, page_size).T
    return torch.equal(transposed, key[:, 0]) and torch.equal(values[0, 0], value[:, 0])


@cache
def _cpu_ops() -> Any:
    from vllm import _custom_ops

    return _custom_ops


_LAYER_ARGUMENTS = (
    "alibi_slopes",
    "sliding_window",
    "kv_cache_dtype",
    "logits_soft_cap",
    "attn_type",
    "kv_sharing_target_layer_name",
    "sinks",
)


def layer_facts(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What vLLM tells a layer's implementation beyond its sizes, by name."""
    return dict(zip(_LAYER_ARGUMENTS, args, strict=False)) | kwargs


def kv_caches(config: VllmConfig, layer_names: list[str]) -> list[Tensor]:
    """KV cache of each layer, X x K x T x 2D."""
    layers = config.compilation_config.static_forward_context
    return [layers[name].kv_cache for name in layer_names]


def layer_index(layer_name: str) -> int:
    """Place of a layer in the whole model."""
    from vllm.model_executor.models.utils import extract_layer_index

    return int(extract_layer_index(layer_name))


def agree_over_ranks() -> Callable[[Tensor], Tensor] | None:
    """Largest of each number over the ranks of tensor parallelism; None where there is one."""
    from vllm.distributed import get_tp_group

    group = get_tp_group()
    if group.world_size == 1:
        return None

    def agree(tensor: Tensor) -> Tensor:
        torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MAX, group=group.device_group)
        return tensor

    return agree
