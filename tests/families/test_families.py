"""Every decoder that transformers lists is served right, refused in a sentence, or named as not tried."""

from pathlib import Path

import pytest
import transformers

from longthink import kernels
from longthink.hf import attention
from tests.families import compared
from tests.families.compared import check, outcome
from tests.families.page import REFUSED, SERVED, UNTRIED, cell, page, written
from tests.families.tiny import FAMILIES, tiny

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
QUICK = ("llama", "gpt_oss", "gemma2", "qwen3_next", "lfm2", "deepseek_v3", "bloom", "mamba", "whisper")
KNOWN, VERSION = written(PAGE.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAMILIES]
)
def test_the_page_says_what_happens(family):
    """``python -m tests.families.page > docs/models.md`` writes it anew."""
    found = outcome(family)
    assert found.result in (SERVED, REFUSED, UNTRIED)
    if transformers.__version__ == VERSION:
        assert KNOWN[family] == (found.result, cell(found.text))


def test_the_page_says_nothing_else():
    assert page(KNOWN, VERSION) == PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("family", ["gpt_oss", "gemma2"])
def test_a_sink_or_a_soft_cap_that_is_left_out_is_seen(family, monkeypatch):
    monkeypatch.setenv("LONGTHINK_SELF_CHECK", "0")
    monkeypatch.setattr(attention, "LogitRule", lambda softcap, sink: kernels.PLAIN)
    with pytest.raises((AssertionError, ValueError), match=r"an ample budget|softcap"):
        check(tiny(family))


def test_a_token_that_is_not_read_is_seen(monkeypatch):
    stepwise = compared.stepwise

    def one_less(*args, **options):
        logits, held = stepwise(*args, **options)
        return logits, [positions[1:] for positions in held]

    monkeypatch.setattr(compared, "stepwise", one_less)
    with pytest.raises(AssertionError, match="a tight budget"):
        check(tiny("qwen3"))
