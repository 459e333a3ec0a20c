"""Tasks by name, the choice of problems, prompts, and the problem sets of the Hub."""

import sys

import pytest
from datasets import Dataset

from longthink.errors import DataError, MissingExtraError
from longthink.lab.evaluate.tasks import INSTRUCTION, SOURCES, load_tasks, prompt_ids, prompt_text
from longthink.reasoner import SIZES, grade, load_reasoner, make_problem
from tests.evaluate.data import write_lines


@pytest.fixture
def ten(tmp_path):
    return write_lines(tmp_path / "ten.jsonl", *({"question": f"q{i}", "answer": i} for i in range(10)))


def golds(tasks):
    return [item.gold for task in tasks for item in task.items]


# Names and choice -----------------------------------------------------------------------------------------------


def test_all_first_and_random(ten):
    assert golds(load_tasks([], data=[ten])) == [str(i) for i in range(10)]
    assert golds(load_tasks([], data=[ten], count=3)) == ["0", "1", "2"]
    assert golds(load_tasks([], data=[ten], count=99)) == [str(i) for i in range(10)]
    chosen = golds(load_tasks([], data=[ten], count=4, choose="random", seed=1))
    assert chosen == golds(load_tasks([], data=[ten], count=4, choose="random", seed=1))
    assert chosen != golds(load_tasks([], data=[ten], count=4, choose="random", seed=2))
    assert golds(load_tasks([], data=[ten], count=6, choose="random", seed=1))[:4] == chosen
    assert sorted(golds(load_tasks([], data=[ten], choose="random"))) == [str(i) for i in range(10)]


def test_a_file_is_a_task_of_its_stem(ten):
    (task,) = load_tasks(["ten"], data=[ten])
    assert (task.name, {item.task for item in task.items}) == ("ten", {"ten"})
    assert not any(item.is_builtin for item in task.items)
    assert [task.name for task in load_tasks(["reasoner/s/chain"], data=[ten], count=1)] == [
        "reasoner/s/chain",
        "ten",
    ]


def test_a_file_takes_the_place_of_a_set_of_the_hub(tmp_path):
    path = write_lines(tmp_path / "gsm8k.jsonl", {"question": "q", "answer": "#### 7"})
    (task,) = load_tasks(["gsm8k"], data=[path])
    assert golds([task]) == ["7"]
    assert task.max_new_tokens == SOURCES["gsm8k"].max_new_tokens


def test_files_of_one_stem_are_refused(ten, tmp_path):
    with pytest.raises(DataError, match="would both be task 'ten'"):
        load_tasks([], data=[ten, tmp_path / "ten.parquet"])


@pytest.mark.parametrize(
    "names, options, message",
    [
        ([], {}, "tasks is empty: name at least one of gsm8k, .* or give a problem file"),
        (["gsm9k"], {}, "task='gsm9k' is unknown: allowed are gsm8k, math500"),
        (["reasoner/s/chain/1"], {}, "is unknown"),
        (["reasoner/tiny"], {}, "size of task 'reasoner/tiny'='tiny' is not one of 's', 'm', 'l', 'xl'"),
        (["reasoner/s/zip"], {}, "profile of task 'reasoner/s/zip'='zip' is not one of 'chain'"),
        (["reasoner"], {}, "give a count"),
        (["reasoner"], {"count": 0}, "count=0 is out of range: allowed is >= 1"),
        (["reasoner"], {"count": 1, "seed": -1}, "seed=-1 is out of range"),
        (["reasoner"], {"count": 1, "choose": "last"}, "choose='last' is not one of 'first', 'random'"),
    ],
)
def test_wrong_arguments(names, options, message):
    with pytest.raises(ValueError, match=message):
        load_tasks(names, **options)


# The built-in task ----------------------------------------------------------------------------------------------


def test_short_names_of_the_builtin_task():
    def names(*given):
        return [task.name for task in load_tasks(given, count=1)]

    profiles = ["chain", "lemma", "recurrent", "phoenix"]
    assert names("reasoner") == [f"reasoner/m/{profile}" for profile in profiles]
    assert names("reasoner/s") == [f"reasoner/s/{profile}" for profile in profiles]
    assert names("reasoner/s/lemma", "reasoner/s")[:2] == ["reasoner/s/lemma", "reasoner/s/chain"]


def test_builtin_items_are_problems_of_the_test_split():
    (task,) = load_tasks(["reasoner/s/lemma"], count=3, seed=40)
    assert [item.id for item in task.items] == ["40", "41", "42"]
    for item in task.items:
        problem = make_problem(profile="lemma", size="s", seed=int(item.id))
        assert (problem.split, item.question, item.gold) == (
            "test",
            problem.prompt,
            f"{problem.query}: {problem.answer}",
        )
        assert item.steps == len(problem.solution.split())
        assert grade(problem, f"{item.gold} </s>")


def test_random_builtin_problems_depend_on_the_seed_only():
    def ids(**options):
        (task,) = load_tasks(["reasoner/s/chain"], choose="random", **options)
        return [item.id for item in task.items]

    assert ids(count=5, seed=1)[:3] == ids(count=3, seed=1)
    assert not set(ids(count=5, seed=1)) & set(ids(count=5, seed=2))


