"""The task ``fact``: its texts, exact distances, what the cache holds of the fact, and the samples of a sweep."""

import re

import pytest
import torch

from longthink.config import Budget
from longthink.hf import DecodeStep, PagedCache, Request, Sampling
from longthink.lab.evaluate import facts, forced, given
from longthink.lab.evaluate.files import Item
from longthink.lab.evaluate.given import Given, decode_given
from longthink.lab.evaluate.grading import Grader
from longthink.lab.evaluate.plan import CacheConfig
from longthink.lab.evaluate.settings import make_plan
from longthink.lab.evaluate.sweep import Sweep
from longthink.lab.evaluate.tasks import load_tasks, prompt_ids
from longthink.lab.results.store import ResultStore
from longthink.lab.work.workers import run_work
from longthink.policies import make_policy
from longthink.reasoner import load_reasoner
from tests.bpe import byte_level_bpe
from tests.cli.conftest import call, quiet_environment  # noqa: F401  (fixtures)
from tests.grids import slow_but
from tests.models import build

ENOUGH = 24
"""Problems, six of each kind."""


@pytest.fixture(scope="module")
def tokenizer():
    """Byte-level BPE that has learnt the sentences: most words are one token."""
    rng = facts.random.Random(0)
    told = [str(facts.make_fact(seed)) for seed in range(200)]
    texts = [facts._sentence(rng) for _ in range(600)] + told
    return byte_level_bpe([f" {text}" for text in texts], vocab_size=900, special=["<end>", "<pad>"])


@pytest.fixture(scope="module")
def model():
    return build("qwen2", vocab_size=900, num_hidden_layers=2).double()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("model")
    tokenizer.save_pretrained(folder)
    build("mistral", vocab_size=900).save_pretrained(folder)
    return str(folder)


def encoded(text, tokenizer):
    return tokenizer(f" {text}", add_special_tokens=False)["input_ids"]


def find(part, ids):
    (place,) = (i for i in range(len(ids) - len(part) + 1) if ids[i : i + len(part)] == part)
    return place


# Texts ----------------------------------------------------------------------------------------------------------


def test_a_text_depends_on_the_seed_alone(tokenizer):
    texts = [facts.given_ids(seed, 200, tokenizer) for seed in range(6)]
    assert texts == [facts.given_ids(seed, 200, tokenizer) for seed in range(6)]
    assert len({*map(tuple, texts)}) == 6


def test_a_stored_sample_of_a_seed_means_this_text():
    """The store tells tasks apart by name: texts of the same name must not change."""

    def letters(text, **options):
        return {"input_ids": [*text.encode()]}

    assert bytes(facts.given_ids(0, 160, letters)).decode() == (
        " A goat slept under the old oaks in the morning. The code of the locker at the greenhouse is 6257. The "
        "snow lasted for days, and even the donkey became surprised. The code of the locker at the harbour is "
        "2673. Everybody was proud when the hail finally ended. What is the code of the locker at the greenhouse? "
        "The code of the locker at the greenhouse is"
    )


@pytest.mark.parametrize("distance", [16, 17, 50, 200, 501, 2000])
def test_between_fact_and_question_are_exactly_so_many_tokens(tokenizer, distance):
    for seed in range(ENOUGH if distance < 500 else 8):
        fact, ids = facts.make_fact(seed), facts.given_ids(seed, distance, tokenizer)
        told = encoded(fact, tokenizer)
        asked = encoded(fact.kind.ask(fact.place), tokenizer)
        end = find(told, ids) + len(told)
        assert ids[-len(asked) :] == asked
        assert len(ids) - len(asked) - end == distance
        assert end <= 128


def test_the_texts_of_a_task_have_few_lengths_and_whole_sentences(tokenizer):
    texts = [facts.given_ids(seed, 200, tokenizer) for seed in range(ENOUGH)]
    assert {*map(len, texts)} <= {264, 328}
    for ids in texts:
        *sentences, question, begun = re.split(r"(?<=[.?]) ", tokenizer.decode(ids).strip())
        assert all(sentence[0].isupper() and sentence.endswith(".") for sentence in sentences)
        assert question.startswith("What is the ") and begun.endswith(" is")


