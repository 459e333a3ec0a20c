"""Blocks that the scheduler allocates, for any sequence of events: never above the cap, none leaked."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longthink.vllm.manager import BoundedManager
from longthink.vllm.spec import BoundedSpec

PAGE, DECODE_BLOCKS, POOL = 16, 3, 40


def make_manager(reserve, shares_prompt=True, queries=0):
    from vllm.v1.core.block_pool import BlockPool

    pool = BlockPool(num_gpu_blocks=POOL, enable_caching=True, hash_block_size=PAGE)
    spec = BoundedSpec(
        block_size=PAGE,
        num_kv_heads=2,
        head_size=32,
        dtype=torch.float32,
        decode_blocks=DECODE_BLOCKS,
        max_prompt_tokens=200,
        query_blocks=queries,
        reserve=reserve,
        shares_prompt=shares_prompt,
    )
    options = dict(block_pool=pool, enable_caching=True, kv_cache_group_id=0, scheduler_block_size=PAGE)
    return BoundedManager(spec, **options), pool


events = st.lists(
    st.tuples(st.sampled_from("abc"), st.sampled_from(["grow", "grow", "grow", "free"]), st.integers(1, 70)),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(
    events=events,
    prompts=st.fixed_dictionaries({name: st.integers(1, 90) for name in "abc"}),
    reserve=st.booleans(),
    queries=st.sampled_from([0, 2]),
)
def test_no_request_exceeds_its_cap(events, prompts, reserve, queries):
    manager, pool = make_manager(reserve, queries=queries)
    free, seen = pool.get_num_free_blocks(), dict.fromkeys("abc", 0)
    for name, event, more in events:
        if event == "free":  # finished, or preempted: then it resumes with all its tokens
            manager.free(name)
            seen[name] = 0
            continue
        wanted = (seen[name] or prompts[name]) + (more if seen[name] else 0)
        manager.remove_skipped_blocks(name, seen[name], num_prompt_tokens=prompts[name])
        needed = manager.get_num_blocks_to_allocate(name, wanted, [], seen[name], seen[name], wanted)
        if needed > pool.get_num_free_blocks():
            continue
        new = manager.allocate_new_blocks(name, wanted, wanted)
        assert len(new) == needed
        seen[name] = wanted
        cap = -(-prompts[name] // PAGE) + DECODE_BLOCKS
        held = min(cap, -(-wanted // PAGE)) + (queries if wanted > prompts[name] else 0)
        assert len(manager.req_to_blocks[name]) == (cap + queries if reserve else held)
    held = sum(len(blocks) for blocks in manager.req_to_blocks.values())
    assert held + pool.get_num_free_blocks() == free


@pytest.mark.parametrize("shares_prompt", [True, False])
def test_only_full_blocks_of_a_shareable_prompt_are_cached(shares_prompt):
    manager, _ = make_manager(reserve=False, shares_prompt=shares_prompt)
    offered = []
    manager.block_pool = SimpleNamespace(
        cache_full_blocks=lambda **facts: offered.append(facts["num_full_blocks"]), hash_block_size=PAGE
    )
    request = SimpleNamespace(
        request_id="a", num_prompt_tokens=40, block_hashes=[], shared_prefix_boundary=None, num_tokens=300
    )
    manager.cache_blocks(request, 300, replay_boundaries=[])
    assert offered == ([2] if shares_prompt else [])


def test_cache_hits_of_a_known_request_end_with_its_prompt():
    manager, _ = make_manager(reserve=False)
    hashes = [bytes([number]) * 32 for number in range(9)]
    request = SimpleNamespace(
        request_id="a", num_prompt_tokens=40, block_hashes=hashes, shared_prefix_boundary=None
    )
    everything = SimpleNamespace(
        get_cached_block=lambda block_hash, groups: [block_hash], hash_block_size=PAGE
    )

    def hit():
        spec = manager.kv_cache_spec
        return manager.find_longest_cache_hit(hashes, 140, [0], everything, spec, False, PAGE)[1]

    assert hit() == 128
    manager.block_pool = SimpleNamespace(cache_full_blocks=lambda **facts: None, hash_block_size=PAGE)
    manager.cache_blocks(request, 300, replay_boundaries=[])
    assert hit() == 32
    hashes[:] = [bytes([number]) * 32 for number in range(9, 18)]  # another request at the same address
    assert hit() == 128