@pytest.mark.parametrize("size", SIZES)
def test_limit_of_a_builtin_task_does_not_depend_on_the_problems(size):
    """It is part of a result's setup: more problems later must not make another setup of it."""
    tasks = load_tasks([f"reasoner/{size}"], count=4, seed=3) + load_tasks([f"reasoner/{size}"], count=1)
    assert len({task.max_new_tokens for task in tasks}) == 1
    assert all(item.steps < task.max_new_tokens for task in tasks for item in task.items)


# Prompts --------------------------------------------------------------------------------------------------------


def test_plain_prompt_asks_for_a_box(ten):
    (task,) = load_tasks([], data=[ten])
    _, tokenizer = load_reasoner()
    assert prompt_text(task.items[0], tokenizer) == f"q0\n\n{INSTRUCTION}"
    assert prompt_ids(task.items[0], tokenizer)[0] == tokenizer.bos_token_id


def test_chat_template_brings_its_own_special_tokens(ten):
    _, tokenizer = load_reasoner()
    tokenizer.chat_template = (
        "<s> {{ messages[0].role }}: {{ messages[0].content }}{% if add_generation_prompt %} bot:{% endif %}"
    )
    (task,) = load_tasks([], data=[ten])
    assert prompt_text(task.items[0], tokenizer) == f"<s> user: q0\n\n{INSTRUCTION} bot:"
    assert prompt_ids(task.items[0], tokenizer).count(tokenizer.bos_token_id) == 1


def test_builtin_prompt_stays_as_it_is():
    _, tokenizer = load_reasoner()
    tokenizer.chat_template = "{{ messages[0].content }}!"
    (task,) = load_tasks(["reasoner/s/chain"], count=1)
    (item,) = task.items
    assert prompt_text(item, tokenizer) == item.question
    assert prompt_ids(item, tokenizer) == tokenizer(item.question)["input_ids"]


# The Hub --------------------------------------------------------------------------------------------------------

# Where each set is on the Hub: name, config and split, as their pages and lm-evaluation-harness have them.
PLACES = {
    "gsm8k": ("openai/gsm8k", "main", "test"),
    "math500": ("HuggingFaceH4/MATH-500", "default", "test"),
    "aime24": ("HuggingFaceH4/aime_2024", "default", "train"),
    "aime25": ("math-ai/aime25", "default", "test"),
    "aime": ("gneubig/aime-1983-2024", "default", "train"),
}
# The columns of each set, in order, in one row of it; the gold answer and the identifier that are read from it.
LAYOUTS = {
    "gsm8k": ({"question": "q", "answer": "6 * 3 = <<6*3=18>>18\n#### 1,018"}, "1018", None),
    "math500": (
        {
            "problem": "q",
            "solution": r"\boxed{2}",
            "answer": r"\frac{1}{2}",
            "subject": "Algebra",
            "level": 3,
            "unique_id": "u",
        },
        r"\frac{1}{2}",
        "u",
    ),
    "aime24": (
        {"id": 60, "problem": "q", "solution": r"\boxed{2}", "answer": "204", "url": "x", "year": "2024"},
        "204",
        "60",
    ),
    "aime25": ({"problem": "q", "answer": "70", "id": "0"}, "70", "0"),
    "aime": (
        {"ID": "1983-1", "Year": 1983, "Problem Number": 1, "Question": "q", "Answer": "60", "Part": None},
        "60",
        "1983-1",
    ),
}


@pytest.fixture
def local_hub(tmp_path, monkeypatch):
    """A folder in which `datasets` finds sets under their names on the Hub, and no network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_CACHE_HOME", tmp_path / "home")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def put(name, record):
        dataset, config, split = PLACES[name]
        folder = tmp_path / dataset
        folder.mkdir(parents=True)
        Dataset.from_list([record]).to_parquet(folder / "data.parquet")
        other = Dataset.from_list([{key: None for key in record}])  # a split that must not be taken
        other.to_parquet(folder / "other.parquet")
        (folder / "README.md").write_text(
            f"---\nconfigs:\n- config_name: {config}\n  data_files:\n"
            f"  - split: {split}\n    path: data.parquet\n  - split: validation\n    path: other.parquet\n"
            "- config_name: another\n  data_files: other.parquet\n---\n"
        )

    return put


@pytest.mark.parametrize("name", SOURCES)
def test_sets_of_the_hub(name, local_hub):
    record, gold, identifier = LAYOUTS[name]
    local_hub(name, record)
    (task,) = load_tasks([name])
    (item,) = task.items
    assert (item.task, item.question, item.gold) == (name, "q", gold)
    assert identifier is None or item.id == identifier
    assert task.max_new_tokens == SOURCES[name].max_new_tokens


def test_a_set_with_other_columns_is_refused(local_hub):
    local_hub("aime25", {"Problem": "q", "answer": "1", "id": 0})
    with pytest.raises(
        DataError, match=r"task 'aime25', data set math-ai/aime25, row 1: field 'problem' is missing"
    ):
        load_tasks(["aime25"])


def test_without_the_hub_the_way_out_is_named(local_hub):
    with pytest.raises(DataError, match=r"data set openai/gsm8k cannot be loaded: .*--data FILE\.jsonl"):
        load_tasks(["gsm8k"])


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        MissingExtraError, match=r"'datasets' is not installed: pip install \"longthink\[eval\]\""
    ):
        load_tasks(["gsm8k"])
