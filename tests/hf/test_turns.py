"""Conversations: a later question stays in the cache as the first does, and padding between turns is taken back."""

import itertools

import pytest
import torch
from transformers import DynamicCache

import longthink
from longthink.accelerators.table import FUSED
from longthink.policies import grows, make_policy, needs_budget
from longthink.reasoner import Size, grade, load_reasoner, make_problem
from tests import fused
from tests.examples import TIMES
from tests.grids import by_day, covering, slow_but
from tests.models import PAD, build, prompt

PINNED = [
    "raas",
    "raas:sharing=layer",
    "milestone",
    "recall",
    "recency",
    "fifo",
    "random",
    "h2o:pin_prompt=true",
]
POLICIES = longthink.available_policies()
BUDGETS = ({"decode_budget": 32}, {"budget": 80})
GREEDY = dict(do_sample=False, pad_token_id=PAD, suppress_tokens=[PAD])


def budget_of(policy: str, **given: int) -> dict[str, int]:
    return given if needs_budget(make_policy(policy)) else {}


def ask(model, cache, text, question, new_tokens, **options):
    """The conversation so far with another question and its answer."""
    ids = torch.cat([text, question], 1)
    mask = options.pop("mask", torch.ones_like(ids))
    return longthink.generate(
        model, ids, mask, policy=cache.policy, past_key_values=cache, max_new_tokens=new_tokens,
        **GREEDY, **options,
    )  # fmt: skip


def question(tokens, seed=1, rows=1):
    return prompt((tokens,) * rows, seed)[0]


@pytest.mark.parametrize("way", ["longthink.generate", "model.generate"])
@pytest.mark.parametrize("policy", slow_but(PINNED, "raas"))
def test_the_second_question_stays_and_the_bound_grows_by_its_pages(model, policy, way):
    first, second, budget = question(21), question(19, seed=2), 32
    with longthink.make_cache(model, policy=policy, decode_budget=budget) as cache:
        text = ask(model, cache, first[:, :0], first, 50)
        start = text.shape[1]
        if way == "longthink.generate":
            ask(model, cache, text, second, 80, compile=False)
        else:
            cache.open()
            model.generate(torch.cat([text, second], 1), past_key_values=cache, max_new_tokens=80, **GREEDY)
        size = cache.policy.page_size
        # The last token of an answer is read with the next question.
        users = [*range(21), *range(start - 1, start + 19)]
        bound = len({position // size for position in users}) * size + budget
        for layer in range(2):
            for positions in cache.resident_positions(layer)[0]:
                assert set(users) <= set(positions)
                assert bound - size < len(positions) <= bound
        assert cache.num_evicted > 0


@pytest.mark.parametrize("policy", slow_but(PINNED, "raas"))
def test_a_question_that_does_not_fit_changes_nothing(model, policy):
    first, long, short = question(21), question(60, seed=2), question(5, seed=3)
    texts = []
    for refuses in (True, False):
        with longthink.make_cache(model, policy=policy, budget=64) as cache:
            text = ask(model, cache, first[:, :0], first, 60)
            if refuses:
                before = [cache.resident_positions(layer) for layer in range(2)], cache.get_seq_length()
                with pytest.raises(longthink.BudgetError, match=r"budget=64 holds .* for prompts of"):
                    ask(model, cache, text, long, 5)
                after = [cache.resident_positions(layer) for layer in range(2)], cache.get_seq_length()
                assert after == before
            texts.append(ask(model, cache, text, short, 40))
    assert torch.equal(*texts)


@pytest.mark.parametrize("policy", ["raas", "milestone"])
def test_a_question_in_chunks_that_does_not_fit_leaves_the_cache_as_it_was(model, policy):
    first, long = question(21), question(60, seed=2)
    with longthink.make_cache(model, policy=policy, budget=64) as cache:
        text = ask(model, cache, first[:, :0], first, 60)
        with pytest.raises(longthink.BudgetError):
            ask(model, cache, text, long, 5, prefill_chunk_size=16)
        assert cache.get_seq_length() == text.shape[1] - 1
        again = ask(model, cache, text, long[:, :9], 20)
    with longthink.make_cache(model, policy=policy, budget=64) as cache:
        assert torch.equal(ask(model, cache, text[:, :0], first, 60), text)
        assert torch.equal(ask(model, cache, text, long[:, :9], 20), again)


@pytest.mark.parametrize(
    ("policy", "budget"),
    slow_but(
        by_day(covering(POLICIES, BUDGETS), itertools.product(POLICIES, BUDGETS)),
        *(cell for cell in covering(POLICIES, BUDGETS) if cell[0] == "raas"),
    ),
    ids=str,
)
def test_a_question_in_chunks_of_any_size_gets_the_same_answer(model, policy, budget):
    first, second = question(20, rows=2), question(17, seed=2, rows=2)
    budget, texts = budget_of(policy, **budget), []
    for size in (None, 1, 8):
        with longthink.make_cache(model, policy=policy, **budget) as cache:
            text = ask(model, cache, first[:, :0], first, 50, prefill_chunk_size=size)
            texts.append(ask(model, cache, text, second, 30, prefill_chunk_size=size))
    assert all(torch.equal(text, texts[0]) for text in texts)


# Padding between turns --------------------------------------------------------------------------------------------


def chat(model, cache, generate):
    """A batch in which row 0 ends after a few tokens and goes on with padding, which the second turn hides."""
    first, second = question(20, rows=2), question(5, seed=3, rows=2)
    text = generate(first, torch.ones_like(first), cache, 12)
    ids = torch.cat([text, second], 1)
    mask = (ids != PAD).long()
    return ids, mask, generate(ids, mask, cache, 8)


@pytest.fixture
def ending_model():
    model = build("llama")
    text = model.generate(question(20, rows=2), max_new_tokens=12, **GREEDY)
    # A token that row 0 writes early and row 1 does not.
    ends = next(token for token in text[0, 22:].tolist() if token not in text[1, 20:])
    model.generation_config.eos_token_id = ends
    return model


@pytest.mark.parametrize("chunks", [None, 4])
@pytest.mark.parametrize("policy", slow_but(POLICIES, "raas", "dense"))
def test_padding_after_a_row_that_ended_is_as_good_as_never_read(ending_model, policy, chunks):
    model = ending_model

    def library(ids, mask, cache, tokens):
        return model.generate(
            ids, attention_mask=mask, past_key_values=cache, max_new_tokens=tokens, **GREEDY
        )

    def ours(ids, mask, cache, tokens):
        return longthink.generate(
            model, ids, mask, policy=policy, past_key_values=cache, max_new_tokens=tokens,
            prefill_chunk_size=chunks, **GREEDY,
        )  # fmt: skip

    ids, mask, expected = chat(model, DynamicCache(config=model.config), library)
    assert not mask[0].all()
    assert mask[1].all()
    with longthink.make_cache(model, policy=policy, **budget_of(policy, budget=256)) as cache:
        assert torch.equal(chat(model, cache, ours)[2], expected)
        # Neither the padding nor the last tokens, which are not read again.
        lengths = [mask[0].sum() + 7, mask[1].sum() + 7]
        assert [len(row[0]) for row in cache.resident_positions(0)] == lengths
    assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=8, **GREEDY), expected)


