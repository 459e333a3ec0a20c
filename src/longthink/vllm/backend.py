"""The attention backend that vLLM chooses for CUSTOM: its KV cache spec, and what a layer does in a step."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor

from longthink.vllm import checks, compat
from longthink.vllm.builder import BoundedBuilder, StepMetadata
from longthink.vllm.config import PluginOptions, shares_prompt
from longthink.vllm.pool import page_bytes, query_blocks
from longthink.vllm.spec import BoundedSpec


class BoundedBackend(compat.AttentionBackend):  # type: ignore[misc, unused-ignore]
    """Attention over bounded block tables."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[str]] = list(checks.KV_DTYPES)
    # Where a token goes depends on the policy, so the runner's slots mean nothing behind the cap.
    forward_includes_kv_cache_update = True

    model: ClassVar[tuple[PluginOptions, int, int]]
    """Options, longest text and query heads of the model that was built last: specs are asked for outside of its
    configuration."""

    @staticmethod
    def get_name() -> str:
        """Name under which vLLM knows the backend."""
        return compat.AttentionBackendEnum.CUSTOM.name

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        """Block sizes: a page is a block."""
        del kv_cache_spec
        return [compat.MultipleOf(1)]

    @staticmethod
    def get_impl_cls() -> type[BoundedImpl]:
        """What runs in a layer."""
        return BoundedImpl

    @staticmethod
    def get_builder_cls() -> type[BoundedBuilder]:
        """What prepares a step."""
        return BoundedBuilder

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[Any, ...]:
        """Layer after layer, block after block, so that a page ends in its padding."""
        return (compat.KVCacheLayout.LBHNC,)

    @classmethod
    def supports_rswa(cls) -> bool:
        """Whether the backend wants to know how long each prompt is."""
        return True

    @classmethod
    def supports_kv_connector(cls) -> bool:
        """Whether blocks may be sent elsewhere: what is in them changes."""
        return False

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """Bound what a layer keeps, and make room for the state of its pages."""
        options, longest, heads = cls.model
        policy = options.make_policy(spec.block_size)
        kv_bytes = spec.unpadded_page_size_bytes
        known = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}
        return BoundedSpec(
            **known
            | {
                "page_size_padded": page_bytes(
                    policy, spec.num_kv_heads, spec.head_size, spec.dtype, kv_bytes
                )
            },
            decode_blocks=options.budget.pages(0, spec.block_size),
            max_prompt_tokens=min(options.max_prompt_tokens or longest, longest),
            query_blocks=query_blocks(policy, heads, spec.num_kv_heads),
            reserve=options.reserve,
            shares_prompt=shares_prompt(policy),
        )


class BoundedImpl(compat.AttentionImpl):  # type: ignore[misc, unused-ignore]
    """A layer's part of a step."""

    def __init__(
        self, num_heads: int, head_size: int, scale: float, num_kv_heads: int, *args: Any, **kwargs: Any
    ) -> None:
        config = compat.get_current_vllm_config()
        layer = compat.layer_facts(args, kwargs)
        checks.check_config(config)
        checks.check_layer(**layer)
        self.num_heads, self.head_size, self.num_kv_heads = num_heads, head_size, num_kv_heads
        self.scale = float(scale)
        self.kv_cache_dtype = layer.get("kv_cache_dtype", "auto")
        self.sliding_window = None
        self.kv_sharing_target_layer_name = None
        options = PluginOptions.from_additional_config(config.additional_config)
        BoundedBackend.model = (options, config.model_config.max_model_len, num_heads)
        compat.ask_for_prompt_lengths(config)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: StepMetadata | None,
        output: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Write the tokens of a layer, and read."""
        del kv_cache, args, kwargs
        if attn_metadata is None:  # vLLM measures itself
            return output.zero_()
        attn_metadata.run(layer.layer_name, (query, key, value), output)
        return output
