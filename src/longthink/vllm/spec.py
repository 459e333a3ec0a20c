"""What the scheduler knows of a bounded KV cache: how many blocks a request can come to hold, and no more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from longthink.vllm.compat import FullAttentionSpec, VllmConfig, register_spec


@dataclass(frozen=True, kw_only=True)
class BoundedSpec(FullAttentionSpec):  # type: ignore[misc, unused-ignore]
    """Pages of the prompt, and at most `decode_blocks` more, however much is generated.

    Parameters
    ----------
    decode_blocks
        Blocks that a request may hold behind those of its prompt.
    max_prompt_tokens
        Longest prompt.
    reserve
        Take all blocks of a request at once.
    shares_prompt
        Requests with the same prompt may share its blocks.
    """

    decode_blocks: int
    max_prompt_tokens: int
    reserve: bool = False
    shares_prompt: bool = True

    @property
    def prefix_cacheable(self) -> bool:
        """Whether prompts go into the prefix cache."""
        return self.shares_prompt

    def cap(self, prompt_tokens: int) -> int:
        """Most blocks that a request with such a prompt holds."""
        return -(-prompt_tokens // self.block_size) + self.decode_blocks

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """Bytes of the largest request, in one layer."""
        longest = vllm_config.model_config.max_model_len
        blocks = min(-(-longest // self.block_size), self.cap(min(self.max_prompt_tokens, longest)))
        return blocks * self.page_size_bytes

    @classmethod
    def merge(cls, specs: list[Any]) -> Self:
        """One spec for layers that share a block table: theirs must be the same."""
        assert all(spec == specs[0] for spec in specs)
        return specs[0]


def register() -> None:
    """Make the spec and its manager known to vLLM."""
    from longthink.vllm.manager import BoundedManager

    register_spec(BoundedSpec, BoundedManager)