@pytest.mark.slow
@pytest.mark.parametrize("policy", PINNED)
def test_a_row_that_ended_early_has_its_question_pinned_and_its_bound(policy):
    """With evictions, also for the padding, over several turns, each of which hides that of all before."""
    model, first = build("llama"), question(9, seed=3, rows=2)
    options = dict(max_new_tokens=70, **GREEDY)
    draft = longthink.generate(model, first, policy=policy, decode_budget=32, **options)
    # Row 0 ends early in the first turn, row 1 does not.
    ends = next(token for token in draft[0, 20:].tolist() if token not in draft[1, 9:])
    model.generation_config.eos_token_id = ends
    with longthink.make_cache(model, policy=policy, decode_budget=32) as cache:
        text = torch.zeros(2, 0, dtype=torch.int64)
        for turn in range(3):
            ids = torch.cat([text, question(9, seed=3 + turn, rows=2)], 1)
            mask = (ids != PAD).long()
            text = longthink.generate(model, ids, mask, policy=policy, past_key_values=cache, **options)
            lengths = mask.sum(1).tolist()
            for layer in range(2):
                for length, heads in zip(lengths, cache.resident_positions(layer), strict=True):
                    for positions in heads:
                        assert set(range(length - 9, length)) <= set(positions)
                        # A turn of 9 tokens, after one that is read with it, touches 3 pages of 16 at most.
                        assert len(positions) <= 32 + (turn + 1) * (48 if cache.policy.page_size > 1 else 10)
    assert not mask[0, :79].all()


@pytest.mark.parametrize(
    ("hides", "shows", "message"),
    [
        (slice(5, 8), None, "hides columns in the middle"),
        (slice(22, 24), None, "hides columns in the middle"),
        (None, slice(0, 3), "shows columns that were hidden"),
    ],
)
def test_masks_that_cannot_be_obeyed_are_refused(model, hides, shows, message):
    ids, mask = prompt((20, 12))
    with longthink.make_cache(model, policy="raas", budget=128) as cache:
        text = longthink.generate(
            model, ids, mask, policy="raas", past_key_values=cache, max_new_tokens=10, **GREEDY
        )
        turn = torch.cat([text, question(5, rows=2)], 1)
        right = torch.cat([mask, torch.ones_like(turn[:, 20:])], 1)
        wrong = right.clone()
        if hides is not None:
            wrong[0, hides] = 0
        if shows is not None:
            wrong[1, shows] = 1
        before = cache.resident_positions(0), cache.get_seq_length()
        with pytest.raises(longthink.UnsupportedFeatureError, match=message):
            ask(model, cache, text, turn[:, 30:], 5, mask=wrong)
        assert (cache.resident_positions(0), cache.get_seq_length()) == before
        answered = ask(model, cache, text, turn[:, 30:], 5, mask=right)
    assert torch.equal(answered, model.generate(turn, attention_mask=right, max_new_tokens=5, **GREEDY))


