"""The model `longthink` of lm-evaluation-harness: the tokens of its model `hf` where nothing is evicted; a bound."""

import json

import pytest
import torch
from transformers import AutoTokenizer

from longthink.errors import BudgetError, UnknownPolicyError, UnsupportedFeatureError
from longthink.reasoner import make_problems
from tests.bpe import byte_level_bpe
from tests.evaluate.data import write_lines
from tests.models import build

pytestmark = pytest.mark.slow  # importing the harness alone takes many seconds

QUESTIONS = [
    "Tom has 3 apples.",
    "Ann buys 12 pens for 3 dollars each and sells 5 of them. How many dollars did she spend, and what is left?",
    "A train goes 60 miles an hour for 2 hours, and then 30 miles an hour for 4 hours. How far does it go in all?",
    "What is 7 + 8?",
    "Mia reads 20 pages a day. The book has 300 pages. How many days does she need?",
    "Six friends share 42 cards.",
]
NEW_TOKENS = 40
# A random model repeats itself; what it says is compared letter for letter, so any text will do.
TASK = f"""
dataset_path: json
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
num_fewshot: 0
output_type: generate_until
generation_kwargs: {{until: ["</never>"], do_sample: false, max_gen_toks: {NEW_TOKENS}}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


def task_file(folder, name, records, text=TASK):
    data = write_lines(folder / f"{name}.jsonl", *records)
    (folder / f"{name}.yaml").write_text(
        f"task: {name}\ndataset_kwargs: {{data_files: {{test: '{data}'}}}}\n{text}"
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Mistral on disk with a tokenizer trained on the questions, and tasks of local files."""
    folder = tmp_path_factory.mktemp("harness")
    fast = byte_level_bpe(QUESTIONS, vocab_size=400, special=["<|endoftext|>", "<|pad|>"])
    fast.save_pretrained(folder / "model")
    build("mistral", vocab_size=len(fast)).save_pretrained(folder / "model")
    task_file(folder, "sums", [{"question": q, "answer": "x"} for q in QUESTIONS])
    score = "output_type: multiple_choice\ndoc_to_choice: ['1', '2']\n"
    score += (
        TASK.replace("output_type: generate_until\n", "")
        .replace("{{answer}}", "0")
        .split("generation_kwargs")[0]
    )
    task_file(folder, "choices", [{"question": "q", "answer": 0}], score)
    problems = make_problems(4, profile="chain", size="s", seed=5)
    last = "filter_list: [{name: last, filter: [{function: regex, regex_pattern: '([a-z]+: [0-9]{2})', "
    last += "group_select: -1}, {function: take_first}]}]\n"
    records = [{"question": p.prompt, "answer": f"{p.query}: {p.answer}"} for p in problems]
    task_file(folder, "programs", records, TASK.replace(f"toks: {NEW_TOKENS}", "toks: 210") + last)
    return folder


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def evaluate(folder):
    """Run a task; returns the texts and the harness's results."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    import longthink.lab.evaluate.harness  # noqa: F401  (registers the model)

    def run(model, task="sums", pretrained=folder / "model", batch_size=1, gen_kwargs=None, **arguments):
        results = lm_eval.simple_evaluate(
            model=model,
            model_args={"pretrained": str(pretrained), "dtype": "float32", **arguments},
            tasks=[task],
            task_manager=TaskManager(include_path=str(folder), include_defaults=False),
            batch_size=batch_size,
            device="cpu",
            gen_kwargs=gen_kwargs,
            bootstrap_iters=0,
        )
        return [sample["resps"][0][0] for sample in results["samples"][task]], results

    return run


@pytest.fixture(scope="module")
def expected(folder):
    """What transformers' own cache writes, each question alone."""
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=str(folder / "model"), device="cpu", dtype="float32")
    texts = []
    for question in QUESTIONS:
        ids, mask = model.tok_batch_encode([question])
        with torch.no_grad():
            out = model.model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW_TOKENS)
        texts.append(model.tok_decode(out[0, ids.shape[1] :]))
    return texts


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_large_budget_gives_the_tokens_of_the_harness_own_model(evaluate, expected, batch_size):
    theirs, _ = evaluate("hf", batch_size=batch_size)
    assert theirs == expected  # the reference itself does not depend on padding
    for arguments in (
        {"policy": "raas", "budget": 256},
        {"policy": "h2o", "decode_budget": 64},
        {"policy": "dense"},
    ):
        ours, _ = evaluate("longthink", batch_size=batch_size, **arguments)
        assert ours == expected, arguments


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("policy", ["raas", "h2o"])
def test_a_small_budget_changes_the_text_and_bounds_the_cache(evaluate, expected, folder, policy, batch_size):
    texts, results = evaluate("longthink", batch_size=batch_size, policy=policy, decode_budget=16)
    assert texts != expected
    config = results["config"]
    assert config["longthink_policy"]["name"] == policy
    assert config["longthink_decode_budget"] == 16
    # Whole pages of 16: the longest prompt and the budget.
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    longest = max(len(tokenizer(question)["input_ids"]) for question in QUESTIONS)
    slots = -(-longest // 16) * 16 + 16
    of_a_token = 2 * 2 * 2 * 16 * 4  # keys and values, layers, KV heads, head dimension, bytes
    assert 0 < config["longthink_kv_bytes_peak"] <= batch_size * slots * of_a_token
    assert slots < longest + NEW_TOKENS


def test_rows_of_a_batch_do_not_depend_on_each_other(evaluate):
    alone, _ = evaluate("longthink", policy="raas", decode_budget=16)
    together, _ = evaluate("longthink", batch_size=4, policy="raas", decode_budget=16)
    assert alone == together


def test_sampling_and_stop_words_pass_through(evaluate):
    sampled, _ = evaluate("longthink", policy="dense", gen_kwargs={"do_sample": True, "temperature": 1.5})
    theirs, _ = evaluate("hf", gen_kwargs={"do_sample": True, "temperature": 1.5})
    greedy, _ = evaluate("longthink", policy="dense")
    assert sampled == theirs != greedy
    word = greedy[0][3:6]
    stopped, _ = evaluate("longthink", policy="dense", gen_kwargs={"until": [word]})
    assert stopped[0] == greedy[0].split(word)[0]


def test_the_builtin_model_solves_its_task(evaluate):
    _, results = evaluate("longthink", task="programs", pretrained="reasoner", batch_size=4, policy="dense")
    assert results["results"]["programs"]["exact_match,last"] == 1.0


def test_scoring_tasks_are_refused(evaluate):
    with pytest.raises(UnsupportedFeatureError, match=r"scores given text .* --model hf"):
        evaluate("longthink", task="choices", policy="raas", budget=256)


def test_ways_of_decoding_that_cannot_be_served_are_refused(evaluate):
    with pytest.raises(UnsupportedFeatureError, match="prompt_lookup_num_tokens"):
        evaluate("longthink", policy="raas", budget=256, gen_kwargs={"prompt_lookup_num_tokens": 3})


def test_a_prompt_over_the_budget_is_an_error(evaluate):
    with pytest.raises(BudgetError, match="budget"):
        evaluate("longthink", policy="raas", budget=16)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({}, BudgetError, "policy 'recall' needs a budget"),
        ({"policy": "dense", "budget": 64}, BudgetError, "policy 'dense' keeps everything"),
        ({"policy": "lru", "budget": 64}, UnknownPolicyError, "lru"),
        ({"budget": 64, "decode_budget": 64}, ValueError, "exactly one of budget"),
        ({"budget": "many"}, ValueError, "budget='many' must be an integer"),
        ({"budget": 0}, ValueError, "budget=0 is out of range"),
        ({"budget": 64.5}, ValueError, "budget=64.5 must be an integer"),
        ({"budget": 64, "batch_size": "auto"}, ValueError, "batch_size='auto' must be an integer"),
        (
            {"budget": 64, "trust_remote_code": True},
            ValueError,
            "trust_remote_code=True is unknown .* allowed are",
        ),
        ({"budget": 64, "peft": "x"}, ValueError, "peft='x' is unknown"),
    ],
)
def test_arguments_are_checked_before_anything_is_loaded(monkeypatch, arguments, error, message):
    from longthink.lab.evaluate import harness

    def load_model(*arguments, **options):
        raise AssertionError("loaded")

    monkeypatch.setattr(harness, "load_model", load_model)
    with pytest.raises(error, match=message):
        harness.LongthinkLM("model", **arguments)


