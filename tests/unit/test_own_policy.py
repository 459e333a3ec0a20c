"""The documentation's own policy: its code is installed as a package of its own and used as the page says."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from longthink.errors import UnknownPolicyError
from longthink.policies import (
    available_policies,
    make_policy,
    policy_from_dict,
    policy_spec,
    policy_to_dict,
    registry,
    with_page_size,
)

PAGE = Path(__file__).parents[2] / "docs" / "write-your-own-policy.md"


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """Folder with the page's files, built and installed by pip as a reader would."""
    folder = tmp_path_factory.mktemp("own_policy")
    for name, code in re.findall(r"```\w+ title=(\S+)\n(.*?)```", PAGE.read_text(), re.DOTALL):
        (folder / name).write_text(code)
    install = "-m pip install -q --no-deps --no-build-isolation --no-index --target site .".split()
    subprocess.run([sys.executable, *install], cwd=folder, check=True, timeout=120)
    for name in ("my_policy.py", "keep_first.py"):
        (folder / name).unlink()  # only the installed copy may be found
    return folder


@pytest.fixture
def here(installed, monkeypatch) -> Path:
    """Let this process find the package; what it registers and imports is forgotten behind the test."""
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    monkeypatch.syspath_prepend(installed / "site")
    yield installed
    for name in ("my_policy", "keep_first"):
        sys.modules.pop(name, None)


def test_page_check_passes(here):
    runpy.run_path(str(here / "check.py"))


def test_page_check_can_fail(here):
    wrong = here / "wrong.py"
    wrong.write_text((here / "check.py").read_text().replace("0.5 * worth", "0.1 * worth"))
    with pytest.raises(AssertionError):
        runpy.run_path(str(wrong))


@pytest.mark.slow
def test_page_use_runs_in_a_process_of_its_own(installed):
    paths = [str(installed / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "use.py"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        cwd=installed,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "=" in done.stdout


def test_registry_knows_it_by_its_entry_point(here):
    assert available_policies()[-2:] == ("keep_first", "lrfu")
    policy = make_policy("lrfu:decay=0.25:page_size=4")
    assert policy_spec(policy) == "lrfu:page_size=4:decay=0.25"
    assert policy_to_dict(policy)["decay"] == 0.25


def test_entry_point_that_is_no_policy_says_so(here, tmp_path, monkeypatch):
    broken = tmp_path / "site" / "broken-1.dist-info"
    broken.mkdir(parents=True)
    (broken / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1\n")
    (broken / "entry_points.txt").write_text("[longthink.policies]\nbroken = json:loads\n")
    monkeypatch.syspath_prepend(broken.parent)
    with pytest.raises(UnknownPolicyError, match="entry point 'json:loads'"):
        make_policy("broken")


def test_a_policy_inside_a_policy_is_text_and_json(here):
    text = "keep_first:steps=8:then=(raas:r=0.25:score=exact)"
    policy = make_policy(text)
    assert policy_spec(policy) == text
    assert policy_from_dict(json.loads(json.dumps(policy_to_dict(policy)))) == policy == make_policy(text)
    assert with_page_size(policy, 4).then.page_size == 4
    for wrong, message in (("then=quest", "must pin the prompt"), ("then=recency", "page_size=16 must be")):
        with pytest.raises(ValueError, match=message):
            make_policy(f"keep_first:{wrong}")
