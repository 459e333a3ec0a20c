"""Block allocation in the scheduler: no request gets more blocks than its cap.

The number of blocks follows from the lengths of prompt and output alone. Which page is evicted is decided by the
worker, which overwrites one of the request's own blocks, so nothing has to be reported back to the scheduler.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

_MAX_REMEMBERED = 1 << 16  # requests whose prompt length is remembered: far more than wait or run at any time


class BoundedManager(FullAttentionManager):  # type: ignore[misc, unused-ignore]
    """Caps the blocks of a request, and offers only full prompt blocks to the prefix cache."""

    # Prompt length, number of hashes and last hash, by id() of a request's block hashes. vLLM looks hits up by class.
    _prompts_by_hashes: OrderedDict[int, tuple[int, int, Any]] = OrderedDict()  # noqa: RUF012

    def __init__(self, kv_cache_spec: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, *args, **kwargs)
        # By request id. Kept across preemption, which frees the blocks.
        self._prompts: OrderedDict[str, int] = OrderedDict()

    def _cap_tokens(self, request_id: str, num_tokens: int) -> int:
        """Tokens that fill exactly the blocks that the request may hold at `num_tokens`."""
        prompt = self._prompts.get(request_id)
        if prompt is None:
            return num_tokens
        spec = self.kv_cache_spec
        blocks = spec.max_blocks(prompt) if spec.reserve else spec.blocks(prompt, num_tokens)
        return blocks * self.block_size

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Record the prompt length, which vLLM passes here before each allocation; remove nothing."""
        if num_prompt_tokens is not None:
            _remember(self._prompts, request_id, num_prompt_tokens)

    def get_num_blocks_to_allocate(self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any) -> int:
        # The first call for a request comes before its prompt length: it is for the prompt alone.
        self._prompts.setdefault(request_id, num_tokens)
        capped = self._cap_tokens(request_id, num_tokens)
        return super().get_num_blocks_to_allocate(request_id, capped, *args, **kwargs)

    def allocate_new_blocks(self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any) -> list[Any]:
        capped = self._cap_tokens(request_id, num_tokens)
        return super().allocate_new_blocks(request_id, capped, *args, **kwargs)

    def cache_blocks(self, request: Any, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Offer the full blocks of the prompt to the prefix cache; decode blocks change in place."""
        if not self.kv_cache_spec.prefix_cacheable:  # vLLM 0.30 leaves this check to each manager
            return
        if hashes := request.block_hashes:
            prompt = (request.num_prompt_tokens, len(hashes), hashes[-1])
            _remember(self._prompts_by_hashes, id(hashes), prompt)
        super().cache_blocks(request, min(num_tokens, request.num_prompt_tokens), *args, **kwargs)

    @classmethod
    def find_longest_cache_hit(
        cls, block_hashes: Sequence[Any], max_length: int, *args: Any, **kwargs: Any
    ) -> tuple[Any, int]:
        """Limit hits to the prompt: a preempted request must replay what it generated."""
        prompt, count, last = cls._prompts_by_hashes.get(id(block_hashes), (0, 0, None))
        # The id may have been that of a finished request. Each hash covers all before it, so the last one tells.
        if 0 < count <= len(block_hashes) and block_hashes[count - 1] == last:
            max_length = min(max_length, prompt)
        return super().find_longest_cache_hit(block_hashes, max_length, *args, **kwargs)


def _remember(table: OrderedDict[Any, Any], key: Any, value: Any) -> None:
    table[key] = value
    table.move_to_end(key)
    if len(table) > _MAX_REMEMBERED:
        table.popitem(last=False)