def test_the_value_is_there_once_among_others_of_its_kind_and_nothing_comes_twice(tokenizer):
    for seed in range(ENOUGH):
        fact, text = facts.make_fact(seed), tokenizer.decode(facts.given_ids(seed, 500, tokenizer))
        assert re.findall(r"\w+", text).count(fact.value) == 1
        form = re.escape(fact.kind.statement).replace(r"\{place\}", "(.+?)") + r" (\w+)\."
        stated = re.findall(form, text)
        assert len(stated) >= 2
        assert len({place for place, _ in stated}) == len({value for _, value in stated}) == len(stated)
        for ids in (facts.given_ids(seed, 2000, tokenizer),) if seed < 4 else ():
            sentences = re.split(r"(?<=[.?]) ", tokenizer.decode(ids).strip())
            assert len({*sentences}) == len(sentences) > 100


def test_the_longest_text_has_as_many_different_sentences(tokenizer):
    ids = facts.given_ids(1, facts.LONGEST, tokenizer)
    sentences = re.split(r"(?<=[.?]) ", tokenizer.decode(ids).strip())
    assert len({*sentences}) == len(sentences) > 400


def test_short_texts_have_a_distractor_of_the_same_kind_too(tokenizer):
    for seed in range(ENOUGH):
        fact, text = facts.make_fact(seed), tokenizer.decode(facts.given_ids(seed, 64, tokenizer))
        assert text.count(fact.kind.statement.split("{")[0]) >= 3  # fact, distractor, answer


def test_a_tokenizer_without_these_words_gives_exact_distances_as_well():
    _, words = load_reasoner()
    for distance in (50, 200):
        lengths = {len(facts.given_ids(seed, distance, words)) for seed in range(8)}
        assert {(length - distance) % 64 for length in lengths} == {0}


# Tasks and grading ----------------------------------------------------------------------------------------------


def test_names_and_problems():
    names = [task.name for task in load_tasks(["fact"], count=1, given=True)]
    assert names == [f"fact/{distance}" for distance in facts.DISTANCES]
    near, far = load_tasks(["fact/50", "fact/0200"], count=3, seed=7, given=True)
    assert (far.name, near.max_new_tokens) == ("fact/200", facts.MAX_NEW_TOKENS)
    assert [(item.id, item.gold) for item in near.items] == [(item.id, item.gold) for item in far.items]
    assert [item.id for item in near.items] == ["7", "8", "9"]
    assert [item.distance for item in far.items] == [200] * 3
    (one,), (other,) = (
        load_tasks([name], count=5, choose="random", given=True) for name in ("fact/50", "fact/90")
    )
    assert [item.id for item in one.items] == [item.id for item in other.items]
    assert len({item.id for item in one.items}) == 5


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("fact/15", {}, "distance of task 'fact/15'=15 is out of range: allowed is 16 to 8192"),
        ("fact/9000", {}, "9000 is out of range"),
        ("fact/far", {}, "distance of task 'fact/far'='far' is not a number: allowed are 16 to 8192 tokens"),
        ("fact/50/2", {}, r"task='fact/50/2' is unknown: allowed are .*fact\[/distance\]"),
        ("fact/50", {"count": None}, "task 'fact/50' is endless: give a count"),
        (
            "fact/50",
            {"given": False},
            "task 'fact/50' gives the model a text to go on from: only longthink eval",
        ),
    ],
)
def test_wrong_names(name, options, message):
    with pytest.raises(ValueError, match=message):
        load_tasks([name], **{"count": 1, "given": True} | options)


def test_the_prompt_has_no_instruction_to_reason(tokenizer):
    (task,) = load_tasks(["fact/50"], count=1, given=True)
    assert tokenizer.decode(prompt_ids(task.items[0], tokenizer)) == facts.PROMPT


@pytest.mark.parametrize(
    ("text", "answer", "correct"),
    [
        (" 4817. The code of the locker", "4817", True),
        ("4817", "4817", True),
        (" **4817**", "4817", True),
        (" 48170.", "48170", False),
        (" 481", "481", False),
        (" 2210. No, 4817", "2210", False),
        (" not 4817", "not", False),
        ("", None, False),
        (" ...", None, False),
    ],
)
def test_the_first_word_is_the_answer(text, answer, correct):
    item = Item(task="fact/50", id="0", question="q", gold="4817", distance=50)
    with Grader() as grader:
        verdict = grader.grade(item, text)
    assert (verdict.answer, verdict.correct) == (answer, correct)


# Decoding -------------------------------------------------------------------------------------------------------


def requests(tokenizer, distance=50, rows=3, new=6, **more):
    (task,) = load_tasks([f"fact/{distance}"], count=rows, given=True)
    return [
        Given(
            Request(
                key=f"{distance}/{item.id}",
                tokens=tuple(prompt_ids(item, tokenizer)),
                max_new_tokens=new,
                **more,
            ),
            tuple(facts.given_ids(int(item.id), distance, tokenizer)),
        )
        for item in task.items
    ]


