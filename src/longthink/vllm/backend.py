"""The attention backend CUSTOM: its KV cache spec, and what a layer runs in a step."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import AttentionBackend, AttentionImpl, MultipleOf
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import KVCacheLayout

from longthink.vllm import checks, compat
from longthink.vllm.builder import BoundedBuilder, BoundedMetadata
from longthink.vllm.config import PluginOptions, shares_prompt
from longthink.vllm.pool import page_bytes, query_blocks
from longthink.vllm.spec import BoundedSpec


class BoundedBackend(AttentionBackend):  # type: ignore[misc, unused-ignore]
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[str]] = list(checks.KV_DTYPES)
    # The policy decides where a token goes, so the runner's slot mapping is wrong once pages are evicted.
    forward_includes_kv_cache_update = True

    model: ClassVar[tuple[PluginOptions, int, int]]
    """Options, `max_model_len` and query heads of the model built last, for `customize_spec`: vLLM calls it when no
    configuration is current."""

    @staticmethod
    def get_name() -> str:
        return AttentionBackendEnum.CUSTOM.name

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        return [MultipleOf(1)]

    @staticmethod
    def get_impl_cls() -> type[BoundedImpl]:
        return BoundedImpl

    @staticmethod
    def get_builder_cls() -> type[BoundedBuilder]:
        return BoundedBuilder

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[Any, ...]:
        """Layers, then blocks, so that the padding of a page follows its keys and values."""
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def supports_rswa(cls) -> bool:
        """True, so that vLLM passes prompt lengths: see `compat.request_prompt_lengths`."""
        return True

    @classmethod
    def supports_kv_connector(cls) -> bool:
        """False: the contents of decode blocks change in place."""
        return False

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        options, max_model_len, heads = cls.model
        policy = options.make_policy(spec.block_size)
        fields = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}
        fields["page_size_padded"] = page_bytes(
            policy, spec.num_kv_heads, spec.head_size, spec.dtype, spec.unpadded_page_size_bytes
        )
        return BoundedSpec(
            **fields,
            decode_blocks=options.budget.pages(0, spec.block_size),
            max_prompt_tokens=min(options.max_prompt_tokens or max_model_len, max_model_len),
            max_model_len=max_model_len,
            query_blocks=query_blocks(policy, heads, spec.num_kv_heads),
            reserve=options.reserve,
            shares_prompt=shares_prompt(policy),
        )


class BoundedImpl(AttentionImpl):  # type: ignore[misc, unused-ignore]
    def __init__(
        self, num_heads: int, head_size: int, scale: float, num_kv_heads: int, *args: Any, **kwargs: Any
    ) -> None:
        config = get_current_vllm_config()
        layer = compat.layer_arguments(args, kwargs)
        checks.check_config(config)
        checks.check_layer(**layer)
        self.num_heads, self.head_size, self.num_kv_heads = num_heads, head_size, num_kv_heads
        self.scale = float(scale)
        self.kv_cache_dtype = layer.get("kv_cache_dtype", "auto")
        self.sliding_window = None
        self.kv_sharing_target_layer_name = None
        options = PluginOptions.from_additional_config(config.additional_config)
        BoundedBackend.model = (options, config.model_config.max_model_len, num_heads)
        compat.request_prompt_lengths(config)

    def forward(
        self, layer: Any, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor,
        attn_metadata: BoundedMetadata | None, output: Tensor, *args: Any, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        if attn_metadata is None:  # vLLM's profiling run
            return output.zero_()
        attn_metadata.run(layer.layer_name, (query, key, value), output)
        return output
