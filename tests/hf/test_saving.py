"""A cache that is saved and loaded, or copied, goes on as the original does."""

import copy
import pickle

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import longthink
from longthink.policies import needs_budget
from tests.grids import by_day, slow_but
from tests.models import prompt
from tests.variants import BUILT_IN, PAGE, keep_first, override

GREEDY = dict(do_sample=False)
POLICIES = BUILT_IN | {"keep_first": keep_first()(steps=6, page_size=PAGE, then=BUILT_IN["raas"])}
PADDED = (9, 23)
STAGES = [("prompt", PADDED), ("decoded", PADDED), ("second turn", PADDED), ("second turn", (23,))]
CELLS = [(name, *stage) for name in POLICIES for stage in STAGES]


def budget_of(policy):
    return {"budget": 72} if needs_budget(policy) else {}


class Talk:
    """A conversation with a model, token by token the same for every cache that it is told to go on with."""

    def __init__(self, model, lengths):
        self.model = model
        self.ids, self.mask = prompt(lengths)

    def extended(self, ids):
        other = copy.copy(self)
        other.mask = torch.cat([self.mask, self.mask.new_ones(len(ids), ids.shape[1])], 1)
        other.ids = torch.cat([self.ids, ids], 1)
        return other

    def read(self, cache):
        """Read the prompt, and add the token that follows it."""
        positions = (self.mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            logits = self.model(
                self.ids, attention_mask=self.mask, position_ids=positions, past_key_values=cache
            ).logits
        return self.extended(logits[:, -1:].argmax(-1))

    def decode(self, cache, tokens=12):
        ids = self.model.generate(
            self.ids, attention_mask=self.mask, past_key_values=cache, max_new_tokens=tokens, **GREEDY
        )
        return self.extended(ids[:, self.ids.shape[1] :])

    def ask(self, seed=1):
        """Add a question, its rows of different lengths."""
        ids, mask = prompt((12, 5)[: len(self.ids)], seed)
        other = self.extended(ids)
        other.mask[:, -mask.shape[1] :] = mask
        return other

    def go_on(self, cache, seed=1):
        """Tokens of an answer, a question and another answer; and what the cache holds then."""
        return self.answered(cache, seed).ids.tolist(), contents(cache)

    def answered(self, cache, seed=1):
        return self.decode(cache).ask(seed).decode(cache)


def contents(cache):
    held = [cache.resident_positions(i) for i in range(len(cache.layers))]
    counts = [
        (slots.rows.caps, slots.rows.prompts, slots.later_turns) for slots in (x.slots for x in cache.layers)
    ]
    return held, cache.num_evicted, cache.get_seq_length(), cache.kv_bytes, counts


def at_stage(talk, cache, stage):
    talk = talk.read(cache)
    if stage != "prompt":
        talk = talk.decode(cache, 50)
    return talk.ask(seed=5).decode(cache, 20) if stage == "second turn" else talk


@pytest.mark.parametrize(
    ("name", "stage", "lengths"),
    slow_but(
        by_day((cell for cell in CELLS if cell[0] == "raas" or cell[1:] == STAGES[2]), CELLS),
        *(cell for cell in CELLS if cell[0] == "raas"),
    ),
)
def test_loaded_twice_it_goes_on_twice_as_the_original_does(model, tmp_path, name, stage, lengths):
    policy, path = POLICIES[name], tmp_path / "cache.safetensors"
    with longthink.make_cache(model, policy=policy, **budget_of(policy)) as cache:
        talk = at_stage(Talk(model, lengths), cache, stage)
        assert bool(cache.num_evicted) == (stage != "prompt" and name not in ("dense", "quest"))
        cache.save(path)
        given = policy if name == "keep_first" else None
        loaded = [longthink.load_cache(model, path, policy=given) for _ in range(2)]
        saved = contents(cache)
        assert [contents(one) for one in loaded] == [saved] * 2
        goes_on = talk.go_on(cache)
        assert goes_on[1] != saved
        for one in loaded:
            assert talk.go_on(one) == goes_on
            one.close()


def test_with_a_decode_budget_the_slots_of_every_turn_are_there_again(model, tmp_path):
    with longthink.make_cache(model, policy="raas", decode_budget=32) as cache:
        talk = at_stage(Talk(model, PADDED), cache, "second turn")
        cache.save(tmp_path / "cache")
        with longthink.load_cache(model, tmp_path / "cache") as loaded:
            assert talk.go_on(loaded) == talk.go_on(cache)


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "float16"])
def test_the_format_of_keys_and_values_stays(model, tmp_path, kv_dtype):
    with longthink.make_cache(model, budget=80, kv_dtype=kv_dtype) as cache:
        talk = at_stage(Talk(model, (23,)), cache, "decoded")
        cache.save(tmp_path / "cache")
        with longthink.load_cache(model, tmp_path / "cache") as loaded:
            assert loaded.summary() == cache.summary()
            assert loaded.kv_dtype == kv_dtype
            assert talk.go_on(loaded) == talk.go_on(cache)


