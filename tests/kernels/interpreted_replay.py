"""Tokens decoded again from a pool, and by a `LayerCache` token by token. Run by `test_in_interpreter`."""

import pytest
import torch

from longthink.cache import LayerCache
from longthink.config import Budget
from longthink.kernels import Again, reference_replay, triton_replay
from longthink.policies import make_policy

T, KV_HEADS, GROUPS, DIM, PAGES, BLOCKS = 4, 2, 3, 16, 4, 40
PROMPTS, PARTS = (5, 12), (3, 0, 14, 12)
"""Prompt tokens of each row, and how many tokens are decoded again at once."""
POLICIES = ("raas:page_size=4", "raas:page_size=4:sharing=layer:r=0.3", "recency:page_size=4")


def pool(tables, dtype):
    """A pool full of rubbish, laid out as an engine has it: heads before tokens, pages padded."""
    keys, values = torch.full((2, BLOCKS, KV_HEADS, T, DIM + 4), 7.0, dtype=dtype)[..., :DIM].transpose(2, 3)
    low, high = torch.full((2, BLOCKS, KV_HEADS, DIM), 7.0, dtype=dtype)
    position = torch.full((BLOCKS, tables, T + 2), 77, dtype=torch.int32)[..., :T]
    return keys, values, position, low, high, torch.full((BLOCKS, tables, 1), 77, dtype=torch.int32)


def read_prompt(layer, held, blocks, length):
    """Let a layer read a prompt, and put into the pool what it keeps."""
    keys, values, position, low, high, stamp = held
    prompt = [torch.randn(1, heads, length, DIM) for heads in (KV_HEADS * GROUPS, KV_HEADS, KV_HEADS)]
    layer.attend(*prompt)
    for i, block in enumerate(blocks[: -(-length // T)]):
        part = slice(i * T, min((i + 1) * T, length))
        tokens = part.stop - part.start
        keys[block, :tokens] = prompt[1][0, :, part].transpose(0, 1)
        values[block, :tokens] = prompt[2][0, :, part].transpose(0, 1)
        position[block] = -1
        position[block, :, :tokens] = torch.arange(part.start, part.stop, dtype=torch.int32)
        low[block], high[block] = prompt[1][0, :, part].amin(1), prompt[1][0, :, part].amax(1)
        stamp[block] = part.stop - 1


@pytest.mark.parametrize("replay", [reference_replay.replay, triton_replay.replay], ids=["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", POLICIES)
def test_tokens_are_decoded_as_one_by_one(spec, dtype, replay):
    torch.manual_seed(len(spec))
    policy = make_policy(spec)
    stamps, tables = policy.name == "raas", policy.tables(KV_HEADS)
    held = pool(tables, dtype)
    keys, values, position, low, high, stamp = held
    prompt_B = torch.tensor(PROMPTS)
    cap_B = (prompt_B + T - 1) // T + PAGES
    block_BP = (torch.randperm(BLOCKS - 1) + 1)[:16].view(2, 8)
    layers = [LayerCache(policy, Budget(decode_budget=PAGES * T), kv_dtype=dtype) for _ in PROMPTS]
    for row, length in enumerate(PROMPTS):
        read_prompt(layers[row], held, block_BP[row], length)
    seen_B = prompt_B.clone()
    for part in PARTS:
        # The second row is given fewer tokens, and a stranger's token stands between those of the rows.
        count_B = torch.tensor([part, max(part - 1, 0)])
        start_B = torch.tensor([1, part + 2])
        new = [torch.randn(2 * part + 4, h, DIM) for h in (KV_HEADS * GROUPS, KV_HEADS, KV_HEADS)]
        out = torch.full_like(new[0], 3.0)
        in_use = torch.arange(8) < torch.minimum((seen_B + count_B + T - 1) // T, cap_B)[:, None]
        learned = (low, high, stamp, policy.r) if stamps else ()
        replay(
            *new, out,
            Again(
                keys, values, position, torch.where(in_use, block_BP, 0), start_B, count_B, seen_B, prompt_B,
                cap_B, *learned,
            ), 0.25,
        )  # fmt: skip
        for row, layer in enumerate(layers):
            for i in range(int(count_B[row])):
                token = int(start_B[row]) + i
                wanted = layer.attend(*(x[token][None, :, None] for x in new), scaling=0.25)[0, :, 0]
                near = 1e-5 if dtype == torch.float32 else 3e-2
                torch.testing.assert_close(out[token], wanted, atol=near, rtol=near)
        seen_B = seen_B + count_B
        for row, layer in enumerate(layers):
            check_table(layer, position, stamp if stamps else None, block_BP[row, in_use[row]])
    assert all(layer.num_evicted > 8 for layer in layers)


def check_table(layer, position, stamp, blocks):
    """Same tokens, and same stamps of the pages of decoded ones: those of prompts never matter."""
    table = layer.store.table
    for head in range(position.shape[1]):
        mine = {int(p.max()) // T: p for p in position[blocks, head]}
        theirs = {int(p.max()) // T: p for p in table.position_BKS[0, head].view(-1, T) if p.max() >= 0}
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[page], theirs[page]) for page in mine)
        if stamp is not None:
            pages = table.page_BKP[0, head].tolist()
            wanted = dict(zip(pages, table.state["stamp"][0, head].tolist(), strict=True))
            got = {int(position[b, head].max()) // T: int(stamp[b, head, 0]) for b in blocks}
            assert all(got[page] == wanted[page] for page in got if page * T >= int(table.prompt_B[0]))