def one_by_one(model, config, one):
    """The tokens of the text fed to ordinary decode steps, of one row, and those that follow."""
    bounds = None if config.decode_budget is None else Budget(decode_budget=config.decode_budget)
    tokens = []
    with PagedCache(model, make_policy(config.policy), bounds) as cache, torch.no_grad():
        model(torch.tensor([one.request.tokens]), past_key_values=cache)
        step = DecodeStep(model, cache, compile=False)
        for token in one.text:
            logits_BV = step(torch.tensor([[token]]))
        while True:
            tokens.append(int(logits_BV.argmax()))
            if len(tokens) == one.request.max_new_tokens:
                return tuple(tokens), cache
            logits_BV = step(torch.tensor([[tokens[-1]]]))


@pytest.mark.parametrize(
    "policy", slow_but(["dense", "recency", "raas:page_size=4", "random:page_size=4"], "raas:page_size=4")
)
def test_a_row_is_what_its_tokens_are_one_by_one(model, tokenizer, policy):
    config = CacheConfig(policy, None, None if policy == "dense" else 40)
    batch = requests(tokenizer)
    done = list(decode_given(model, config, batch, rows=2))
    assert [(one.rows, one.finish) for one in done] == [(2, "length")] * 2 + [(1, "length")]
    for one, finished in zip(batch, done, strict=True):
        tokens, cache = one_by_one(model, config, one)
        assert finished.request is one.request
        assert finished.tokens == tokens
        assert (finished.evicted, finished.dense_kv_bytes) == (cache.row_evicted(0), cache.dense_kv_bytes)
        assert finished.kv_bytes_peak == cache.kv_bytes


@pytest.mark.slow
def test_texts_of_different_lengths_are_read_apart_and_blocks_do_not_matter(model, tokenizer, monkeypatch):
    config = CacheConfig("raas:page_size=4", None, 40)
    mixed = [*requests(tokenizer, rows=2), *requests(tokenizer, distance=70, rows=2)]
    mixed = [mixed[i] for i in (0, 2, 1, 3)]
    found = {one.request: one for one in decode_given(model, config, mixed, rows=4)}
    assert [found[one.request].rows for one in mixed] == [2] * 4
    monkeypatch.setattr(forced, "LOGITS_AT_ONCE", 1)
    for one in mixed:
        (alone,) = decode_given(model, config, [one], rows=1)
        together = found[one.request]
        assert (alone.tokens, alone.evicted) == (together.tokens, together.evicted)


def test_the_fact_is_decoded_text_that_can_leave(model, tokenizer, monkeypatch):
    """A window shorter than the distance does not hold it when the question is read; the prompt it holds."""
    held = []
    read = given._read

    def spy(model, cache, batch):
        out = read(model, cache, batch)
        held.append(cache.resident_positions(0))
        return out

    monkeypatch.setattr(given, "_read", spy)
    batch = requests(tokenizer, rows=4)
    for config in (CacheConfig("recency", None, 32), CacheConfig("dense", None, None)):
        list(decode_given(model, config, batch, rows=4))
    window, dense = held
    for row, one in enumerate(batch):
        told = encoded(facts.make_fact(int(one.request.key.split("/")[1])), tokenizer)
        start = len(one.request.tokens) + find(told, list(one.text))
        positions = {*range(start, start + len(told))}
        assert all(positions <= {*kept} for kept in dense[row])
        for kept in window[row]:
            assert not positions & {*kept}
            assert {*range(len(one.request.tokens))} <= {*kept}


def test_a_row_that_stops_is_recorded_as_it_was_then(model, tokenizer, monkeypatch):
    config = CacheConfig("recency", None, 32)
    batch = requests(tokenizer, rows=2)
    whole = list(decode_given(model, config, batch, rows=2))
    end = whole[0].tokens[1]
    assert end not in whole[1].tokens[:3]
    monkeypatch.setattr(model.generation_config, "eos_token_id", end)
    first, second = decode_given(model, config, batch, rows=2)
    assert (first.tokens, first.finish) == (whole[0].tokens[: whole[0].tokens.index(end) + 1], "stop")
    assert second.tokens[:3] == whole[1].tokens[:3]
    assert first.dense_kv_bytes < whole[0].dense_kv_bytes


