"""KV cache spec: how many blocks a request holds, which is all that the scheduler knows of a bounded cache.

A request's blocks are, in this order: the pages of its prompt, the query blocks (if the policy learns from attention
weights), its decode pages.
"""

from dataclasses import dataclass
from typing import Any, Self

from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import FullAttentionSpec


@dataclass(frozen=True, kw_only=True)
class BoundedSpec(FullAttentionSpec):  # type: ignore[misc, unused-ignore]
    """Spec of a layer whose requests hold at most `query_blocks + decode_blocks` blocks besides their prompt's."""

    decode_blocks: int  # most pages of a request besides those of its prompt
    max_prompt_tokens: int
    query_blocks: int = 0  # allocated with the first token after the prompt: see `longthink.vllm.observe`
    reserve: bool = False  # allocate all blocks of a request when it is scheduled
    shares_prompt: bool = True  # requests with the same prompt may share its blocks (prefix caching)

    @property
    def prefix_cacheable(self) -> bool:
        return self.shares_prompt

    def max_pages(self, prompt_tokens: int) -> int:
        return -(-prompt_tokens // self.block_size) + self.decode_blocks

    def max_blocks(self, prompt_tokens: int) -> int:
        return self.max_pages(prompt_tokens) + self.query_blocks

    def blocks(self, prompt_tokens: int, tokens: int) -> int:
        """Blocks that a request with such a prompt holds at `tokens` tokens."""
        pages = min(-(-tokens // self.block_size), self.max_pages(prompt_tokens))
        return pages + self.query_blocks if tokens > prompt_tokens else pages

    def max_num_blocks_per_req(self, vllm_config: VllmConfig, max_len: int) -> int:
        return super().max_num_blocks_per_req(vllm_config, max_len) + self.query_blocks

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        longest = vllm_config.model_config.max_model_len
        prompt = min(self.max_prompt_tokens, longest - 1)
        return self.blocks(prompt, longest) * self.page_size_bytes

    @classmethod
    def merge(cls, specs: list[Any]) -> Self:
        # Layers that share a block table have equal specs.
        assert all(spec == specs[0] for spec in specs)
        return specs[0]
