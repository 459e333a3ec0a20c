"""Blocks that the scheduler allocates, for any sequence of events: never above the cap, none leaked."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longthink.vllm.manager import BoundedManager
from longthink.vllm.spec import BoundedSpec

PAGE, DECODE_BLOCKS, POOL = 16, 3, 40


def make_manager(reserve, shares_prompt=True, queries=0, caching=True):
    from vllm.v1.core.block_pool import BlockPool

    pool = BlockPool(num_gpu_blocks=POOL, enable_caching=True, hash_block_size=PAGE)
    spec = BoundedSpec(
        block_size=PAGE,
        num_kv_heads=2,
        head_size=32,
        dtype=torch.float32,
        decode_blocks=DECODE_BLOCKS,
        max_prompt_tokens=200,
        max_model_len=4096,
        query_blocks=queries,
        reserve=reserve,
        shares_prompt=shares_prompt,
    )
    options = dict(block_pool=pool, enable_caching=caching, kv_cache_group_id=0, scheduler_block_size=PAGE)
    return BoundedManager(spec, **options), pool


def make_request(name="a", prompt=40, budget=None):
    """A request, with a budget of its own or that of the server."""
    extra = None if budget is None else {"longthink": {"decode_budget": budget}}
    return SimpleNamespace(
        request_id=name,
        num_prompt_tokens=prompt,
        sampling_params=SimpleNamespace(extra_args=extra),
        block_hashes=[],
        shared_prefix_boundary=None,
        num_tokens=300,
    )


events = st.lists(
    st.tuples(st.sampled_from("abc"), st.sampled_from(["grow", "grow", "grow", "free"]), st.integers(1, 70)),
    max_size=60,
)
budgets = st.none() | st.integers(1, DECODE_BLOCKS * PAGE)


@settings(max_examples=150, deadline=None)
@given(
    events=events,
    prompts=st.fixed_dictionaries({name: st.integers(1, 90) for name in "abc"}),
    budgets=st.fixed_dictionaries({name: budgets for name in "abc"}),
    reserve=st.booleans(),
    queries=st.sampled_from([0, 2]),
)
def test_no_request_exceeds_its_cap(events, prompts, budgets, reserve, queries):
    manager, pool = make_manager(reserve, queries=queries, caching=False)
    free, seen, worker = pool.get_num_free_blocks(), dict.fromkeys("abc", 0), dict.fromkeys("abc", ())
    requests = {name: make_request(name, prompts[name], budgets[name]) for name in "abc"}
    for name, event, more in events:
        if event == "free":  # finished, or preempted: then it resumes with all its tokens
            manager.free(name)
            seen[name], worker[name] = 0, ()
            continue
        wanted = (seen[name] or prompts[name]) + (more if seen[name] else 0)
        manager.remove_skipped_blocks(name, seen[name], num_prompt_tokens=prompts[name])
        needed = manager.get_num_blocks_to_allocate(name, wanted, [], seen[name], seen[name], wanted)
        if needed > pool.get_num_free_blocks():
            continue
        before = pool.get_num_free_blocks()
        new = manager.allocate_new_blocks(name, wanted, wanted)
        manager.cache_blocks(requests[name], wanted, replay_boundaries=[])
        assert before - pool.get_num_free_blocks() <= needed
        # vLLM sends new requests' blocks as a whole, later ones as they come.
        worker[name] = (*worker[name], *new) if seen[name] else tuple(manager.req_to_blocks[name])
        seen[name] = wanted
        own = DECODE_BLOCKS if budgets[name] is None else -(-budgets[name] // PAGE)
        cap = -(-prompts[name] // PAGE) + own
        held = min(cap, -(-wanted // PAGE)) + (queries if wanted > prompts[name] else 0)
        blocks = [block for block in manager.req_to_blocks[name] if not block.is_null]
        assert len(blocks) == (cap + queries if reserve else held)
        # The worker's table ends with the null block if the request is full earlier than others.
        ends = own < DECODE_BLOCKS and len(blocks) == cap + queries
        assert [block.is_null for block in worker[name]] == [False] * len(blocks) + [True] * ends
        assert list(worker[name]) == manager.req_to_blocks[name]
    held = sum(not block.is_null for blocks in manager.req_to_blocks.values() for block in blocks)
    assert held + pool.get_num_free_blocks() == free


def test_a_request_never_has_more_blocks_than_the_longest_text():
    """Neither reserved ones nor the end of a table may be written beyond a row of vLLM's block table."""
    manager, _ = make_manager(reserve=True, caching=False)
    manager.kv_cache_spec = dataclasses.replace(manager.kv_cache_spec, max_model_len=60)
    for budget in (None, 2 * PAGE, PAGE):
        manager.remove_skipped_blocks("a", 0, num_prompt_tokens=35)
        manager.get_num_blocks_to_allocate("a", 35, [], 0, 0, 35)
        manager.allocate_new_blocks("a", 35, 35)
        manager.cache_blocks(make_request("a", 35, budget), 35, replay_boundaries=[])
        assert len(manager.req_to_blocks["a"]) == 4
        manager.free("a")


@pytest.mark.parametrize("shares_prompt", [True, False])
def test_only_full_blocks_of_a_shareable_prompt_are_cached(shares_prompt):
    manager, _ = make_manager(reserve=False, shares_prompt=shares_prompt)
    offered = []
    manager.block_pool = SimpleNamespace(
        cache_full_blocks=lambda **facts: offered.append(facts["num_full_blocks"]), hash_block_size=PAGE
    )
    manager.cache_blocks(make_request(), 300, replay_boundaries=[])
    assert offered == ([2] if shares_prompt else [])


def test_cache_hits_of_a_known_request_end_with_its_prompt():
    manager, _ = make_manager(reserve=False)
    hashes = [bytes([number]) * 32 for number in range(9)]
    request = make_request()
    request.block_hashes = hashes
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
