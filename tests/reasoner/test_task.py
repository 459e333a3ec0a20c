"""Problems are right, deterministic, split without overlap, and read old values the way their profile says."""

import hashlib
import statistics
import subprocess
import sys
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longthink.reasoner import PROFILES, SIZES, Problem, Size, grade, make_problem, make_problems
from longthink.reasoner.task import MAX_OPS, split_of
from longthink.reasoner.vocabulary import FORMS, NAMES, TOKEN_IDS, TOKENS, token_ids
from tests.reasoner.reading import check_line, read_prompt

profiles = st.sampled_from(sorted(PROFILES))
sizes = st.builds(Size, ops=st.integers(2, MAX_OPS), checked=st.booleans())
seeds = st.integers(0, 10**9)
problems = st.builds(
    make_problem,
    profile=profiles,
    size=sizes,
    seed=seeds,
    split=st.sampled_from(["train", "test"]),
    live=st.integers(3, 8),
    distractors=st.sampled_from([0, 0, 10, 200]),
)


def needed(problem: Problem) -> set[str]:
    """Results that the answer depends on."""
    rules = {rule.name: rule for rule in problem.rules}
    found, todo = set(), [problem.query]
    while todo:
        name = todo.pop()
        if name in rules and name not in found:
            found.add(name)
            todo += [rules[name].left, rules[name].right]
    return found


@settings(max_examples=150, deadline=None)
@given(problems)
def test_every_line_is_right(problem):
    read, known = read_prompt(problem.prompt), {}
    lines = problem.solution.split("\n")
    order = [check_line(line, read, known)[0] for line in lines]
    assert order == list(read.rules), "lines follow the program"
    assert order[-1] == read.query == problem.query
    assert problem.answer == f"{known[read.query]:02d}"
    assert [str(rule) for rule in problem.rules] == [
        f"{n}= {a} {op}{b}" for n, (a, op, b) in read.rules.items()
    ]
    assert list(problem.facts) == list(read.facts)
    assert {name: problem.values[name] for name in known} == known


@settings(max_examples=100, deadline=None)
@given(problems)
def test_programs_are_well_formed_and_every_line_bears_on_the_answer(problem):
    defined = set(problem.facts)
    for rule in problem.rules:
        assert rule.left != rule.right
        assert {rule.left, rule.right} <= defined, "operands come before their use"
        defined.add(rule.name)
    assert len(defined) == len(problem.facts) + len(problem.rules) <= len(NAMES)
    assert needed(problem) == {rule.name for rule in problem.rules}


@settings(max_examples=50, deadline=None)
@given(problems)
def test_lengths_are_those_documented(problem):
    ops, checked = len(problem.rules), problem.prompt.endswith("#check")
    assert len(token_ids(problem.solution)) == ops * (38 if checked else 22)
    assert len(token_ids(problem.prompt)) == 2 * len(problem.facts) + 3 * ops + 3


@settings(max_examples=60, deadline=None)
@given(profiles, st.integers(2, 30), seeds)
def test_problem_is_on_the_side_asked_for_brief_or_checked(profile, ops, seed):
    for split in ("train", "test"):
        for checked in (False, True):
            made = make_problem(profile=profile, size=Size(ops=ops, checked=checked), seed=seed, split=split)
            assert made.split == split
            body = made.prompt.rsplit("\n", 1)[0]
            assert split_of(f"{body}\n#") == split_of(f"{body}\n#check") == split


def test_splits_never_overlap_even_where_problems_repeat():
    # Two lines with few values at hand: only so many programs look alike, so chance alone would not do.
    size = Size(ops=2)
    prompts = {
        split: {p.prompt for p in make_problems(400, profile="chain", size=size, seed=0, split=split, live=3)}
        for split in ("train", "test")
    }
    assert not prompts["train"] & prompts["test"]
    assert {split_of(prompt) for prompt in prompts["train"]} == {"train"}


def test_about_one_program_in_eight_is_for_testing():
    sides = [
        split_of(f"bee: {i // 100:02d}\ncat: {i % 100:02d}\ncow= bee +cat\n? cow\n#") for i in range(4000)
    ]
    assert 0.10 < sides.count("test") / len(sides) < 0.15