def test_a_new_cache_can_be_saved(model, tmp_path):
    path = tmp_path / "cache"
    with longthink.make_cache(model, policy="raas", decode_budget=32, batch_size=2) as cache:
        cache.save(path)
        with longthink.load_cache(model, path) as loaded:
            assert loaded.summary() == cache.summary()
            with pytest.raises(longthink.CacheStateError, match="batch_size=2"):
                Talk(model, (23,)).read(loaded)
            talk = Talk(model, PADDED)
            assert talk.go_on(loaded) == talk.go_on(cache)


def test_a_closed_cache_can_be_saved_and_is_loaded_open(model, tmp_path):
    with longthink.make_cache(model, policy="raas", budget=128) as cache:
        talk = at_stage(Talk(model, (23,)), cache, "decoded")
    cache.save(tmp_path / "cache")
    assert not cache.binding.is_open
    with longthink.load_cache(model, str(tmp_path / "cache")) as loaded, cache:
        assert talk.go_on(loaded) == talk.go_on(cache)


def test_under_inference_mode(model, tmp_path):
    with longthink.make_cache(model, policy="raas", budget=128) as cache:
        with torch.inference_mode():
            talk = at_stage(Talk(model, PADDED), cache, "second turn")
            cache.save(tmp_path / "cache")
            loaded = longthink.load_cache(model, tmp_path / "cache")
        with loaded:
            assert talk.go_on(loaded) == talk.go_on(cache)


def test_rows_of_an_engine_that_came_at_different_times(model, tmp_path):
    """Such rows have no columns in common."""
    with longthink.make_cache(model, policy="raas", decode_budget=32) as cache, torch.no_grad():
        other = cache.fresh()
        Talk(model, (23,)).read(cache)
        Talk(model, (9,)).read(other)
        cache.adopt(1, other)
        cache.save(tmp_path / "cache")
        with longthink.load_cache(model, tmp_path / "cache") as loaded:
            tokens = torch.tensor([[5], [6]])
            for i in range(40):
                logits = [
                    model(tokens, position_ids=torch.tensor([[23 + i], [9 + i]]), past_key_values=one).logits
                    for one in (cache, loaded)
                ]
                assert torch.equal(*logits)
                tokens = logits[0].argmax(-1)
            assert contents(loaded) == contents(cache)


def test_an_interrupted_or_unfinished_cache_is_refused(model, tmp_path):
    path, ids = tmp_path / "cache", prompt((24,))[0]
    with longthink.make_cache(model, policy="raas", budget=128) as cache:
        for _ in range(2):  # the first prompt, and that of a later turn
            with cache.begin_chunked_prefill(24), torch.no_grad():
                model(ids[:, :8], past_key_values=cache)
                with pytest.raises(longthink.CacheStateError, match="middle of a chunked prefill"):
                    cache.save(path)
                model(ids[:, 8:], past_key_values=cache)
            cache.save(path)
            path.unlink()
        keys = torch.zeros(1, 2, 1, 16)
        cache.update(keys, keys, 0)
        with pytest.raises(longthink.CacheStateError, match="interrupted"):
            cache.save(path)
        assert not path.exists()


def test_a_step_that_fails_inside_a_layer_is_an_interrupted_one(model, tmp_path, monkeypatch):
    with longthink.make_cache(model, policy="raas", budget=128) as cache:
        talk = Talk(model, (24,)).read(cache)
        monkeypatch.setattr(cache.layers[0].slots, "step", None)
        with pytest.raises(TypeError):
            talk.decode(cache)
        with pytest.raises(longthink.CacheStateError, match="interrupted"):
            cache.save(tmp_path / "cache")


