"""What may know what: a policy is one file, and nothing below or beside it knows any."""

import io
import tokenize
from pathlib import Path

import pytest

import longthink
from longthink.policies import available_policies, get_policy_class

SRC = Path(longthink.__file__).parent
BUILT_IN = [
    name for name in available_policies() if get_policy_class(name).__module__.startswith("longthink.")
]


def policy_words(source: str) -> set[str]:
    """Names of policies in code, comments and docstrings not counted."""
    classes = {get_policy_class(name).__name__ for name in BUILT_IN}
    names = {
        token.string for token in tokenize.generate_tokens(io.StringIO(source).readline) if token.type == 1
    }
    return names & {*BUILT_IN, *classes} - {"random"}


@pytest.mark.parametrize(
    "path",
    sorted([*SRC.glob("kernels/*.py"), *SRC.glob("cache/*.py")]),
    ids=lambda path: f"{path.parent.name}/{path.name}",
)
def test_below_and_beside_the_policies_nothing_knows_one(path):
    assert policy_words(path.read_text()) == set()


def test_layer_rule_sees_a_policy():
    assert policy_words("x = RaaS()  # milestone\nh2o = 1") == {"RaaS", "h2o"}
