"""Every way of generating on the page docs/supported.md gives what transformers gives, or is refused as it says."""

from pathlib import Path

import pytest

from tests.hf.supported import WAYS, outcome, page
from tests.models import build

PAGE = Path(__file__).parents[2] / "docs" / "supported.md"


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.title)
def test_no_way_is_silently_wrong(way):
    result, message = outcome(way, build("qwen2", num_hidden_layers=1))
    assert result in ("same", "refused")
    assert (result == "refused") == bool(message)


@pytest.mark.slow
def test_the_page_says_what_happens():
    """``python -m tests.hf.supported > docs/supported.md`` writes it anew."""
    assert PAGE.read_text() == page()
