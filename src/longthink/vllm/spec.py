"""What the scheduler knows of a bounded KV cache: how many blocks a request can come to hold, and no more.

A request's blocks are those of its prompt's pages, then those that hold queries, if the policy wants any, then those
of its decode pages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from longthink.vllm.compat import FullAttentionSpec, VllmConfig, register_spec


@dataclass(frozen=True, kw_only=True)
class BoundedSpec(FullAttentionSpec):  # type: ignore[misc, unused-ignore]
    """Pages of the prompt, and at most `query_blocks` and `decode_blocks` more, however much is generated.

    Parameters
    ----------
    decode_blocks
        Pages that a request may hold behind those of its prompt.
    max_prompt_tokens
        Longest prompt.
    query_blocks
        Blocks for queries, from the first token behind the prompt on: see `longthink.vllm.learning`.
    reserve
        Take all blocks of a request at once.
    shares_prompt
        Requests with the same prompt may share its blocks.
    """

    decode_blocks: int
    max_prompt_tokens: int
    query_blocks: int = 0
    reserve: bool = False
    shares_prompt: bool = True

    @property
    def prefix_cacheable(self) -> bool:
        """Whether prompts go into the prefix cache."""
        return self.shares_prompt

    def cap(self, prompt_tokens: int) -> int:
        """Most pages that a request with such a prompt holds."""
        return -(-prompt_tokens // self.block_size) + self.decode_blocks

    def blocks(self, prompt_tokens: int, tokens: int) -> int:
        """Blocks that a request with such a prompt holds when it has so many tokens."""
        pages = min(-(-tokens // self.block_size), self.cap(prompt_tokens))
        return pages + self.query_blocks if tokens > prompt_tokens else pages

    def most_blocks(self, prompt_tokens: int) -> int:
        """Most blocks that a request with such a prompt holds."""
        return self.cap(prompt_tokens) + self.query_blocks

    def max_num_blocks_per_req(self, vllm_config: VllmConfig, max_len: int) -> int:
        """Most entries of a request's block table."""
        return super().max_num_blocks_per_req(vllm_config, max_len) + self.query_blocks

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """Bytes of the largest request, in one layer."""
        longest = vllm_config.model_config.max_model_len
        prompt = min(self.max_prompt_tokens, longest - 1)
        return self.blocks(prompt, longest) * self.page_size_bytes

    @classmethod
    def merge(cls, specs: list[Any]) -> Self:
        """One spec for layers that share a block table: theirs must be the same."""
        assert all(spec == specs[0] for spec in specs)
        return specs[0]


def register() -> None:
    """Make the spec and its manager known to vLLM."""
    from longthink.vllm.manager import BoundedManager

    register_spec(BoundedSpec, BoundedManager)