@pytest.fixture
def command(folder, monkeypatch, capsys):
    """Run ``longthink lm-eval`` on the questions; returns exit code, stdout and stderr."""
    from longthink.cli import main

    # It would set up logging for all tests to come.
    monkeypatch.setattr("lm_eval.__main__.setup_logging", lambda: None)

    def run(model_args, *more):
        words = ["lm-eval", "--model", "longthink", "--tasks", "sums", "--include_path", str(folder), *more]
        code = main([*words, "--model_args", f"pretrained={folder / 'model'},{model_args}"])
        return code, *capsys.readouterr()

    return run


def test_the_command_runs_the_harness(command, tmp_path):
    """As a user types it: its own arguments, its results file, our model."""
    code, out, _ = command(
        "policy=raas:r=0.25,budget=128", "--batch_size", "4", "--output_path", str(tmp_path / "out")
    )
    assert code == 0
    assert "exact_match" in out
    (written,) = (tmp_path / "out").rglob("results_*.json")
    config = json.loads(written.read_text())["config"]
    assert (config["model"], config["batch_size"]) == ("longthink", "4")
    assert (config["longthink_policy"]["r"], config["longthink_budget"]) == (0.25, 128)


def test_a_wrong_argument_is_one_line_on_the_command_line(command):
    code, _, err = command("policy=raas,budget=x")
    assert code == 2
    assert err.splitlines()[-1] == "longthink: budget='x' must be an integer: allowed is >= 1"
    assert "Traceback" not in err
