"""What a release consists of beside the wheels (tests/test_wheels.py): workflows, classifiers, the check of a tag."""

import runpy
import tomllib
from pathlib import Path

import pytest
import yaml

import longthink

trove = pytest.importorskip("trove_classifiers", reason="comes with hatchling")
ROOT = Path(__file__).parents[2]
faults = runpy.run_path(str(ROOT / "scripts" / "check_release.py"))["faults"]
WORKFLOWS = {
    path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / ".github/workflows").glob("*.yml")
}


@pytest.mark.parametrize("name", ["pyproject.toml", "lab/pyproject.toml"])
def test_classifiers_exist_and_name_each_python(name):
    project = tomllib.loads((ROOT / name).read_text())["project"]
    assert [line for line in project["classifiers"] if line not in trove.classifiers] == []
    named = {line.rpartition(" ")[2] for line in project["classifiers"] if ":: Python :: 3." in line}
    assert named == {"3.11", "3.12", "3.13"}


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], citation["license"]) == (longthink.__version__, "Apache-2.0")
    assert citation.keys() >= {"cff-version", "message", "title", "authors"}


@pytest.fixture
def checkout(tmp_path):
    """The files that the check reads, in order for version 1.2.3."""
    (tmp_path / "src/longthink").mkdir(parents=True)
    (tmp_path / "src/longthink/_version.py").write_text('__version__ = "1.2.3"\n')
    (tmp_path / "CITATION.cff").write_text("version: 1.2.3\n")
    (tmp_path / "CHANGELOG.md").write_text("# C\n\n## [Unreleased]\n\n## [1.2.3] - 2026-11-28\n\n- x\n")
    return tmp_path


def test_a_release_in_order_has_no_faults(checkout):
    assert faults("v1.2.3", checkout) == []


@pytest.mark.parametrize(
    ("name", "old", "new", "fault"),
    [
        ("src/longthink/_version.py", "1.2.3", "1.2.4", "the tag is v1.2.3, the version 1.2.4"),
        ("src/longthink/_version.py", "1.2.3", "1.2.3.dev0", "1.2.3.dev0 is no version of a release"),
        ("CITATION.cff", "1.2.3", "1.2.2", "CITATION.cff has version 1.2.2, not 1.2.3"),
        ("CHANGELOG.md", " - 2026-11-28", "", "no heading"),
        ("CHANGELOG.md", "[Unreleased]\n", "[Unreleased]\n\n- y\n", "lists changes under Unreleased"),
    ],
)
def test_the_check_of_a_tag_sees(checkout, name, old, new, fault):
    path = checkout / name
    path.write_text(path.read_text().replace(old, new))
    assert any(fault in line for line in faults("v1.2.3", checkout))


def scripts_of(workflow):
    return [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]


def test_ci_runs_what_ci_runs_everywhere():
    assert scripts_of(WORKFLOWS["ci"]) == [".ci/run"]
    assert WORKFLOWS["ci"]["jobs"]["test"]["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13"]


def test_publishing_checks_first_and_needs_no_secret():
    workflow = WORKFLOWS["publish"]
    assert workflow[True] == {"push": {"tags": ["v*"]}}, "YAML reads `on` as true"
    assert [line.split()[1] for line in scripts_of(workflow)] == [
        "scripts/check_release.py", "build", "scripts/check_install.py",
    ]  # fmt: skip
    publish = workflow["jobs"]["publish"]
    assert publish["needs"] == "build" and publish["permissions"]["id-token"] == "write"
    assert "secrets." not in (ROOT / ".github/workflows/publish.yml").read_text()


def test_no_workflow_may_write_by_default():
    assert all(workflow["permissions"] == {"contents": "read"} for workflow in WORKFLOWS.values())


def test_templates_are_valid():
    for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"):
        form = yaml.safe_load(path.read_text())
        assert path.stem == "config" or form.keys() >= {"name", "description", "body"}