def test_problems_never_change():
    """The same seed gives the same text on every machine and in every version: results stay comparable."""
    text = "".join(
        p.prompt + p.solution
        for profile in sorted(PROFILES)
        for size in SIZES
        for p in make_problems(2, profile=profile, size=size, seed=7)
    )
    assert (
        hashlib.sha256(text.encode()).hexdigest()
        == "4cd43ca6320359c74b43e9ec6c1b1e0aa1a1fa6a4aa00965279fffa2efb362e5"
    )


def test_same_seed_same_problem_other_seed_another():
    first, again, other = (make_problem(profile="lemma", size="m", seed=seed) for seed in (3, 3, 4))
    assert first == again
    assert first.prompt != other.prompt
    assert make_problems(3, profile="lemma", size="m", seed=2)[1] == first


def test_distractors_are_facts_that_nothing_reads():
    plain = make_problem(profile="chain", size="s", seed=1)
    long = make_problem(profile="chain", size="s", seed=1, distractors=40)
    read = {name for rule in long.rules for name in (rule.left, rule.right)}
    assert len(set(long.facts) - read) >= 40 > len(plain.facts)


# Reuse: how far away is what a line reads? -----------------------------------------------------------------------


def read_distances(problem: Problem) -> list[int]:
    """For each operand: tokens since its value last stood in the text, next to its name."""
    seen: dict[str, int] = {}
    distances = []
    words = f"{problem.prompt}\n{problem.solution}".split()
    start = len(problem.prompt.split())
    for i, word in enumerate(words[:-1]):
        if word.endswith("=") and len(word) > 1:
            continue
        name = word.strip("+-:=")
        if name in problem.values and words[i + 1].isdigit() and len(words[i + 1]) == 2:
            if i >= start and not word.endswith(":"):
                distances.append(i - seen[name])
            seen[name] = i
    return distances


def line_reads(problem: Problem) -> dict[str, list[int]]:
    """Lines that read each name."""
    reads: dict[str, list[int]] = {}
    for line, rule in enumerate(problem.rules):
        for name in (rule.left, rule.right):
            reads.setdefault(name, []).append(line)
    return reads


def long_result_gaps(problem: Problem, lines: int) -> int:
    """How often a result is read after that many lines of rest or more."""
    born = {rule.name: line for line, rule in enumerate(problem.rules)}
    reads = line_reads(problem)
    return sum(b - a >= lines for name in born for a, b in pairwise([born[name], *reads.get(name, [])]))


@pytest.fixture(scope="module")
def large():
    return {profile: make_problems(40, profile=profile, size="l", seed=0) for profile in PROFILES}


@pytest.mark.parametrize("profile", PROFILES)
def test_no_problem_is_solvable_from_recent_tokens(large, profile):
    """Every problem reads something far back, and (as every line bears on the answer) needs it."""
    for problem in large[profile]:
        distances = read_distances(problem)
        assert len(distances) == 2 * len(problem.rules)
        assert max(distances) > 440, "half of the chain of thought"
        assert sum(distance > 128 for distance in distances) >= 8
    assert statistics.median(d for p in large[profile] for d in read_distances(p)) > 32


def test_chain_reads_mostly_young_values(large):
    distances = [d for p in large["chain"] for d in read_distances(p)]
    assert statistics.quantiles(distances, n=10)[6] < 250


def test_lemma_is_read_often_for_a_while_then_never(large):
    spans, counts = [], []
    for problem in large["lemma"]:
        results = {rule.name for rule in problem.rules}
        reads = {name: lines for name, lines in line_reads(problem).items() if name in results}
        top = sorted(reads.values(), key=len, reverse=True)[:2]
        spans += [lines[-1] - lines[0] for lines in top]
        counts += [len(lines) for lines in top]
    assert statistics.mean(counts) > 6
    assert max(spans) <= 40 // 3
    chain_top = [max(map(len, line_reads(problem).values())) for problem in large["chain"]]
    assert statistics.mean(chain_top) < 6


