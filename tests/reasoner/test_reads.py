"""Which tokens a worked solution needs: checked on the text itself, by the rules of the language alone."""

import re

import pytest

from longthink.reasoner import PROFILES, make_problem
from longthink.reasoner.reads import needed_tokens


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("size", ["s", "xl"])
def test_needed_tokens_hold_what_is_written_next(profile, size):
    problem = make_problem(profile=profile, size=size, seed=3)
    words = ["<s>", *problem.prompt.split(), *problem.solution.split()]
    prompt = 1 + len(problem.prompt.split())
    found = needed_tokens(problem)
    assert [token.position for token in found] == sorted({token.position for token in found})
    for token in found:
        for read in token.reads:
            assert read > token.position
            assert read >= prompt - 1
            assert words[read + 1] == words[token.position], "what is read is written next"
            if token.kind != "rule":
                assert re.fullmatch(r"[+-]?[a-z]+", words[read])
                assert words[token.position - 1] == words[read].lstrip("+-") + ":"
        assert (token.position < prompt) == (token.kind != "result")
    assert sum(token.kind == "rule" for token in found) == 3 * len(problem.rules)
    # Every operand of every line is looked up somewhere.
    lookups = sum(len(token.reads) for token in found if token.kind != "rule")
    assert lookups == 2 * len(problem.rules)
