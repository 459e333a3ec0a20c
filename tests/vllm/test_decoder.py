"""Decode steps over blocks, without an engine: outputs equal those of `LayerCache`, and nothing reads the device."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from longthink import kernels
from longthink.cache import LayerCache
from longthink.config import Budget
from longthink.errors import UnsupportedFeatureError
from longthink.policies import Policy, make_policy, with_page_size
from longthink.vllm.attention import CpuAttention, KernelAttention, PrefillBatch
from longthink.vllm.builder import BoundedBuilder
from longthink.vllm.config import check_policy, layer_policies
from longthink.vllm.decoder import BlockDecoder
from longthink.vllm.observe import ObserveOptions
from longthink.vllm.pool import DecodeBatch, PagePool, page_bytes, query_blocks
from longthink.vllm.spec import BoundedSpec
from tests.recording import Recording
from tests.variants import subclasses, wrappers

LAYERS, BLOCKS, HEADS, KV_HEADS, DIM, PAGE = 2, 40, 4, 2, 32, 16
PROMPTS, DECODE_PAGES = (5, 37), 4
SCALING = DIM**-0.5


class NoSync(TorchDispatchMode):
    """Fails on operations that synchronise with a GPU: those that read a value, or whose shape depends on one."""

    SYNCS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique", "is_nonzero")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert not any(name == sync or name.startswith("_unique") for sync in self.SYNCS), name
        return func(*args, **(kwargs or {}))


KV_BYTES = KV_HEADS * PAGE * 2 * DIM * 4


def make_pool(policy, *, transposed, device="cpu"):
    """Memory as vLLM allocates it: layer after layer, pages padded, filled with garbage."""
    page = page_bytes(policy, KV_HEADS, DIM, torch.float32, KV_BYTES)
    memory = torch.full((LAYERS * BLOCKS * page,), 77, dtype=torch.int8, device=device)
    shape, strides = (BLOCKS, KV_HEADS, PAGE, 2 * DIM), (page // 4, PAGE * 2 * DIM, 2 * DIM, 1)
    floats = memory.view(torch.float32)
    caches = [floats.as_strided(shape, strides, layer * BLOCKS * page // 4) for layer in range(LAYERS)]
    return PagePool(policy, caches, transposed=transposed)


def make_batch(block_BP, query_BE, positions):
    now_B, prompt_B = torch.tensor(positions), torch.tensor(PROMPTS)
    cap_B = (prompt_B + PAGE - 1) // PAGE + DECODE_PAGES
    count_B = torch.minimum(now_B // PAGE + 1, cap_B)
    used = torch.arange(block_BP.shape[1]) < count_B[:, None]
    return DecodeBatch(torch.where(used, block_BP, 0), now_B, prompt_B, cap_B, count_B, query_BE)


class InOrder(Policy):
    """Accumulates what it observes, so that the steps of a page must be observed in order."""

    name = "in_order"
    needs = frozenset({"weights"})

    def init_state(self, shape, device):
        return {"worth": torch.zeros(shape.B, shape.K, shape.P, device=device)}

    def worth(self, table):
        return table.state["worth"]

    def observe(self, table, step):
        table.state["worth"].mul_(-0.9).add_(kernels.page_mass(step.weights_BKGS, table.page_size).amax(2))


POLICIES = [
    "raas",
    "raas:sharing=layer",
    "raas:score=exact",
    "milestone:alpha=0.1",
    "random",
    "recency:page_size=16",
]


@pytest.mark.parametrize("by_cpu", [False, True])
@pytest.mark.parametrize("spec", [*POLICIES, InOrder()])
def test_blocks_are_slots(spec, by_cpu):
    check_blocks_are_slots(spec, by_cpu, compiles=False)


def served() -> dict[str, Policy]:
    """Subclasses and wrappers of built-in policies that the plugin accepts."""
    found = {}
    for name, policy in (*subclasses(), *wrappers()):
        if policy.page_size > 1 or name.startswith(("recency", "keep_first: recency")):
            policy = with_page_size(policy, PAGE)
        try:
            check_policy(policy)
            layer_policies(policy, range(LAYERS))
        except UnsupportedFeatureError:
            continue
        found[name] = policy
    return found


SERVED = served()


def test_which_subclasses_are_accepted():
    """For the policies that it serves, every hook but those that need what blocks do not store."""
    refused = {name for name, _ in (*subclasses(), *wrappers())} - SERVED.keys()
    assert {name.split(": ")[0] for name in SERVED} == {
        "raas", "raas exact", "raas layer", "milestone", "random", "recency", "keep_first"
    }  # fmt: skip
    assert {name for name in refused if name.startswith(("raas", "milestone"))} == {
        f"{name}: for_layer" for name in ("raas", "raas exact", "raas layer", "milestone")
    }


@pytest.mark.parametrize("name", SERVED)
def test_a_subclass_or_wrapper_is_right_in_blocks(name):
    check_blocks_are_slots(SERVED[name], by_cpu=True, compiles=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "by_cpu"), [("raas", True), ("milestone:alpha=0.1", True), ("milestone:alpha=0.1", False)]
)
def test_compiled_blocks_are_slots(spec, by_cpu):
    check_blocks_are_slots(spec, by_cpu, compiles=True)


@pytest.mark.parametrize("spec", POLICIES)
def test_the_layers_of_a_step_can_be_captured_once_and_replayed(spec):
    check_blocks_are_slots(spec, by_cpu=False, compiles=False, recording=Recording())


def check_blocks_are_slots(spec, by_cpu, *, compiles, recording=None):
    policy = make_policy(spec) if isinstance(spec, str) else spec
    torch.manual_seed(0)
    pool = make_pool(policy, transposed=by_cpu)
    attention = (
        CpuAttention(pool, SCALING, HEADS) if by_cpu else KernelAttention(pool, SCALING, compiles=compiles)
    )
    policies = [policy.for_layer(layer) for layer in range(LAYERS)]
    options = {"compiles": compiles, "static_buffers": recording is not None}
    decoder = BlockDecoder(pool, policies, attention, ObserveOptions(HEADS, SCALING, None), 8, **options)
    slots = [[LayerCache(p, Budget(decode_budget=DECODE_PAGES * PAGE)) for _ in PROMPTS] for p in policies]
    queries = query_blocks(policy, HEADS, KV_HEADS)
    query_BE, block_BP = (torch.randperm(BLOCKS - 1)[:18].view(2, 9) + 1).split([queries, 9 - queries], 1)
    for row, length in enumerate(PROMPTS):
        prefill(decoder, slots, block_BP[row : row + 1], row, length)
    drawn, out = torch.zeros(LAYERS, 2, HEADS + 2 * KV_HEADS, DIM), torch.zeros(LAYERS, 2, HEADS, DIM)
    new = drawn.split([HEADS, KV_HEADS, KV_HEADS], 2)
    for later in range(9 * PAGE):
        positions = [length + later for length in PROMPTS]
        drawn.normal_()
        opens = torch.tensor([row for row, position in enumerate(positions) if position % PAGE == 0])
        batch = make_batch(block_BP, query_BE, positions)
        with contextlib.nullcontext() if compiles else NoSync():
            admitting = torch.arange(2) if later == 0 and decoder.admits else None
            opening = opens if len(opens) else None
            context = decoder.begin(batch, opening=opening, evicts=True, admitting=admitting)
            if recording is not None and later > 0:
                recording.replay()
            else:
                with recording or contextlib.nullcontext():
                    for layer in range(LAYERS):
                        decoder.layer(context, layer, tuple(x[layer] for x in new), out[layer])
                    decoder.finish(context)
        for layer, row in ((layer, row) for layer in range(LAYERS) for row in range(2)):
            wanted = slots[layer][row].attend(*(x[layer, row][None, :, None] for x in new), scaling=SCALING)
            torch.testing.assert_close(out[layer, row], wanted[0, :, 0], atol=2e-5, rtol=2e-5)
    held = pool.position_LXKT[:, batch.block_BP]  # L x B x P x K x T
    for layer, row in ((layer, row) for layer in range(LAYERS) for row in range(2)):
        used = held[layer, row, : int(batch.count_B[row])].transpose(0, 1).flatten(1)
        mine = [sorted(p for p in head if p >= 0) for head in used.tolist()]
        assert mine * (KV_HEADS // len(mine)) == slots[layer][row].resident_positions()[0]


def prefill(decoder, slots, block_1P, row, length):
    pages, position = -(-length // PAGE), torch.arange(length)
    filled = torch.tensor([min(PAGE, length - page * PAGE) for page in range(pages)])
    decoder.pool.start_prompt_pages(block_1P[0, :pages], torch.arange(pages), filled)
    slot = block_1P[0, position // PAGE] * PAGE + position % PAGE
    batch = PrefillBatch([0, length], [length], block_1P, slot, block_1P[0, :pages], filled)
    plan = decoder.attention.plan_prefill(batch)
    for layer in range(LAYERS):
        new = torch.randn(length, HEADS + 2 * KV_HEADS, DIM).split([HEADS, KV_HEADS, KV_HEADS], 1)
        new = tuple(x.contiguous() for x in new)
        out = torch.zeros(length, HEADS, DIM)
        decoder.attention.prefill(layer, batch, plan, new, out)
        decoder.pool.compute_prompt_bounds(layer, batch.page_block_B, batch.page_filled_B)
        wanted = slots[layer][row].attend(*(x.transpose(0, 1)[None] for x in new), scaling=SCALING)
        torch.testing.assert_close(out, wanted[0].transpose(0, 1), atol=2e-5, rtol=2e-5)


def make_builder(spec, device):
    policy = make_policy(spec)
    pool = make_pool(policy, transposed=False, device=device)
    policies = [policy.for_layer(layer) for layer in range(LAYERS)]
    options = dict(block_size=PAGE, num_kv_heads=KV_HEADS, head_size=DIM, dtype=torch.float32)
    queries = query_blocks(policy, HEADS, KV_HEADS)
    sizes = dict(decode_blocks=DECODE_PAGES, max_prompt_tokens=64, max_model_len=4096, query_blocks=queries)
    kv_spec = BoundedSpec(**options, **sizes)
    names = [f"layers.{layer}.attn" for layer in range(LAYERS)]
    builder = BoundedBuilder(kv_spec, names, SimpleNamespace(), device)
    builder._decoder = BlockDecoder(
        pool,
        policies,
        KernelAttention(pool, SCALING),
        ObserveOptions(HEADS, SCALING, None),
        8,
        static_buffers=True,
    )
    return builder, names


def one_token_each(length, prompts, table):
    """Attention metadata of vLLM's model runner for a batch."""
    return SimpleNamespace(
        num_reqs=len(length),
        max_query_len=1,
        seq_lens=length.to(table.device),
        seq_lens_cpu_upper_bound=length,
        rswa_prefix_lens=torch.tensor(prompts, device=table.device),
        block_table_tensor=table,
    )


