"""`longthink.generate` and `make_cache` as a user calls them."""

import pytest
import torch
from transformers import GenerationConfig, TextStreamer

import longthink
from tests.grids import slow_but
from tests.models import EOS, prompt


def test_returns_what_model_generate_returns(model):
    ids, mask = prompt((15, 6))
    options = dict(max_new_tokens=12, do_sample=False, output_scores=True, return_dict_in_generate=True)
    ours = longthink.generate(model, ids, mask, decode_budget=64, **options)
    theirs = model.generate(ids, attention_mask=mask, **options)
    assert type(ours) is type(theirs)
    assert torch.equal(ours.sequences, theirs.sequences)
    torch.testing.assert_close(torch.stack(ours.scores), torch.stack(theirs.scores))


def test_policy_as_object_and_as_text_agree(model):
    ids, mask = prompt((30,))
    options = dict(max_new_tokens=60, do_sample=False, budget=64)
    by_text = longthink.generate(model, ids, mask, policy="raas:r=0.25:page_size=4", **options)
    by_object = longthink.generate(model, ids, mask, policy=longthink.RaaS(r=0.25, page_size=4), **options)
    assert torch.equal(by_text, by_object)


@pytest.mark.parametrize("options", [dict(do_sample=True, temperature=0.9, top_k=20), dict(num_beams=3)])
@pytest.mark.parametrize("rows", [1, 2])
def test_sampling_beams_and_several_answers_match_the_library(model, options, rows):
    ids, mask = prompt((14, 9)[:rows])
    options = dict(max_new_tokens=20, num_return_sequences=3, **options)
    torch.manual_seed(7)
    theirs = model.generate(ids, attention_mask=mask, **options)
    torch.manual_seed(7)
    ours = longthink.generate(model, ids, mask, policy="raas", decode_budget=64, **options)
    assert ours.shape[0] == 3 * rows
    assert torch.equal(ours, theirs)


def test_beams_stay_within_a_small_budget(model):
    ids, mask = prompt((20,))
    out = longthink.generate(
        model, ids, mask, budget=48, max_new_tokens=60, num_beams=3, return_dict_in_generate=True
    )
    cache = out.past_key_values
    assert cache.num_evicted > 0
    assert all(len(head) <= 48 for row in cache.resident_positions(0) for head in row)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["raas:page_size=4", "h2o", "streaming_llm"])
