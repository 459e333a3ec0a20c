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

    decode_blocks: int  # most pages of a request besides those of its prompt; a request may ask for fewer
    max_prompt_tokens: int
    max_model_len: int  # most tokens of prompt and output
    query_blocks: int = 0  # allocated with the first token after the prompt: see `longthink.vllm.observe`
    reserve: bool = False  # allocate all blocks of a request when it is scheduled
    shares_prompt: bool = True  # requests with the same prompt may share its blocks (prefix caching)

    @property
    def prefix_cacheable(self) -> bool:
        return self.shares_prompt

    def max_pages(self, prompt_tokens: int, decode_blocks: int | None = None) -> int:
        """Most pages of a request with such a prompt, and a budget of `decode_blocks` pages of its own."""
        decode_blocks = self.decode_blocks if decode_blocks is None else decode_blocks
        return min(self._pages(prompt_tokens) + decode_blocks, self._pages(self.max_model_len))

    def max_blocks(self, prompt_tokens: int, decode_blocks: int | None = None) -> int:
        return self.max_pages(prompt_tokens, decode_blocks) + self.query_blocks

    def blocks(self, prompt_tokens: int, tokens: int, decode_blocks: int | None = None) -> int:
        """Blocks that such a request holds at `tokens` tokens."""
        pages = min(self._pages(tokens), self.max_pages(prompt_tokens, decode_blocks))
        return pages + self.query_blocks if tokens > prompt_tokens else pages

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def max_num_blocks_per_req(self, vllm_config: VllmConfig, max_len: int) -> int:
        return super().max_num_blocks_per_req(vllm_config, max_len) + self.query_blocks

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        prompt = min(self.max_prompt_tokens, self.max_model_len - 1)
        return self.blocks(prompt, self.max_model_len) * self.page_size_bytes

    @classmethod
    def merge(cls, specs: list[Any]) -> Self:
        # Layers that share a block table have equal specs.
        assert all(spec == specs[0] for spec in specs)
        return specs[0]