@pytest.mark.parametrize("spec", POLICIES)
def test_nothing_is_read_from_the_device_in_a_step(spec):
    """A whole step, from vLLM's metadata to the last layer, on the meta device, whose tensors have no values.

    Whatever would synchronise with a GPU raises there: reading a value, a copy to the host, a data-dependent shape.
    """
    device = torch.device("meta")
    builder, names = make_builder(spec, device)
    table = torch.zeros(len(PROMPTS), BLOCKS, dtype=torch.int32, device=device)
    for later in (1, 12, 188, 190):  # no page opens, pages open, pages are evicted, no page opens
        metadata = builder.build(0, one_token_each(torch.tensor(PROMPTS) + later, PROMPTS, table))
        for name in names:
            new = torch.zeros(len(PROMPTS), HEADS + 2 * KV_HEADS, DIM, device=device)
            out = torch.zeros(len(PROMPTS), HEADS, DIM, device=device)
            metadata.run(name, new.split([HEADS, KV_HEADS, KV_HEADS], 1), out)


@pytest.mark.parametrize("spec", ["raas", "milestone:alpha=0.1"])
def test_steps_on_a_gpu_have_one_shape_and_padding_rows_write_to_no_request(spec):
    builder, names = make_builder(spec, torch.device("cpu"))
    builder._static = True
    # The third row is padding: its row of the block table is stale.
    table = torch.randperm(BLOCKS - 1)[:36].view(3, 12).to(torch.int32) + 1
    stale = table[2].long()
    pool, seen = builder._decoder.pool, []
    for later in (1, 12, 60, 61):
        metadata = builder.build(
            0, one_token_each(torch.tensor([5 + later, 37 + later, 0]), (5, 37, 99), table)
        )
        _, context = metadata.decode
        read = (*context.batch, context.active_B, context.block_LBK, *context.plan)
        seen.append([(tensor.shape, tensor.stride(), tensor.data_ptr()) for tensor in read])
        before = pool._first.untyped_storage().tolist()
        for name in names:
            new = torch.randn(3, HEADS + 2 * KV_HEADS, DIM)
            metadata.run(name, new.split([HEADS, KV_HEADS, KV_HEADS], 1), torch.zeros(3, HEADS, DIM))
        assert pool._first.untyped_storage().tolist() != before
        assert (pool.position_LXKT[:, stale] == 77 * 0x01010101).all()
        assert (pool.keys_LXKTD[:, stale] == pool.keys_LXKTD[0, stale[0], 0, 0, 0]).all()
    assert all(each == seen[0] for each in seen)