def test_beams_with_eviction_equal_each_beam_decoded_alone(model, policy):
    """Reordering carries every bit of state along: score each finished beam by itself on a fresh cache."""
    ids, _ = prompt((20,))
    options = dict(policy=policy, budget=32)
    beams = longthink.generate(
        model,
        ids,
        max_new_tokens=50,
        num_beams=4,
        num_return_sequences=4,
        length_penalty=0.0,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    for sequence, score in zip(beams.sequences, beams.sequences_scores, strict=True):
        total = 0.0
        with longthink.make_cache(model, **options) as cache, torch.no_grad():
            logits = model(ids, past_key_values=cache).logits[:, -1]
            for token in sequence[20:]:
                total += logits.log_softmax(-1)[0, token].item()
                logits = model(token.view(1, 1), past_key_values=cache).logits[:, -1]
        assert cache.num_evicted > 0
        assert total == pytest.approx(score.item(), rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["raas:page_size=4", "h2o", "streaming_llm", "quest", "random"])
def test_rows_can_be_chosen_and_repeated(model, policy):
    """Row 1 twice and then row 0: each goes on as it would have."""
    ids, _ = prompt((20, 20))
    text = torch.randint(3, 97, (2, 60), generator=torch.Generator().manual_seed(8))
    rows = torch.tensor([1, 1, 0])
    logits = []
    for chosen in (None, rows):
        with longthink.make_cache(model, policy=policy, budget=48) as cache, torch.no_grad():
            model(ids, past_key_values=cache)
            for i in range(60):
                new = text[:, i : i + 1]
                if chosen is not None and i >= 30:
                    new = new[chosen]
                    if i == 30:
                        cache.batch_repeat_interleave(2)
                        cache.batch_select_indices(2 * chosen)
                out = model(new, past_key_values=cache).logits[:, -1]
        logits.append(out)
    torch.testing.assert_close(logits[1], logits[0][rows], rtol=1e-4, atol=1e-4)


def test_streams_tokens_as_they_come(model):
    class Collect(TextStreamer):
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.tokens.append("end")

    ids, _ = prompt((10,))
    streamer = Collect()
    tokens = longthink.generate(model, ids, budget=64, max_new_tokens=15, do_sample=False, streamer=streamer)
    assert streamer.tokens == [*tokens[0].tolist(), "end"]


def test_rows_end_on_their_own(model):
    ids, mask = prompt((12, 12, 12))
    free = model.generate(ids, attention_mask=mask, max_new_tokens=30, do_sample=False)
    end = free[1, 20].item()
    options = dict(max_new_tokens=30, do_sample=False, eos_token_id=end, pad_token_id=EOS)
    theirs = model.generate(ids, attention_mask=mask, **options)
    assert (theirs[1, 21:] == EOS).all()
    assert torch.equal(longthink.generate(model, ids, mask, decode_budget=64, **options), theirs)


def second_turn(model, first, second, **options):
    out = longthink.generate(
        model, first, max_new_tokens=20, do_sample=False, return_dict_in_generate=True, **options
    )
    more = torch.cat([out.sequences, second], 1)
    done = longthink.generate(
        model, more, past_key_values=out.past_key_values, max_new_tokens=20, do_sample=False
    )
    return done, out.past_key_values


@pytest.mark.parametrize(
    "policy", slow_but([p for p in longthink.available_policies() if p != "dense"], "quest", "h2o")
)
def test_second_turn_with_room_equals_the_library(model, policy):
    first, _ = prompt((20,), seed=1)
    second, _ = prompt((17,), seed=2)
    theirs = model.generate(first, max_new_tokens=20, do_sample=False)
    theirs = model.generate(torch.cat([theirs, second], 1), max_new_tokens=20, do_sample=False)
    ours, cache = second_turn(model, first, second, policy=policy, budget=128)
    assert torch.equal(ours, theirs)
    assert cache.num_evicted == 0


@pytest.mark.parametrize(
    "policy",
    slow_but(["raas", "milestone", "h2o", "recency", "streaming_llm", "random"], "raas", "streaming_llm"),
)
def test_second_turn_over_budget_equals_feeding_its_tokens_one_by_one(model, policy):
    first, _ = prompt((20,), seed=1)
    second, _ = prompt((40,), seed=2)
    ours, cache = second_turn(model, first, second, policy=policy, budget=96)
    assert cache.num_evicted > 0
    with longthink.make_cache(model, policy=policy, budget=96) as alone, torch.no_grad():
        tokens = model.generate(first, past_key_values=alone, max_new_tokens=20, do_sample=False)
        tokens = torch.cat([tokens, second], 1)
        new = tokens[:, alone.get_seq_length() :]
        with alone.begin_chunked_prefill(new.shape[1]):
            for token in new.split(1, 1):
                logits = model(token, past_key_values=alone).logits
        for _ in range(20):
            tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], 1)
            logits = model(tokens[:, -1:], past_key_values=alone).logits
    assert torch.equal(ours, tokens)


def test_dense_takes_a_second_turn(model):
    first, _ = prompt((20,), seed=1)
    second, _ = prompt((17,), seed=2)
    theirs = model.generate(first, max_new_tokens=20, do_sample=False)
    theirs = model.generate(torch.cat([theirs, second], 1), max_new_tokens=20, do_sample=False)
    assert torch.equal(second_turn(model, first, second, policy="dense")[0], theirs)


