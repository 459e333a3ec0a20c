"""Models that see: text generated after images, with every kind of cache."""

import pytest
import torch

import longthink
from longthink.errors import UnsupportedModelError
from longthink.hf import make_cache
from tests.grids import slow_but
from tests.vision import IMAGE, build_vision, inputs_with, picture

MODELS = ("qwen2_vl", "qwen2_5_vl")


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return build_vision(request.param)


def ids_after(model, inputs, **options):
    rest = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 24, "do_sample": False} | rest | options
    return longthink.generate(model, inputs["input_ids"], inputs["attention_mask"], **options)


@pytest.mark.parametrize(
    "policy", slow_but(["dense", "recency", "milestone", "quest", "raas", "h2o", "random"], "dense", "raas")
)
def test_with_room_for_all_tokens_are_the_librarys_own(model, policy):
    inputs = inputs_with(picture(84, 112), picture(140, 56, seed=1))
    wanted = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    budget = {} if policy == "dense" else {"budget": 160}
    assert torch.equal(ids_after(model, inputs, policy=policy, **budget), wanted)
    # The image matters: another one gives another text.
    other = inputs_with(picture(84, 112, seed=9), picture(140, 56, seed=8))
    assert not torch.equal(ids_after(model, other, policy=policy, **budget), wanted)


def test_a_bounded_cache_keeps_the_image_and_stays_within_its_budget(model):
    inputs = inputs_with(picture(84, 112))
    prompt = inputs["input_ids"].shape[1]
    with make_cache(model, policy="recency", decode_budget=8) as cache:
        ids_after(model, inputs, past_key_values=cache, max_new_tokens=40)
    images = set((inputs["input_ids"][0] == IMAGE).nonzero().flatten().tolist())
    for held in cache.resident_positions(1)[0]:
        assert len(held) == prompt + 8 and images < set(held)


def test_positions_after_an_image_are_right_when_tokens_were_evicted(model):
    """After images the model's positions run behind the count of tokens; a wrong one would change the logits."""
    inputs = inputs_with(picture(84, 112))
    with make_cache(model, policy="fifo:page_size=1", decode_budget=6) as cache:
        out = ids_after(model, inputs, past_key_values=cache, max_new_tokens=16, output_logits=True,
                        return_dict_in_generate=True)  # fmt: skip
    tokens, prompt = out.sequences, inputs["input_ids"].shape[1]
    # The same by hand: attention masked to what is resident, positions as without eviction.
    last = tokens.shape[1] - 1
    allowed = torch.ones(last, last, dtype=torch.bool).tril()
    for row in range(prompt, last):
        allowed[row, prompt : max(prompt, row - 5)] = False
    longer = inputs | {
        "input_ids": tokens[:, :last],
        "mm_token_type_ids": (tokens[:, :last] == IMAGE).long(),
    }
    del longer["attention_mask"]
    positions, _ = model.model.get_rope_index(
        longer["input_ids"], longer["mm_token_type_ids"], image_grid_thw=inputs["image_grid_thw"],
        attention_mask=torch.ones_like(longer["input_ids"]),
    )  # fmt: skip
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        logits = model(
            **longer, position_ids=positions, attention_mask={"full_attention": allowed[None, None]}
        ).logits
    torch.testing.assert_close(out.logits[-1], logits[:, -1], atol=2e-4, rtol=2e-3)


def test_positions_inside_the_cache_are_refused(model):
    inputs = inputs_with(picture(84, 112))
    with pytest.raises(UnsupportedModelError, match="positions=logical"):
        ids_after(model, inputs, policy="streaming_llm", budget=16)
    ids_after(model, inputs, policy="streaming_llm:positions=logical", budget=16)