@pytest.mark.slow
def test_compiled_steps_go_on_with_a_loaded_cache_and_with_a_copy(model, tmp_path, light_compiler):
    ids, mask = prompt(PADDED)
    more, full = Talk(model, PADDED), dict(compile=True, **GREEDY)
    with longthink.make_cache(model, policy="milestone", decode_budget=48) as cache:
        text = longthink.generate(model, ids, mask, past_key_values=cache, max_new_tokens=60, **full)
        talk = more.extended(text[:, ids.shape[1] :])
        cache.save(tmp_path / "cache")
        with longthink.load_cache(model, tmp_path / "cache") as loaded:
            copied = copy.deepcopy(cache)
            talk = talk.ask()
            answers = [
                longthink.generate(
                    model, talk.ids, talk.mask, past_key_values=one, max_new_tokens=60, **full
                ).tolist()
                for one in (cache, loaded, copied)
            ]
            assert answers[1] == answers[2] == answers[0]
            assert contents(loaded) == contents(copied) == contents(cache)
            copied.close()


# Copies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", slow_but(POLICIES, "raas", "dense"))
def test_copies_of_one_text_go_on_apart(model, name):
    """Two questions on one text: each is answered as if the other had not been asked, and the original stays."""
    policy = POLICIES[name]
    with longthink.make_cache(model, policy=policy, **budget_of(policy)) as cache:
        talk = at_stage(Talk(model, PADDED), cache, "second turn")
        before = contents(cache)
        copies = [copy.deepcopy(cache) for _ in range(3)]
        talks = [talk.answered(one, seed) for one, seed in zip(copies, (1, 2, 1), strict=True)]
        answers = [(later.ids.tolist(), contents(one)) for later, one in zip(talks, copies, strict=True)]
        assert answers[0] == answers[2]
        assert answers[0] != answers[1]
        assert contents(cache) == before
        again = copy.deepcopy(copies[0])
        assert talks[0].go_on(again) == talks[0].go_on(copies[0])
        for one in (*copies, again):
            one.close()


def test_the_layers_of_a_copy_share_its_columns(model):
    with longthink.make_cache(model, policy="raas", budget=128) as cache:
        talk = at_stage(Talk(model, PADDED), cache, "second turn")
        with copy.deepcopy(cache) as copied:
            texts = {id(layer.text) for layer in copied.layers}
            assert len(texts) == 1
            assert texts != {id(layer.text) for layer in cache.layers}
            copied.reset()
            # The columns of the original are as they were: its next mask still fits.
            assert talk.go_on(cache)[1][2] == talk.ids.shape[1] - 1 + 12 + 12 + 12


def test_the_refusal_to_pickle_names_both_ways(model):
    cache = longthink.make_cache(model, budget=64)
    with pytest.raises(longthink.UnsupportedFeatureError, match=r"copy\.deepcopy.*cache\.save.*load_cache"):
        pickle.dumps(cache)
    cache.close()


# Any conversation -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@settings(
    max_examples=20,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    name=st.sampled_from(sorted(BUILT_IN)),
    blocks=st.lists(st.one_of(st.just(1), st.integers(2, 20)), min_size=1, max_size=8),
    decode_budget=st.sampled_from([None, 16, 32]),
    seed=st.integers(0, 99),
)
def test_saving_at_any_point_changes_nothing(model, tmp_path, name, blocks, decode_budget, seed):
    policy, generator = BUILT_IN[name], torch.Generator().manual_seed(seed)
    budget = {"decode_budget": decode_budget} if decode_budget else {"budget": 160}
    budget = budget if needs_budget(policy) else {}
    path = tmp_path / "cache"
    whole, parts = (longthink.make_cache(model, policy=policy, **budget) for _ in range(2))
    for tokens in blocks:
        parts.save(path)
        parts.close()
        parts = longthink.load_cache(model, path)
        ids = torch.randint(3, 97, (2, tokens), generator=generator)
        with torch.no_grad():
            logits = [model(ids, past_key_values=cache).logits for cache in (whole, parts)]
        assert torch.equal(*logits)
        assert contents(parts) == contents(whole)
    whole.close()
    parts.close()


def test_a_policy_of_an_unregistered_class_is_given_as_an_object(model, tmp_path):
    policy = override(BUILT_IN["raas"], "worth")
    with longthink.make_cache(model, policy=policy, budget=64) as cache:
        talk = at_stage(Talk(model, (23,)), cache, "decoded")
        cache.save(tmp_path / "cache")
        with pytest.raises(
            longthink.CacheFileError, match=r"unknown policy 'MyRaaS'.*load_cache\(\.\.\., policy="
        ):
            longthink.load_cache(model, tmp_path / "cache")
        with longthink.load_cache(model, tmp_path / "cache", policy=policy) as loaded:
            assert talk.go_on(loaded) == talk.go_on(cache)