@pytest.mark.parametrize("spec", ["raas", "milestone:alpha=0.1"])
def test_a_step_that_goes_on_from_the_last_one_does_what_it_would_do_afresh(spec):
    """Memory and outputs are the same, whatever happens to the batch in between."""
    torch.manual_seed(0)
    (going_on, names), (afresh, _) = (make_builder(spec, torch.device("cpu")) for _ in range(2))
    for builder in (going_on, afresh):
        builder._static, builder._decoder._buffers = False, None
    table, prompts = (torch.randperm(BLOCKS - 1)[:36].view(3, 12) + 1).to(torch.int32), [5, 37, 12]
    advanced, inner = [], going_on._decoder.advance
    going_on._decoder.advance = lambda *arguments: advanced.append(now.tolist()) or inner(*arguments)
    now = torch.tensor([0, 0, 0])
    for step, expected in enumerate([0, 1, 1, 1, 0, 1, 1, 1, 0, 1, 1, 0, 1, 0, 0, 1, 0, 1]):
        now = now + 1
        if step == 0:
            now = torch.tensor([82, 76, 82])  # the second row opens a page in step 4
        elif step == 8:  # rows change places
            now, table, prompts = now[[1, 0, 2]], table[[1, 0, 2]], [37, 5, 12]
        elif step == 11:
            table = table.clone()
            table[2, 1] = 39
        elif step == 13:
            prompts = [37, 6, 12]
        elif step == 14:
            now = now + 16
        elif step == 16:
            now, table, prompts = now[:2], table[:2], prompts[:2]
        before = len(advanced)
        new = torch.randn(len(names), len(now), HEADS + 2 * KV_HEADS, DIM)
        outs = []
        for builder in (going_on, afresh):
            afresh._last = None
            metadata = builder.build(0, one_token_each(now + 1, prompts, table))
            outs.append(torch.zeros(len(names), len(now), HEADS, DIM))
            for layer, name in enumerate(names):
                metadata.run(name, new[layer].split([HEADS, KV_HEADS, KV_HEADS], 1), outs[-1][layer])
        assert len(advanced) - before == expected, step
        assert torch.equal(*outs), step
        assert torch.equal(*(all_bytes(builder._decoder.pool) for builder in (going_on, afresh))), step


