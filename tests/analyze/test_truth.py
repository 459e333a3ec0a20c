"""On the built-in model the task knows what is needed and until when: the analysis must find it."""

import pytest
import torch

from longthink.lab.analyze.lives import read_lives
from longthink.lab.analyze.recorder import Prompt, record
from longthink.lab.analyze.rules import Rules
from longthink.lab.analyze.truth import agreement, total
from longthink.lab.report.attention_tables import truth_table
from longthink.reasoner import load_reasoner, make_problem
from tests.analyze.making import recorded

PROFILES = ("lemma", "phoenix")


@pytest.fixture(scope="module")
def all_lives(tmp_path_factory):
    model, tokenizer = load_reasoner()
    prompts = []
    for profile in PROFILES:
        problem = make_problem(profile=profile, size="s", seed=4)
        ids = tokenizer(problem.prompt, return_tensors="pt").input_ids
        prompts.append(
            Prompt(task=f"reasoner/s/{profile}", problem="4", inputs={"input_ids": ids}, max_new_tokens=220)
        )
    torch.set_num_threads(1)
    store = record(model, tokenizer, prompts, tmp_path_factory.mktemp("truth") / "t")
    return [read_lives(trace, Rules(local=16)) for trace in store.traces()]


@pytest.mark.slow
def test_what_the_solution_needs_is_found(all_lives):
    both = [agreement(lives) for lives in all_lives]
    for prompt, decode in both:
        assert prompt.recall >= 0.95 and prompt.precision >= 0.8
        assert decode.recall >= 0.9
        assert decode.ends >= 0.9 * decode.both, "the last use is the last read"
    assert sum(decode.needed for _, decode in both) >= 4


@pytest.mark.slow
def test_one_head_alone_finds_the_results(all_lives):
    """Look-ups sit in one head; it finds the values that lines worked out, and hardly anything else."""
    for lives in all_lives:
        heads = [agreement(lives, head)[1] for head in range(16)]
        best = max(heads, key=lambda one: one.both)
        assert best.recall >= 0.9 and best.precision >= 0.9


@pytest.mark.slow
def test_the_report_counts_all_problems_together(all_lives):
    table = truth_table(all_lives)
    rows = {(row[0], row[1], row[2]): row[3:] for row in table.rows}
    assert len(rows) == 3 * len(PROFILES)
    for lives in all_lives:
        task, (prompt, decode) = lives.header.task, agreement(lives)
        for part, one in (("prompt", prompt), ("decode", decode)):
            assert rows[task, part, "any"][:4] == [1, one.found, one.needed, one.both]
            assert rows[task, part, "any"][4].startswith(f"{one.both / one.found:.1%} (")
    (head,) = {row[2] for row in table.rows} - {"any"}
    # The value of a line is looked up by one head, in all problems the same.
    assert head == "layer 1 head 0"
    sums = total([agreement(lives, 4)[1] for lives in all_lives])
    assert sums.both == sum(rows[lives.header.task, "decode", head][3] for lives in all_lives)


def test_another_text_is_no_truth(tmp_path):
    (trace,) = recorded(tmp_path / "t", new=8).traces()
    header = trace.header
    object.__setattr__(header, "task", "reasoner/s/chain")
    object.__setattr__(header, "problem", "0")
    assert agreement(read_lives(trace)) is None
    assert truth_table([read_lives(trace)]) is None
