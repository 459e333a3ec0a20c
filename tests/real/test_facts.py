"""A pretrained model recalls a fact from its own text, and cannot once a window has dropped it."""

import pytest

from longthink.hf import Request
from longthink.lab.evaluate import facts
from longthink.lab.evaluate.given import Given, decode_given
from longthink.lab.evaluate.grading import Grader
from longthink.lab.evaluate.plan import CacheConfig
from longthink.lab.evaluate.tasks import load_tasks, prompt_ids

pytestmark = pytest.mark.slow
PROBLEMS = 20


@pytest.mark.parametrize("distance", [50, 200, 501])
def test_distances_are_exact_and_texts_of_one_length(tokenizer, distance):
    def encoded(text):
        return tokenizer(f" {text}", add_special_tokens=False)["input_ids"]

    for seed in range(PROBLEMS):
        fact, ids = facts.make_fact(seed), facts.given_ids(seed, distance, tokenizer)
        told, asked = encoded(fact), encoded(fact.kind.ask(fact.place))
        assert len(ids) == distance + 64
        assert ids[-len(asked) :] == asked
        end = len(ids) - len(asked) - distance
        assert ids[end - len(told) : end] == told
        # The pieces are those of the whole text.
        assert encoded(tokenizer.decode(ids).strip()) == ids


def right(model, tokenizer, config, problems):
    """Problems answered right at distance 100."""
    (task,) = load_tasks(["fact/100"], count=problems, given=True)
    texts = (
        Given(
            Request(
                key=item.id,
                tokens=tuple(prompt_ids(item, tokenizer)),
                max_new_tokens=task.max_new_tokens,
                tag=item,
            ),
            tuple(facts.given_ids(int(item.id), 100, tokenizer)),
        )
        for item in task.items
    )
    with Grader() as grader:
        return sum(
            grader.grade(done.request.tag, tokenizer.decode(done.tokens)).correct
            for done in decode_given(model, config, texts, rows=problems)
        )


def test_dense_answers_most_and_a_short_window_nearly_none(model, tokenizer):
    assert right(model, tokenizer, CacheConfig("dense", None, None), 12) >= 8
    assert right(model, tokenizer, CacheConfig("recency", None, 64), 8) <= 1