def test_batch_second_turn_with_padding_in_the_middle_equals_each_row_alone(model):
    """Rows of different lengths in the second turn: padding stands between old text and new."""
    first, _ = prompt((20, 20), seed=1)
    second, mask = prompt((30, 11), seed=2)
    with longthink.make_cache(model, policy="raas:page_size=4", decode_budget=24) as cache, torch.no_grad():
        model(first, past_key_values=cache)
        together = model(
            second,
            attention_mask=torch.cat([torch.ones_like(first), mask], 1),
            position_ids=(20 + mask.cumsum(1) - 1).clamp(min=0),
            past_key_values=cache,
        ).logits[:, -1]
        for row in range(2):
            with longthink.make_cache(model, policy="raas:page_size=4", decode_budget=24) as alone:
                model(first[row : row + 1], past_key_values=alone)
                new = second[row : row + 1, mask[row].bool()]
                expected = model(new, past_key_values=alone).logits[:, -1]
            torch.testing.assert_close(together[row], expected[0], rtol=1e-4, atol=1e-4)
            assert cache.resident_positions(1)[row] == alone.resident_positions(1)[0]


def test_user_calls_model_generate_with_a_cache(model):
    ids, mask = prompt((20, 11))
    cache = longthink.make_cache(model, policy="raas", decode_budget=64, batch_size=2)
    tokens = model.generate(
        ids, attention_mask=mask, past_key_values=cache, max_new_tokens=12, do_sample=False
    )
    assert torch.equal(tokens, model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False))
    assert cache.get_seq_length() == 31
    assert len(cache.resident_positions(0)) == 2
    cache.close()
    assert model.config._attn_implementation == "sdpa"


def test_cache_gives_the_model_back_when_it_is_collected(model):
    cache = longthink.make_cache(model, budget=64)
    other = longthink.make_cache(model, budget=64)
    assert model.config._attn_implementation == "longthink"
    del cache
    assert model.config._attn_implementation == "longthink"
    del other
    assert model.config._attn_implementation == "sdpa"


def test_other_caches_work_while_ours_is_open(model):
    ids, mask = prompt((20, 11))
    theirs = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    with longthink.make_cache(model, budget=64):
        assert torch.equal(
            model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False), theirs
        )


def test_reset_cache_is_as_new(model):
    ids, _ = prompt((20,))
    fresh = longthink.generate(model, ids, policy="h2o", budget=32, max_new_tokens=40, do_sample=False)
    with longthink.make_cache(model, policy="h2o", budget=32) as cache:
        model.generate(prompt((25,), seed=9)[0], past_key_values=cache, max_new_tokens=30, do_sample=False)
        cache.reset()
        assert cache.kv_bytes == 0
        again = model.generate(ids, past_key_values=cache, max_new_tokens=40, do_sample=False)
    assert torch.equal(fresh, again)


def test_generation_config_object_is_taken(model):
    ids, _ = prompt((20,))
    config = GenerationConfig(max_new_tokens=9, do_sample=False, pad_token_id=0)
    tokens = longthink.generate(model, ids, budget=64, generation_config=config)
    assert tokens.shape == (1, 29)


def test_what_a_cache_tells_about_itself(model):
    ids, _ = prompt((20,))
    with longthink.make_cache(model, policy="raas", decode_budget=32) as cache:
        model.generate(ids, past_key_values=cache, max_new_tokens=101, do_sample=False)
    # Two layers, two KV heads, head dim 16, float32; 2 prompt pages and 2 decode pages of 16; 120 tokens seen.
    assert cache.kv_bytes == 2 * 2 * 2 * 16 * 4 * 64
    assert cache.dense_kv_bytes == 2 * 2 * 2 * 16 * 4 * 120
    residents = [head for layer in range(2) for row in cache.resident_positions(layer) for head in row]
    assert cache.num_evicted == sum(120 - len(head) for head in residents) > 0
    assert all(set(range(20)) <= set(head) and 119 in head for head in residents)
    summary = cache.summary()
    assert summary["policy"]["name"] == "raas" and summary["decode_budget"] == 32
    assert summary["kv_bytes"] == cache.kv_bytes and summary["columns"] == 120
