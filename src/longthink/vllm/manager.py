"""Block allocation in the scheduler: no request gets more blocks than its cap.

The number of blocks follows from the lengths of prompt and output and the request's budget. Which page is evicted is
decided by the worker, which overwrites one of the request's own blocks, so nothing has to be reported back to the
scheduler. The worker learns a budget from the block table: the null block follows the last block of a request that is
full before it has as many as the server allows.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

from longthink.vllm.config import requested_budget

_MAX_REMEMBERED = 1 << 16  # requests that are remembered: far more than wait or run at any time


class BoundedManager(FullAttentionManager):  # type: ignore[misc, unused-ignore]
    """Caps the blocks of a request, and offers only full prompt blocks to the prefix cache."""

    # Prompt length, number of hashes and last hash, by id() of a request's block hashes. vLLM looks hits up by class.
    _prompts_by_hashes: OrderedDict[int, tuple[int, int, Any]] = OrderedDict()  # noqa: RUF012

    enable_caching: bool

    def __init__(self, kv_cache_spec: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, *args, **kwargs)
        self._offers_blocks = self.enable_caching
        # Otherwise vLLM would not call `cache_blocks`, the only method that it gives a request and not just its id.
        self.enable_caching = True
        # By request id. Kept across preemption, which frees the blocks.
        self._prompts: OrderedDict[str, int] = OrderedDict()
        self._decode_blocks: OrderedDict[str, int] = OrderedDict()

    def _max_blocks(self, request_id: str) -> int:
        """Most blocks that the request may ever hold."""
        return self.kv_cache_spec.max_blocks(self._prompts[request_id], self._decode_blocks.get(request_id))

    def _cap_tokens(self, request_id: str, num_tokens: int, *, reserve: bool) -> int:
        """Tokens that fill exactly the blocks that the request may hold at `num_tokens`."""
        prompt = self._prompts.get(request_id)
        if prompt is None:
            return num_tokens
        spec = self.kv_cache_spec
        blocks = spec.blocks(prompt, num_tokens, self._decode_blocks.get(request_id))
        if reserve:
            blocks = self._max_blocks(request_id)
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
        # What is reserved for a request whose budget is not known yet must be free, but is not all taken.
        capped = self._cap_tokens(request_id, num_tokens, reserve=self.kv_cache_spec.reserve)
        return super().get_num_blocks_to_allocate(request_id, capped, *args, **kwargs)

    def allocate_new_blocks(self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any) -> list[Any]:
        reserve = self.kv_cache_spec.reserve and request_id in self._decode_blocks
        capped = self._cap_tokens(request_id, num_tokens, reserve=reserve)
        new = super().allocate_new_blocks(request_id, capped, *args, **kwargs)
        if new and self._ends_early(request_id):
            self.req_to_blocks[request_id].append(self._null_block)
            new.append(self._null_block)
        return new

    def _ends_early(self, request_id: str) -> bool:
        """Whether the request has all its blocks, and fewer than the server's budget allows."""
        spec = self.kv_cache_spec
        if self._decode_blocks.get(request_id, spec.decode_blocks) == spec.decode_blocks:
            return False
        held, most = len(self.req_to_blocks[request_id]), self._max_blocks(request_id)
        return held == most < spec.max_blocks(self._prompts[request_id])

    def cache_blocks(self, request: Any, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Record the request's budget; offer the full blocks of its prompt to the prefix cache.

        Decode blocks change in place, and are not offered.
        """
        spec = self.kv_cache_spec
        _remember(self._decode_blocks, request.request_id, self._budget(request))
        if spec.reserve:
            # vLLM sends all blocks of a new request to the worker, so also these.
            self.allocate_new_blocks(request.request_id, num_tokens, num_tokens)
        if not (self._offers_blocks and spec.prefix_cacheable):
            return
        if hashes := request.block_hashes:
            prompt = (request.num_prompt_tokens, len(hashes), hashes[-1])
            _remember(self._prompts_by_hashes, id(hashes), prompt)
        super().cache_blocks(request, min(num_tokens, request.num_prompt_tokens), *args, **kwargs)

    def _budget(self, request: Any) -> int:
        """Decode blocks of a request, which `longthink.vllm.requests` has checked."""
        budget = requested_budget(request.sampling_params and request.sampling_params.extra_args)
        most: int = self.kv_cache_spec.decode_blocks
        return most if budget is None else min(-(-budget // self.block_size), most)

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