# Ways of decoding after a later turn ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("policy", by_day(["milestone", "quest"], ["raas", "milestone", "quest"]))
def test_a_compiled_step_after_a_second_turn_writes_the_eager_tokens(policy, light_compiler):
    model, texts = build("qwen2", num_hidden_layers=1).double(), []
    for compiles in (False, True):
        with longthink.make_cache(model, policy=policy, decode_budget=32) as cache:
            text = question(20, rows=2)[:, :0]
            for turn in range(2):
                text = ask(model, cache, text, question(17, seed=turn, rows=2), 60, compile=compiles)
            texts.append(text)
    assert torch.equal(*texts)


@pytest.mark.parametrize(
    "policy", slow_but([policy for policy in POLICIES if not grows(make_policy(policy))], "raas")
)
def test_fused_steps_end_with_a_second_turn(model, policy, monkeypatch):
    """The kernels know the prompt as the first pages of the text."""
    has_kernels = type(make_policy(policy)) in FUSED
    first, second, texts = question(21, rows=2), question(19, seed=2, rows=2), []
    for forced in (False, True):
        if forced:
            fused.force(monkeypatch)
        with longthink.make_cache(model, policy=policy, decode_budget=32) as cache:
            text = ask(model, cache, first[:, :0], first, 50, compile=False)
            slots = [layer.slots for layer in cache.layers]
            assert all(layer.is_fused == (forced and has_kernels) for layer in slots)
            texts.append(ask(model, cache, text, second, 90, compile=False))
            assert not any(layer.is_fused for layer in slots)
            cache.reset()
            ask(model, cache, first[:, :0], first, 2, compile=False)
            assert all(layer.is_fused == (forced and has_kernels) for layer in slots)
    assert torch.equal(*texts)


@pytest.mark.slow
@pytest.mark.parametrize("policy", by_day(["milestone"], ["milestone", "raas:page_size=4", "recency"]))
def test_a_problem_in_two_turns_is_solved_as_in_one(policy):
    """Half of it is in the second turn, behind an answer that the mask hides, and is read again until the end."""
    model, tokenizer = load_reasoner()
    right: dict[str, list[bool]] = {"one": [], "two": []}
    for seed in range(3):
        problem = make_problem(profile="chain", size=Size(ops=12), seed=9_000 + seed)
        ids = tokenizer(problem.prompt, return_tensors="pt")["input_ids"]
        half, tokens = ids.shape[1] // 2, len(problem.solution.split()) + 8
        for turns in right:
            with longthink.make_cache(model, policy=policy, decode_budget=128) as cache:
                text, mask = ids[:, :0], torch.ones_like(ids)
                if turns == "two":
                    text = ask(model, cache, text, ids[:, :half], 40)
                    hidden = torch.zeros_like(text[:, half:])
                    mask = torch.cat([mask[:, :half], hidden, mask[:, half:]], 1)
                question = ids[:, half if turns == "two" else 0 :]
                out = ask(model, cache, text, question, tokens, mask=mask)
            right[turns].append(grade(problem, tokenizer.decode(out[0, mask.shape[1] :])))
    assert right["two"] == right["one"]
    assert sum(right["one"]) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("policy", by_day(["recall"], ["dense", "recall", "milestone", "raas:page_size=4"]))
def test_a_second_question_is_answered_as_well_as_alone(policy):
    """The first problem has names that the second one gives other values."""
    model, tokenizer = load_reasoner()
    right: dict[str, list[bool]] = {"first": [], "alone": [], "second": []}
    shared = 0
    for seed in range(8 if TIMES > 1 else 4):
        sizes = (Size(ops=7), Size(ops=5)) if seed % 2 else (Size(ops=4), Size(ops=8))
        first, second = (
            make_problem(profile=profile, size=size, seed=9_000 + seed)
            for profile, size in zip(("chain", "lemma"), sizes, strict=True)
        )
        shared += len(first.values.keys() & second.values.keys())

        def answer(cache, text, problem, outcome, *, start=0):
            ids = tokenizer(problem.prompt, return_tensors="pt")["input_ids"][:, start:]
            out = ask(model, cache, text, ids, len(problem.solution.split()) + 8)
            right[outcome].append(grade(problem, tokenizer.decode(out[0, text.shape[1] + ids.shape[1] :])))
            return out

        budget = {} if policy == "dense" else {"decode_budget": 128}
        with longthink.make_cache(model, policy=policy, **budget) as cache:
            nothing = torch.empty(1, 0, dtype=torch.int64)
            answer(cache, nothing, second, "alone")
            cache.reset()
            text = answer(cache, nothing, first, "first")
            answer(
                cache, text, second, "second", start=seed % 2
            )  # a later turn has no token that begins a text
            if policy != "dense":
                assert cache.num_evicted > 0
    assert shared >= 4
    wrong = {outcome: answers.count(False) for outcome, answers in right.items()}
    assert max(wrong["first"], wrong["alone"]) <= 1
    assert wrong["second"] <= wrong["alone"] + 1
