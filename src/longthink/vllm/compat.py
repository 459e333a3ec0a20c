"""Adapters for the parts of vLLM that have no stable interface.

Written against vLLM 0.32; `docs/vllm.md` lists the versions tested, and every place where the plugin alters vLLM.
Imports inside functions load kernels or models of vLLM, which processes that do not use longthink must not load.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from vllm.config import CompilationMode, VllmConfig
from vllm.distributed import get_tp_group
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from vllm import envs


def register_backends(path: str, cpu_path: str) -> None:
    """Register a class as the backend CUSTOM and, on a CPU, another as the backend that vLLM always takes there."""
    register_backend(AttentionBackendEnum.CUSTOM, path)
    if current_platform.is_cpu():
        register_backend(AttentionBackendEnum.CPU_ATTN, cpu_path)


def register_spec(spec: type[Any], manager: type[Any]) -> None:
    # The registry adds the built-in kinds only while it is empty.
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(spec, manager, uniform_type_base_spec=spec)


def request_prompt_lengths(config: VllmConfig) -> None:
    """Have the model runner pass prompt lengths in the attention metadata, as it does for models with R-SWA."""
    if config.model_config.rswa_window is None:
        config.model_config.model_arch_config.rswa_window = config.model_config.max_model_len


def second_logits_processor() -> tuple[type[Any], ...]:
    """Base class of custom logits processors in vLLM's second model runner; none before vLLM 0.31."""
    try:
        from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor
    except ImportError:
        return ()
    return (LogitsProcessor,)


def compiles(config: VllmConfig) -> bool:
    """Whether vLLM compiles the model (it does not with ``--enforce-eager``)."""
    return config.compilation_config.mode not in (None, CompilationMode.NONE)


_CPU_ISA = "vec16"  # the CPU kernel's layout for blocks of 16 tokens on x86: keys D x T, values T x D


def cpu_write(keys: Tensor, values: Tensor, key: Tensor, value: Tensor, slot: Tensor) -> None:
    """Write tokens into slots (block x page size + offset)."""
    _cpu_ops().cpu_attn_reshape_and_cache(key, value, keys, values, slot, _CPU_ISA)


class CpuSchedule:
    """vLLM's CPU kernel, set up for a batch; rows begin at `start` and attend to `length` tokens (int32)."""

    def __init__(
        self, start: Tensor, length: Tensor, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> None:
        self._batch = {"query_start_loc": start, "seq_lens": length, "causal": True}
        sizes = {"num_reqs": len(length), "num_heads": heads, "num_kv_heads": kv_heads, "head_dim": head_dim}
        self._metadata = _cpu_ops().cpu_attn_get_scheduler_metadata(
            **self._batch, **sizes, dtype=dtype, sliding_window_size=-1, isa=_CPU_ISA,
            enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
        )  # fmt: skip

    def attend(
        self, keys: Tensor, values: Tensor, query: Tensor, out: Tensor, blocks: Tensor, scaling: float
    ) -> None:
        """Causal attention of each row's last tokens over its blocks."""
        _cpu_ops().cpu_attention_with_kv_cache(
            **self._batch, query=query, key_cache=keys, value_cache=values, output=out, block_table=blocks,
            scale=scaling, scheduler_metadata=self._metadata, alibi_slopes=None, sliding_window=-1, softcap=0,
            s_aux=None,
        )  # fmt: skip


def cpu_kernel_supports(head_dim: int, page_size: int, dtype: torch.dtype) -> bool:
    """Whether vLLM's CPU kernel supports such pages in the layout that the plugin expects: probed with one page."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    if page_size != 16 or head_dim not in CPUAttentionBackend.get_supported_head_sizes():
        return False
    key, value = torch.arange(2 * page_size * head_dim, dtype=dtype).view(2, page_size, 1, head_dim) % 64
    keys, values = torch.zeros(2, 1, 1, page_size, head_dim, dtype=dtype)
    try:
        cpu_write(keys, values, key, value, torch.arange(page_size))
    except (RuntimeError, AttributeError):  # not available in builds for other processors
        return False
    transposed = keys.view(head_dim, page_size).T
    return torch.equal(transposed, key[:, 0]) and torch.equal(values[0, 0], value[:, 0])


@cache
def _cpu_ops() -> Any:
    from vllm import _custom_ops

    return _custom_ops


_LAYER_ARGUMENTS = (
    "alibi_slopes", "sliding_window", "kv_cache_dtype", "logits_soft_cap", "attn_type",
    "kv_sharing_target_layer_name", "sinks",
)  # fmt: skip


def layer_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of an ``AttentionImpl`` after its sizes, by name."""
    return dict(zip(_LAYER_ARGUMENTS, args, strict=False)) | kwargs


def kv_caches(config: VllmConfig, layer_names: list[str]) -> list[Tensor]:
    """KV cache of each layer, X x K x T x 2D."""
    layers = config.compilation_config.static_forward_context
    return [layers[name].kv_cache for name in layer_names]


def layer_index(layer_name: str) -> int:
    """Index of a layer in the whole model, across pipeline stages."""
    from vllm.model_executor.models.utils import extract_layer_index

    return int(extract_layer_index(layer_name))


def max_over_ranks() -> Callable[[Tensor], Tensor] | None:
    """Elementwise maximum over the ranks of tensor parallelism; None if there is one rank."""
    group = get_tp_group()
    if group.world_size == 1:
        return None

    def reduce(tensor: Tensor) -> Tensor:
        torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MAX, group=group.device_group)
        return tensor

    return reduce