def test_sampling_depends_on_the_key(model, tokenizer):
    config = CacheConfig("dense", None, None)
    batch = requests(tokenizer, rows=2, sampling=Sampling(temperature=3.0))
    both = [one.tokens for one in decode_given(model, config, batch, rows=2)]
    assert both == [one.tokens for one in decode_given(model, config, batch, rows=1)]
    assert both != [one.tokens for one in decode_given(model, config, requests(tokenizer, rows=2), rows=2)]


def test_nan_and_a_prompt_without_room_are_results(model, tokenizer, monkeypatch):
    batch = requests(tokenizer, rows=2)
    found = list(decode_given(model, CacheConfig("recency", 16, None), batch, rows=2))
    assert [(one.finish, one.tokens) for one in found] == [("no_room", ())] * 2
    assert "budget" in found[0].note
    broken = build("qwen2", vocab_size=900)
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    found = list(decode_given(broken, CacheConfig("recency", None, 32), batch, rows=2))
    assert [(one.finish, one.tokens) for one in found] == [("nan", ())] * 2


# Sweeps ---------------------------------------------------------------------------------------------------------


def sweep(folder, model, **more):
    asked = dict(model=model, tasks="fact/20,fact/50", policies="recency", decode_budgets=32, count=3, rows=2)
    plan, _ = make_plan(asked | dict(device="cpu", seed=0) | more)
    return Sweep(plan, plan.load_tasks(), ResultStore(folder))


def rows(folder):
    return ResultStore(folder, create=False).query(
        "SELECT task, problem, text, answer, gold, correct, finish, prompt_tokens, generated_tokens, evicted, "
        "kv_bytes_peak, dense_kv_bytes FROM samples ORDER BY ALL"
    )


@pytest.mark.slow
def test_samples_are_stored_and_a_sweep_is_resumed(tmp_path, folder, tokenizer):
    first = sweep(tmp_path / "store", folder, count=2)
    run_work(first)
    assert first.total.made == 4
    again = sweep(tmp_path / "store", folder)
    run_work(again)
    assert (again.total.stored, again.total.made) == (4, 2)
    whole = sweep(tmp_path / "whole", folder, rows=3)
    run_work(whole)
    assert rows(tmp_path / "whole") == rows(tmp_path / "store")
    for row in rows(tmp_path / "whole"):
        assert row["gold"] == facts.make_fact(int(row["problem"])).value
        assert row["correct"] == (row["answer"] == row["gold"])
        assert row["prompt_tokens"] == len(tokenizer(facts.PROMPT)["input_ids"])
        assert 1 <= row["generated_tokens"] <= facts.MAX_NEW_TOKENS
        assert row["evicted"] > 0 and row["kv_bytes_peak"] < row["dense_kv_bytes"]


@pytest.mark.slow
def test_workers_make_the_same_samples(tmp_path, folder):
    for name, workers in (("one", 1), ("two", 2)):
        work = sweep(tmp_path / name, folder, tasks="fact/20,fact/50", count=2)
        run_work(work, workers=workers)
        assert work.lost_workers == 0
    assert rows(tmp_path / "one") == rows(tmp_path / "two")


@pytest.mark.slow
def test_texts_and_ordinary_problems_go_through_one_sweep(tmp_path, folder):
    file = tmp_path / "mine.jsonl"
    file.write_text('{"question": "How many?", "answer": "4"}\n')
    asked = dict(data=str(file), tasks="fact/20,mine,fact/50", count=1, max_new_tokens=3)
    mixed = sweep(tmp_path / "store", folder, **asked)
    run_work(mixed)
    assert {row["task"]: row["generated_tokens"] for row in rows(tmp_path / "store")} == {
        "fact/20": 3, "fact/50": 3, "mine": 3,
    }  # fmt: skip


def test_what_the_context_has_no_room_for_is_a_sample(tmp_path, folder):
    long = sweep(tmp_path / "store", folder, tasks="fact/4096", count=1)
    run_work(long)
    (row,) = rows(tmp_path / "store")
    assert (row["finish"], row["generated_tokens"], row["correct"]) == ("no_room", 0, False)


def test_the_command(call, tmp_path, folder):  # noqa: F811  (fixture)
    asked = ("eval", "--tasks", "fact/50", "-n", 4, "--model", folder, "--device", "cpu")
    code, out, err = call(
        *asked, "--policies", "dense,recency", "--decode-budgets", 32, "--out", tmp_path / "store"
    )
    assert code == 0, err
    assert "8 samples made, 0 were there" in err
    assert out.count("fact/50") == 2
    code, _, err = call("trace", *asked[1:], "--out", tmp_path / "traces")
    assert code == 2
    assert "task 'fact/50' gives the model a text to go on from" in err
