"""How many blocks a request gets: the scheduler's side of the bound.

How many blocks a request holds follows from the lengths of its prompt and text alone; which page gives way is decided
by the worker, who overwrites one of the request's own blocks. So nothing has to be told back to the scheduler.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from longthink.vllm.compat import FullAttentionManager

_REMEMBERED = 1 << 16
"""Requests whose prompt length is kept: far more than wait or run at any time."""


class BoundedManager(FullAttentionManager):  # type: ignore[misc, unused-ignore]
    """Clips what a request gets to its cap, and offers only whole prompt blocks to the prefix cache."""

    # By id of a request's block hashes: its prompt, how many hashes there were, and the last of them.
    _prompts_of_hashes: OrderedDict[int, tuple[int, int, Any]] = OrderedDict()  # noqa: RUF012  hits are looked up by class

    def __init__(self, kv_cache_spec: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, *args, **kwargs)
        # Survives preemption, which frees the blocks.
        self._prompts: OrderedDict[str, int] = OrderedDict()

    def _clip(self, request_id: str, num_tokens: int) -> int:
        """As many tokens as would fill the blocks that the request shall hold."""
        prompt = self._prompts.get(request_id)
        if prompt is None:
            return num_tokens
        spec = self.kv_cache_spec
        blocks = spec.most_blocks(prompt) if spec.reserve else spec.blocks(prompt, num_tokens)
        return blocks * self.block_size

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Learn how long the prompt is: vLLM calls this before each allocation. Nothing is removed."""
        del processed_computed_tokens
        if num_prompt_tokens is not None:
            _remember(self._prompts, request_id, num_prompt_tokens)

    def get_num_blocks_to_allocate(self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any) -> int:
        """Blocks that the request still needs to hold so many tokens, within its cap."""
        # The first question about a request comes before its prompt length: then all it has is a prompt.
        self._prompts.setdefault(request_id, num_tokens)
        return super().get_num_blocks_to_allocate(
            request_id, self._clip(request_id, num_tokens), *args, **kwargs
        )

    def allocate_new_blocks(self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any) -> list[Any]:
        """Give the request blocks for so many tokens, within its cap."""
        return super().allocate_new_blocks(request_id, self._clip(request_id, num_tokens), *args, **kwargs)

    def cache_blocks(self, request: Any, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Offer whole blocks of the prompt to the prefix cache; decode blocks change in place."""
        if not self.kv_cache_spec.prefix_cacheable:  # vLLM 0.30 leaves that to each manager
            return
        if hashes := request.block_hashes:
            _remember(
                self._prompts_of_hashes, id(hashes), (request.num_prompt_tokens, len(hashes), hashes[-1])
            )
        super().cache_blocks(request, min(num_tokens, request.num_prompt_tokens), *args, **kwargs)

    @classmethod
    def find_longest_cache_hit(
        cls, block_hashes: Sequence[Any], max_length: int, *args: Any, **kwargs: Any
    ) -> tuple[Any, int]:
        """Cached blocks of a prompt: what a preempted request had generated must be replayed, never looked up."""
        prompt, count, last = cls._prompts_of_hashes.get(id(block_hashes), (0, 0, None))
        # An id may be that of a request that is gone; hashes only grow, and each stands for all before it.
        if 0 < count <= len(block_hashes) and block_hashes[count - 1] == last:
            max_length = min(max_length, prompt)
        return super().find_longest_cache_hit(block_hashes, max_length, *args, **kwargs)


def _remember(table: OrderedDict[Any, Any], key: Any, value: Any) -> None:
    table[key] = value
    table.move_to_end(key)
    if len(table) > _REMEMBERED:
        table.popitem(last=False)
