"""The environment comes in two stages: what the demo needs, then the tools. Nothing is really installed here."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
INPUTS = (
    "scripts/setup.sh",
    "pyproject.toml",
    "lab/pyproject.toml",
    "lab/hatch_build.py",
    "constraints.txt",
    "constraints-vllm.txt",
    "constraints-oldest.txt",
    "constraints-newest.txt",
    "src/longthink/_version.py",
)
PIN = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
FAKE_UV = """#!/bin/sh
echo "$*" >>"$CALLS"
case "$*" in *"$FAILS"*) exit 1 ;; esac
if [ "$1" = venv ]; then
  for folder; do :; done
  mkdir -p "$folder/bin" && ln -s "$REAL_PYTHON" "$folder/bin/python"
fi
"""


@pytest.fixture
def setup(tmp_path):
    """Run setup.sh in a copy of the checkout with a uv that only writes down what it is asked for.

    Returns what was asked for since the last run (what it installs into, and versions, left out), and the output.
    """
    checkout, calls = tmp_path / "checkout", tmp_path / "calls"
    for name in INPUTS:
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, checkout / name)
    uv = tmp_path / "bin" / "uv"
    uv.parent.mkdir()
    uv.write_text(FAKE_UV)
    uv.chmod(0o755)

    def run(*arguments, fails="never"):
        calls.write_text("")
        settings = {"CALLS": str(calls), "FAILS": fails, "REAL_PYTHON": sys.executable}
        # These are found quickly, so that pip need not be asked for its configuration.
        settings |= {f"PIP_{name}": "nowhere" for name in ("FIND_LINKS", "EXTRA_INDEX_URL", "INDEX_URL")}
        environment = {k: v for k, v in os.environ.items() if k not in ("LONGTHINK_NO_UV", "PYTHON")}
        environment |= settings | {"PATH": f"{uv.parent}{os.pathsep}{os.environ['PATH']}"}
        done = subprocess.run(
            [checkout / "scripts" / "setup.sh", *arguments], env=environment, capture_output=True, text=True
        )
        assert (done.returncode != 0) == (fails in calls.read_text()), done.stderr
        asked = [
            "venv" if line.startswith("venv") else re.sub(r".* -c \S+ ", "", line)
            for line in calls.read_text().splitlines()
        ]
        return asked, done.stdout

    run.checkout = checkout
    return run


def test_the_tools_come_on_top_of_what_the_demo_needs(setup):
    asked, out = setup("--quiet", "--demo")
    assert asked == ["venv", PIN, "-e .[plot] -e ./lab"]
    steps = [line for line in out.splitlines() if line.startswith("  ")]
    assert len(steps) == 3
    assert all(re.search(r"\.\.\. \d+ s$", line) for line in steps)
    assert re.search(r"^Done in \d+ s\.$", out, re.MULTILINE)
    assert setup("--quiet", "--demo") == ([], "")
    assert setup("--quiet")[0] == ["-e .[dev] -e ./lab"]
    assert setup("--quiet") == setup("--quiet", "--demo") == ([], "")


def test_all_at_once_is_installed_once(setup):
    assert setup()[0] == ["venv", PIN, "-e .[dev] -e ./lab"]
    assert setup("--demo") == ([], ".venv is up to date.\n")


@pytest.mark.slow
def test_other_versions_are_installed(setup):
    setup()
    with (setup.checkout / "constraints.txt").open("a") as file:
        file.write("# moved\n")
    assert setup("--demo")[0] == [PIN, "-e .[plot] -e ./lab"]
    assert setup()[0] == ["-e .[dev] -e ./lab"]


@pytest.mark.slow
def test_a_failure_is_tried_again_from_there(setup):
    assert setup("--demo", fails=".[plot]")[0] == ["venv", PIN, "-e .[plot] -e ./lab"]
    assert setup("--demo")[0] == [PIN, "-e .[plot] -e ./lab"]
    assert setup(fails=".[dev]")[0] == ["-e .[dev] -e ./lab"]
    assert setup("--quiet", "--demo") == ([], "")
    assert setup()[0] == ["-e .[dev] -e ./lab"]


@pytest.mark.parametrize(("age", "torch"), [("oldest", "torch==2.11.0"), ("newest", "torch>=2.11")])
def test_the_environments_of_the_matrix_are_apart(setup, age, torch):
    assert setup(f"--{age}")[0] == ["venv", torch, "-e .[dev] -e ./lab"]
    assert (setup.checkout / f".venv-{age}").is_dir()
    assert not (setup.checkout / ".venv").exists()


def test_the_oldest_are_those_that_the_package_accepts():
    """And the newest are any in its range."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        accepted = {Requirement(line).name: line for line in tomllib.load(file)["project"]["dependencies"]}
    for age, sign in (("oldest", "=="), ("newest", ">=")):
        lines = (ROOT / f"constraints-{age}.txt").read_text().splitlines()
        for pin in (line for line in lines if not line.startswith("#")):
            name, version = pin.split(sign)
            assert accepted[name] == f"{name}>={version.removesuffix('.0')}"


