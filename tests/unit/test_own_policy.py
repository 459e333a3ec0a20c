"""The documentation's own policy: its code is installed as a package of its own and used as the page says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "write-your-own-policy.md"


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """Folder with the page's files, built and installed by pip as a reader would."""
    folder = tmp_path_factory.mktemp("own_policy")
    for name, code in re.findall(r"```\w+ title=(\S+)\n(.*?)```", PAGE.read_text(), re.DOTALL):
        (folder / name).write_text(code)
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
    ]
    subprocess.run([*install, "--target", str(folder / "site"), str(folder)], check=True, timeout=120)
    for name in ("my_policy.py", "keep_first.py"):
        (folder / name).unlink()  # only the installed copy may be found
    return folder


def run(installed: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    paths = [str(installed / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        cwd=installed,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_page_check_passes(installed):
    done = run(installed, "check.py")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_page_check_can_fail(installed):
    (installed / "wrong.py").write_text(
        (installed / "check.py").read_text().replace("0.5 * worth", "0.1 * worth")
    )
    assert "AssertionError" in run(installed, "wrong.py").stderr


@pytest.mark.slow
def test_page_use_runs(installed):
    done = run(installed, "use.py")
    assert done.returncode == 0, done.stderr
    assert "=" in done.stdout


def test_registry_knows_it_by_its_entry_point(installed):
    code = (
        "import longthink; from longthink.policies import policy_spec, policy_to_dict;"
        "p = longthink.make_policy('lrfu:decay=0.25:page_size=4');"
        "print(*longthink.available_policies()[-2:], policy_spec(p), policy_to_dict(p)['decay'])"
    )
    found = run(installed, "-c", code).stdout.split()
    assert found == ["lrfu", "keep_first", "lrfu:page_size=4:decay=0.25", "0.25"]


def test_entry_point_that_is_no_policy_says_so(installed, tmp_path):
    broken = tmp_path / "site" / "broken-1.dist-info"
    broken.mkdir(parents=True)
    (broken / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1\n")
    (broken / "entry_points.txt").write_text("[longthink.policies]\nbroken = json:loads\n")
    code = f"import sys; sys.path.append({str(broken.parent)!r}); import longthink; longthink.make_policy('broken')"
    assert "UnknownPolicyError: entry point 'json:loads'" in run(installed, "-c", code).stderr


def test_a_policy_inside_a_policy_is_text_and_json(installed):
    code = (
        "import json; from longthink.policies import *;"
        "p = make_policy('keep_first:steps=8:then=(raas:r=0.25:score=exact)');"
        "assert policy_from_dict(json.loads(json.dumps(policy_to_dict(p)))) == p == make_policy(policy_spec(p));"
        "print(policy_spec(p), with_page_size(p, 4).then.page_size)"
    )
    done = run(installed, "-c", code)
    assert done.stdout.split() == ["keep_first:steps=8:then=(raas:r=0.25:score=exact)", "4"], done.stderr
    for wrong, message in (("then=quest", "must pin the prompt"), ("then=recency", "page_size=16 must be")):
        done = run(installed, "-c", f"import longthink; longthink.make_policy('keep_first:{wrong}')")
        assert message in done.stderr