def all_bytes(pool):
    storage = pool._first.untyped_storage()
    return torch.empty(0, dtype=torch.int8).set_(storage, 0, (storage.nbytes(),), (1,))


@pytest.mark.parametrize("static", [False, True])
def test_a_request_is_full_where_the_null_block_ends_its_table(static):
    """Its own budget. What follows the blocks of a request that is not full is left from others."""
    builder, _ = make_builder("raas", torch.device("cpu"))
    builder._static = static
    rows = ([7, 8, 9, 0, 5, 5], [11, 12, 13, 14, 15, 16], [21, 22, 23, 3, 3, 0], [31, 32, 0, 4, 4, 4])
    table = torch.tensor([[*row, *[6] * 6] for row in rows], dtype=torch.int32)
    # The first three have a prompt of one page, of which the second has the server's four beside it and is full.
    # The last is full with a budget of one page.
    now = torch.tensor([5 * PAGE, 5 * PAGE, 2 * PAGE + 3, 2 * PAGE])
    batch = one_token_each(now + 1, (5, 5, 5, 5), table)
    tokens, _ = builder.build(0, batch).decode
    assert tokens.batch.count_B.tolist() == [3, 5, 3, 2]
    assert tokens.batch.cap_B[[0, 1, 3]].tolist() == [3, 5, 2]
    used = [[block for block in row if block] for row in tokens.batch.block_BP.tolist()]
    assert used == [[7, 8, 9], [11, 12, 13, 14, 15], [21, 22, 23], [31, 32]]
    assert tokens.opening.tolist() == [0, 1, 3]
    assert tokens.evicts
    # Only rows that open a page count, and on a GPU no request with more than two pages is known to have room.
    batch = one_token_each(
        torch.tensor([5 * PAGE + 3, 4 * PAGE + 1, 2 * PAGE + 1, 2 * PAGE + 2]), (5, 5, 5, 5), table
    )
    assert builder.build(0, batch).decode[0].evicts is static


def test_a_stage_of_a_pipeline_has_the_policies_of_its_own_layers():
    """What a policy draws depends on the layer's index in the whole model, not in its stage."""
    policy = make_policy("random:page_size=16")
    pool = make_pool(policy, transposed=False)
    impl = SimpleNamespace(scale=SCALING, num_heads=HEADS, head_size=DIM)
    config = SimpleNamespace(
        additional_config={"longthink": {"policy": "random", "decode_budget": 64}},
        compilation_config=SimpleNamespace(mode=None, static_forward_context={}),
        scheduler_config=SimpleNamespace(max_num_seqs=4),
    )
    options = dict(block_size=PAGE, num_kv_heads=KV_HEADS, head_size=DIM, dtype=torch.float32)
    kv_spec = BoundedSpec(**options, decode_blocks=DECODE_PAGES, max_prompt_tokens=64, max_model_len=4096)
    drawn = []
    for layer in (0, 5):
        name = f"model.layers.{layer}.self_attn.attn"
        config.compilation_config.static_forward_context = {
            name: SimpleNamespace(impl=impl, kv_cache=pool._first)
        }
        decoder = BoundedBuilder(kv_spec, [name], config, torch.device("cpu"))._make_decoder()
        assert decoder._policies == [policy.for_layer(layer)]
        drawn.append(decoder._policies[0].seed)
    assert drawn[0] != drawn[1]