def test_the_environment_for_vllm_is_apart(setup):
    asked, _ = setup("--vllm")
    assert asked[0] == "venv"
    assert asked[2] == "-e .[vllm-test]"
    assert (setup.checkout / ".venv-vllm").is_dir()
    assert not (setup.checkout / ".venv").exists()
    assert setup("--quiet", "--vllm") == ([], "")


def test_a_version_of_vllm_has_an_environment_of_its_own(setup):
    asked, _ = setup("--quiet", "--vllm=0.30.0")
    assert asked[::2] == ["venv", "-e .[vllm-test]"]
    assert (setup.checkout / ".venv-vllm-0.30.0").is_dir()
    assert not (setup.checkout / ".venv-vllm").exists()
    assert setup("--quiet", "--vllm=0.30.0") == ([], "")
    assert setup("--quiet", "--vllm=0.31.0")[0][0] == "venv"


@pytest.mark.parametrize("target", ["demo", "setup", "test", "test-fast", "lint", "format", "build"])
def test_only_the_demo_does_without_tools(target):
    """``make -n`` says what a target would run."""
    command = ["make", "--no-print-directory", "-n", target]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    (line,) = [line for line in done.stdout.splitlines() if "setup.sh" in line]
    assert ("--demo" in line) == (target == "demo")


@pytest.mark.parametrize(("ends", "model"), [(0, True), (3, False)])
def test_ci_gives_the_tests_a_real_model_or_says_why_not(tmp_path, ends, model):
    """In a checkout beside a get.sh that ends so, with a make that only says which models it was given."""
    scripts = {
        "checkout/.ci/run": (ROOT / ".ci" / "run").read_text(),
        "checkout/scripts/chromium.sh": "#!/bin/sh\n",
        "shared/models/get.sh": f'#!/bin/sh\necho "made $1 $2 with $PYTHON"\nexit {ends}\n',
        "bin/make": '#!/bin/sh\necho "make $* with models in ${LONGTHINK_MODELS:-nothing}"\n',
    }
    for name, text in scripts.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if k != "LONGTHINK_MODELS"}
    environment |= {
        "XDG_CACHE_HOME": str(tmp_path),
        "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}",
    }
    done = subprocess.run([tmp_path / "checkout/.ci/run"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "longthink" / "models"
    assert f"made {folder} smollm2-135m with {tmp_path}/checkout/.venv-ci/bin/python" in done.stdout
    assert f"make --keep-going lint test with models in {folder if model else 'nothing'}" in done.stdout
    assert ("tests/real will skip: ../shared/models/get.sh ended with status 3" in done.stderr) == (not model)


# What the demo needs --------------------------------------------------------------------------------------------


def declared(extra, project=ROOT / "pyproject.toml"):
    """Names of the packages that ``longthink[extra]`` asks for, without what those need."""
    projects = {"longthink": ROOT / "pyproject.toml", "longthink-lab": ROOT / "lab" / "pyproject.toml"}
    extras = tomllib.loads(project.read_text())["project"]["optional-dependencies"]
    names = set()
    for requirement in map(Requirement, extras[extra]):
        if requirement.name in projects:
            names |= set().union(*(declared(name, projects[requirement.name]) for name in requirement.extras))
        else:
            names.add(canonicalize_name(requirement.name))
    return names


def needed(name, extra=""):
    """Names of all installed packages that a package needs, with its own."""
    found, waiting = set(), [(name, extra)]
    while waiting:
        name, extra = waiting.pop()
        name = canonicalize_name(name)
        if (name, extra) in found:
            continue
        try:
            requirements = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        found.add((name, extra))
        for requirement in map(Requirement, requirements):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                waiting += [(requirement.name, wanted) for wanted in ("", *requirement.extras)]
    return {name for name, _ in found}


def test_the_demo_installs_no_test_tool():
    tools = declared("dev") - declared("plot")
    assert tools >= {"pytest", "hypothesis", "mypy", "ruff", "ray", "playwright", "duckdb", "lm-eval"}
    # torch and transformers bring these.
    assert needed("longthink", "plot") & tools <= {"pyyaml", "jinja2", "fsspec"}


@pytest.mark.slow
def test_the_demo_runs_without_the_tools(tmp_path):
    """Everything that its stage does not install is hidden from it; the picture is drawn all the same."""
    ours = needed("longthink", "plot")
    hidden = [
        module
        for module, packages in importlib.metadata.packages_distributions().items()
        if not ours & set(map(canonicalize_name, packages))
    ]
    assert {"pytest", "pyarrow", "pandas", "scipy"} <= set(hidden)
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({hidden!r})); from longthink.cli import main; "
        "sys.exit(main('demo --size s --decode-budget 64 --policies dense,raas --workers 1'.split()))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "dense held everything and got the right answer." in done.stdout
    assert (tmp_path / "longthink-demo.png").stat().st_size > 10_000