def test_recurrent_rereads_results_after_long_rests(large):
    per_problem = {
        profile: statistics.mean(long_result_gaps(p, 10) for p in large[profile]) for profile in PROFILES
    }
    assert per_problem["recurrent"] > 8
    assert per_problem["recurrent"] > 2 * per_problem["chain"]
    assert min(long_result_gaps(p, 10) for p in large["recurrent"]) >= 2


def test_phoenix_reads_facts_late(large):
    def late_fact_reads(problem):
        reads = line_reads(problem)
        # A fact stands in the prompt, so its rest before the first read begins there.
        return sum(b - a >= 15 for name in problem.facts for a, b in pairwise([0, *reads.get(name, [])]))

    late = {profile: [late_fact_reads(problem) for problem in large[profile]] for profile in PROFILES}
    assert min(late["phoenix"]) >= 5
    assert statistics.mean(late["phoenix"]) > 2 * statistics.mean(late["chain"])


# Arguments, grading, imports -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"profile": "chains"}, ["profile='chains'", "chain", "lemma", "recurrent", "phoenix"]),
        ({"size": "xxl"}, ["size='xxl'", "'s'", "'xl'"]),
        ({"split": "dev"}, ["split='dev'", "train", "test"]),
        ({"seed": -1}, ["seed=-1", ">= 0"]),
        ({"seed": "1"}, ["seed='1'", "integer"]),
        ({"live": 2}, ["live=2", "3 to 8"]),
        ({"distractors": -1}, ["distractors=-1", ">= 0"]),
    ],
)
def test_bad_arguments_are_named(change, words):
    with pytest.raises(ValueError) as caught:
        make_problem(**({"profile": "chain", "size": "s", "seed": 0} | change))
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_bad_sizes_and_counts_are_named():
    with pytest.raises(ValueError, match=r"ops=1 .* 2 to 96"):
        Size(ops=1)
    with pytest.raises(ValueError, match="checked="):
        Size(ops=4, checked="yes")
    with pytest.raises(ValueError, match=r"n=-1 .* >= 0"):
        make_problems(-1, profile="chain", seed=0)


@settings(max_examples=60, deadline=None)
@given(profiles, seeds)
def test_grade_accepts_the_solution_and_nothing_after_it(profile, seed):
    problem = make_problem(profile=profile, size="s", seed=seed)
    assert grade(problem, problem.solution)
    assert grade(problem, f"{problem.solution} </s>")
    assert grade(problem, f" {problem.solution}\n</s> <pad> <pad>\n")
    wrong = f"{(int(problem.answer) + 1) % 100:02d}"
    assert not grade(problem, f"{problem.solution[:-2]}{wrong} </s>")
    assert not grade(problem, f"{problem.solution} </s> ;")
    assert not grade(problem, problem.solution.rsplit(maxsplit=1)[0])
    assert not grade(problem, problem.solution.rsplit("\n", 1)[0])
    assert not grade(problem, f"{problem.solution} {problem.answer}")


@given(st.text(alphabet=st.characters(), max_size=80))
def test_grade_takes_any_text(text):
    problem = make_problem(profile="chain", size=Size(ops=2), seed=0)
    assert grade(problem, text) is (text.split()[-2:] == [f"{problem.query}:", problem.answer])


def test_vocabulary_is_words():
    assert len(NAMES) == len(set(NAMES)) == 104
    assert all(name.isalpha() and name.islower() and 3 <= len(name) <= 5 for name in NAMES)
    assert len(set(TOKENS)) == len(TOKENS) == len(TOKEN_IDS)
    assert all(TOKENS[TOKEN_IDS[form.format(name)]] == form.format(name) for form in FORMS for name in NAMES)
    assert not {"check"} & set(NAMES)


def test_making_and_grading_need_no_torch():
    code = (
        "import sys; from longthink.reasoner import grade, make_problem\n"
        "p = make_problem(profile='lemma', size='s', seed=1); assert grade(p, p.solution)\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_read_counts_see_a_problem_by_hand():
    """The yardstick itself: distances of a two-line problem, counted by hand."""
    problem = make_problem(profile="chain", size=Size(ops=2), seed=0, live=3)
    words = f"{problem.prompt} {problem.solution}".split()
    first = words.index("#") + 2
    assert words[first] == problem.rules[0].left
    assert read_distances(problem)[0] == first - words.index(f"{words[first]}:")
