"""The built-in reasoner in vLLM: the same texts as on Hugging Face, and so the same accuracy."""

import os
from importlib.resources import as_file, files

import pytest

from longthink.hf import Engine, Request
from longthink.reasoner import PROFILES, grade, load_reasoner, make_problems
from tests.vllm.engines import engine, serve

pytestmark = pytest.mark.slow

SIZE = os.environ.get("LONGTHINK_VLLM_REASONER", "m")
"""``l`` for problems twice as long."""
BUDGET = {"m": 192, "l": 384}[SIZE]
EACH, ROWS = 6, 24


@pytest.fixture(scope="module")
def requests():
    """Problems, prompt tokens, and the most tokens of each answer."""
    found = [make_problems(EACH, profile=profile, size=SIZE, seed=3_000_000) for profile in PROFILES]
    problems = [problem for of_profile in found for problem in of_profile]
    _, tokenizer = load_reasoner()
    prompts = [tokenizer(problem.prompt)["input_ids"] for problem in problems]
    return problems, prompts, [len(problem.solution.split()) + 8 for problem in problems]


def on_hugging_face(policy, prompts, limits):
    model, _ = load_reasoner()
    kept = {} if policy == "dense" else {"decode_budget": BUDGET}
    requests = [
        Request(key=str(number), tokens=tuple(tokens), max_new_tokens=limit, tag=number)
        for number, (tokens, limit) in enumerate(zip(prompts, limits, strict=True))
    ]
    with Engine(model, policy=policy, seats=ROWS, compile=False, **kept) as rows:
        done = {one.request.tag: one.tokens for one in rows.map(requests)}
    return [list(done[number]) for number in range(len(prompts))]


def in_vllm(policy, prompts, limits):
    with as_file(files("longthink.reasoner") / "weights") as folder:
        bounded = None if policy == "dense" else policy
        with engine(folder, bounded, BUDGET, pages=2048, max_num_seqs=ROWS) as llm:
            return serve(llm, prompts, limits, ignore_eos=False)


@pytest.mark.parametrize("policy", ["dense", "raas", "milestone"])
def test_accuracy_is_that_of_hugging_face(policy, requests):
    problems, prompts, limits = requests
    _, tokenizer = load_reasoner()
    texts, right = [], []
    for tokens in (on_hugging_face(policy, prompts, limits), in_vllm(policy, prompts, limits)):
        texts.append([tokenizer.decode(one) for one in tokens])
        right.append([grade(problem, text) for problem, text in zip(problems, texts[-1], strict=True)])
    same = sum(one == other for one, other in zip(*texts, strict=True))
    print(f"{policy}: {sum(right[0])} right on Hugging Face, {sum(right[1])} in vLLM, {same} texts the same")
    assert right[0] == right[1]
    assert same == len(problems)
