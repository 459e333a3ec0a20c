"""The house is in order: sizes, safety, packaging, docs, and nothing of the machine it was written on.

Each rule is a function that returns faults, and each has a test that shows it a breach, so that no rule is empty.
"""

import ast
import dataclasses
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from pyarrow import parquet

import longthink
from longthink.cli.app import LABORATORY
from longthink.policies import available_policies, get_policy_class

ROOT = Path(__file__).parent.parent
SRC = ROOT / "src" / "longthink"
DOCS = ROOT / "docs"
BENCH = ROOT / "bench"
PEERS = BENCH / "peers"
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_LINES = {"longthink": 18_500, "longthink-lab": 9_800}
"""Of Python in each wheel, which grow by policies and by commands only; 18,500 is the most that the core may have."""
BUILT_IN = (
    "dense", "h2o", "keydiff", "lazy_eviction", "milestone", "quest", "r_kv", "raas", "random", "recall", "recency",
    "snapkv", "streaming_llm", "tova", "tri_attention", "vase",
)  # fmt: skip

python_files = sorted(
    path
    for folder in ("src", "lab", "bench", "tools", "tests", "scripts", "examples")
    for path in (ROOT / folder).rglob("*.py")
)
source_files = [path for path in python_files if SRC in path.parents]
lab_files = [path for path in source_files if SRC / "lab" in path.parents]
wheels = {"longthink": sorted({*source_files} - {*lab_files}), "longthink-lab": lab_files}
"""The files of each distribution, which tests/test_wheels.py builds."""
projects = {"longthink": ROOT / "pyproject.toml", "longthink-lab": ROOT / "lab" / "pyproject.toml"}
outside_files = [p for p in python_files if p.relative_to(ROOT).parts[0] in ("bench", "tools", "examples")]
"""What stands beside the package and not in the wheel."""


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


# Sizes ----------------------------------------------------------------------------------------------------------


def size_faults(source: str) -> list[str]:
    """Files and functions that are too long. A function's docstring is not counted."""
    faults = []
    lines = source.count("\n")
    if lines > MAX_FILE_LINES:
        faults.append(f"{lines} lines, more than {MAX_FILE_LINES}")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            if ast.get_docstring(node) is not None:
                length -= node.body[0].end_lineno - node.body[0].lineno + 1
            if length > MAX_FUNCTION_LINES:
                faults.append(f"{node.name} has {length} lines, more than {MAX_FUNCTION_LINES}")
    return faults


@pytest.mark.parametrize("path", python_files, ids=name_of)
def test_files_and_functions_are_short(path):
    assert size_faults(path.read_text()) == []


def test_size_rule_sees_long_files_and_functions():
    body = "    x = 1\n"
    assert size_faults("x = 1\n" * 401) == ["401 lines, more than 400"]
    assert size_faults("def f():\n" + body * 60) == ["f has 61 lines, more than 60"]
    assert size_faults("def f():\n" + '    """A\n' + "    B\n" * 60 + '    """\n' + body * 59) == []


@pytest.mark.parametrize("name", wheels)
def test_the_wheels_are_small(name):
    lines = sum(path.read_text().count("\n") for path in wheels[name])
    assert lines <= MAX_LINES[name] <= 18_500


# Safety ---------------------------------------------------------------------------------------------------------

UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
UNSAFE_NAMES = {"eval", "exec", "compile", "__import__"}
UNSAFE_CALLS = {"torch.load", "torch.save", "os.system", "os.popen"}
UNSAFE_OPTIONS = {"trust_remote_code", "allow_pickle", "shell"}


def safety_faults(source: str) -> list[str]:
    """Ways to run somebody else's code."""
    faults = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            faults += [
                f"imports {alias.name}" for alias in node.names if alias.name.split(".")[0] in UNSAFE_MODULES
            ]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in UNSAFE_MODULES:
            faults.append(f"imports {node.module}")
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in UNSAFE_NAMES | UNSAFE_CALLS:
                faults.append(f"calls {called}")
        elif (
            isinstance(node, ast.keyword)
            and node.arg in UNSAFE_OPTIONS
            and ast.unparse(node.value) != "False"
        ):
            faults.append(f"passes {node.arg}={ast.unparse(node.value)}")
    return faults


@pytest.mark.parametrize("path", [*source_files, *outside_files], ids=name_of)
def test_nothing_runs_code_of_strangers(path):
    assert safety_faults(path.read_text()) == []


@pytest.mark.parametrize(
    "breach",
    [
        "import pickle",
        "from joblib import load",
        "eval('1')",
        "torch.load(path)",
        "from_pretrained(name, trust_remote_code=True)",
        "from_pretrained(name, trust_remote_code=remote)",
        "np.load(path, allow_pickle=True)",
        "subprocess.run(text, shell=True)",
    ],
)
def test_safety_rule_sees(breach):
    assert len(safety_faults(breach)) == 1


@pytest.mark.parametrize(
    "fine", ["model.eval()", "torch.compile(f)", "f(trust_remote_code=False)", "import json"]
)
def test_safety_rule_lets_pass(fine):
    assert safety_faults(fine) == []


# Packaging ------------------------------------------------------------------------------------------------------


def test_installed_metadata():
    metadata = importlib.metadata.metadata("longthink")
    assert metadata["Version"] == longthink.__version__
    assert metadata["Requires-Python"] in ("<3.14,>=3.11", ">=3.11,<3.14")
    assert metadata["License-Expression"] == "Apache-2.0"
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="longthink")
    assert callable(script.load())


def test_readme_is_the_project_page():
    """A README that is there is also what a package index shows, and the other way round."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project.get("readme") == ("README.md" if (ROOT / "README.md").exists() else None)


def imported_packages(source: str) -> set[str]:
    """Top-level packages that a file imports, in functions too, but for our own and the standard library."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module)
    return {name.split(".")[0] for name in found} - sys.stdlib_module_names - {"longthink"}


IMPORTED_AS = {"pyyaml": "yaml"}
"""Packages that are not imported by the name they are installed by."""


def declared_packages(requirements: list[str]) -> set[str]:
    """Import names of requirements, but for our own."""
    names = {re.match(r"[\w-]+", line)[0].replace("-", "_") for line in requirements}
    return {IMPORTED_AS.get(name, name) for name in names} - {"longthink", "longthink_lab"}


def declared_by(name: str) -> tuple[set[str], set[str]]:
    """Packages that a plain install of a distribution brings, and those of its extras."""
    project = tomllib.loads(projects[name].read_text())["project"]
    extras = project["optional-dependencies"].items()
    optional = [line for extra, lines in extras if extra != "dev" for line in lines]
    return declared_packages(project.get("dependencies", [])), declared_packages(optional)


@pytest.mark.parametrize("name", wheels)
def test_what_is_imported_is_declared(name):
    """A plain install or an extra brings what a wheel imports, and nothing that it does not."""
    core, _ = declared_by("longthink")
    plain, optional = declared_by(name)
    imported = set().union(*(imported_packages(path.read_text()) for path in wheels[name]))
    assert imported - core - plain - optional == set()
    assert plain - imported == set()


def test_the_wheels_have_the_same_extras():
    """``longthink[report]`` brings what the laboratory's extra of that name does."""
    core, lab = (
        tomllib.loads(path.read_text())["project"]["optional-dependencies"] for path in projects.values()
    )
    assert {name: core[name] for name in lab} == {name: [f"longthink-lab[{name}]"] for name in lab}
    assert {extra for _, extra in LABORATORY.values()} <= lab.keys()


def test_workers_of_peers_import_what_they_pin():
    """They run in environments of their own, where longthink and its dependencies are not installed."""
    workers = {path.stem.removeprefix("with_"): path for path in PEERS.glob("with_*.py")}
    assert workers.keys() == {path.stem for path in PEERS.glob("requirements/*.txt")} != set()
    for name, path in workers.items():
        lines = (PEERS / "requirements" / f"{name}.txt").read_text().splitlines()
        pins = [line for line in lines if line[0] != "#"]
        assert all("==" in line for line in pins)
        assert imported_packages(path.read_text()) - declared_packages(pins) == {"bench"}, name
        assert "longthink." not in path.read_text()
    for path in (BENCH / "__init__.py", PEERS / "__init__.py", BENCH / "protocol.py"):
        assert imported_packages(path.read_text()) == set() and "import longthink" not in path.read_text()


def test_import_rule_sees_late_and_dotted_imports():
    source = (
        "import os\nfrom torch.nn import functional\ndef f():\n    import rich.table, json\nfrom . import a"
    )
    assert imported_packages(source) == {"torch", "rich"}


def test_importing_the_package_is_cheap():
    """Without use of a model neither torch nor transformers is loaded, so ``longthink --help`` answers at once."""
    code = (
        "import sys, longthink; print(sorted({'torch', 'transformers', 'matplotlib'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Docs -----------------------------------------------------------------------------------------------------------

SECTIONS = tuple(
    f"## {title}"
    for title in ("Rule", "Time and memory", "Options", "Differs from the paper", "When to use it", "Source")
)


def page_faults(page: str, options: set[str], facts: tuple[str, ...]) -> list[str]:
    """What a policy's page lacks, or says of options that there are not."""
    faults = [f"no section {section}" for section in SECTIONS if section not in page]
    faults += [f"does not say {fact!r}" for fact in facts if fact not in page]
    table = page.partition("## Options")[2].partition("\n## ")[0]
    described = set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE))
    faults += [f"does not describe option {option}" for option in sorted(options - described)]
    faults += [f"describes an option that is not there: {option}" for option in sorted(described - options)]
    return faults


@pytest.mark.parametrize("name", [name for name in available_policies() if name in BUILT_IN])
def test_policy_has_a_true_page(name):
    cls = get_policy_class(name)
    page = (DOCS / "policies" / f"{name}.md").read_text()
    defaults = {field.name: field.default for field in dataclasses.fields(cls)}
    facts = (cls.info.keeps, *re.findall(r"arXiv \d+\.\d+", cls.info.source))
    assert page_faults(page, defaults.keys(), facts) == []
    for option, default in defaults.items():
        written = re.search(rf"^\| `{option}` \| (.+?) \|", page, re.MULTILINE)[1].strip("`")
        assert float(written) == default if type(default) in (int, float) else written == str(default).lower()
    assert f"| {cls.info.time} | {cls.info.memory} |" in page


def test_page_rule_sees_what_is_missing():
    page = "\n".join(SECTIONS).replace("## Options", "## Options\n| `gone` | 1 | x |\n")
    assert page_faults(page, {"gone"}, ()) == []
    assert len(page_faults(page, {"here"}, ("a fact",))) == 3
    assert len(page_faults("", set(), ())) == len(SECTIONS)


def test_every_policy_and_page_belong_together():
    """A page for each policy of the package, a line in the index, and no page of a policy that is gone."""
    ours = {
        name for name in available_policies() if get_policy_class(name).__module__.startswith("longthink.")
    }
    assert ours >= set(BUILT_IN)
    assert {path.stem for path in (DOCS / "policies").glob("*.md")} == ours
    index = (DOCS / "index.md").read_text()
    assert [name for name in ours if f"](policies/{name}.md)" not in index] == []


def broken_links(path: Path, text: str) -> list[str]:
    """Links to files that are not there."""
    targets = re.findall(r"\]\(([^)#\s]+)", text)
    return [t for t in targets if "://" not in t and not (path.parent / t).exists()]


@pytest.mark.parametrize("path", sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")]), ids=name_of)
def test_links_lead_somewhere(path):
    assert broken_links(path, path.read_text()) == []


def test_link_rule_sees_a_dead_link():
    assert broken_links(DOCS / "index.md", "[a](policies/raas.md#rule) [b](policies/gone.md)") == [
        "policies/gone.md"
    ]


# No trace of a machine ------------------------------------------------------------------------------------------

# Written with brackets so that this file does not match itself.
TRACES = re.compile(
    r"(?<![\w.])/(?:roo[t]|wor[k]|hom[e]/\w+|User[s]/\w+|op[t]/(?:pypi|wheels))\b"  # folders of a machine
    r"|fil[e]:///"
    r"|(?:index-ur[l]|find-link[s])[ =]+[\"']?(?:http|/)"  # somebody's package index
    r"|\b(?:10|192\.168|172\.(?:1[6-9]|2\d|3[01]))(?:\.\d{1,3}){2,3}\b(?!\.)"  # private addresses
    r"|https?://[^/\s\"']*\.(?:interna[l]|cor[p]|lo[c]al|la[n])\b"
)


def traces(text: str) -> list[str]:
    return [match[0] for match in TRACES.finditer(text)]


def tracked_files() -> list[Path]:
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name]


def test_no_trace_of_a_machine_in_tracked_files():
    found = {}
    for path in tracked_files():
        if path.is_file() and path.suffix not in (".safetensors", ".png"):
            rows = parquet.read_table(path).to_pylist() if path.suffix == ".parquet" else None
            found[name_of(path)] = traces(path.read_text() if rows is None else str(rows))
    assert len(found) > 20
    assert {name: hits for name, hits in found.items() if hits} == {}


@pytest.mark.parametrize(
    "breach",
    [
        "/wor" + "k/main",
        "cd /roo" + "t",
        "'/hom" + "e/ann/data'",
        "file" + ":///srv/wheels",
        "--index-url" + " https://mirror",
        "http://wheels.inter" + "nal/simple",
        "192.168." + "0.17",
    ],
)
def test_trace_rule_sees(breach):
    assert len(traces(breach)) == 1


@pytest.mark.parametrize(
    "fine", ["src/work/x", "a/root", "https://arxiv.org/abs/2502.11147", "10.5 %", "../data"]
)
def test_trace_rule_lets_pass(fine):
    assert traces(fine) == []


# Set-up ---------------------------------------------------------------------------------------------------------


def test_scripts_are_executable_and_parse():
    for name in ("scripts/setup.sh", "scripts/chromium.sh", ".ci/run"):
        assert os.access(ROOT / name, os.X_OK), name
        subprocess.run(["bash", "-n", str(ROOT / name)], check=True)


def test_constraints_pin_what_is_installed():
    """The environment is the one that constraints.txt describes, so a result here is a result elsewhere."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    pins = dict(line.split("==") for line in lines)
    assert {"torch", "transformers", "pytest", "hatchling"} <= pins.keys()
    if "CI" in os.environ:
        installed = {
            name: importlib.metadata.version(name).split("+")[0] for name in ("torch", "transformers")
        }
        assert installed == {name: pins[name] for name in installed}


def test_make_help_names_the_targets():
    done = subprocess.run(
        ["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    listed = {line.split()[1] for line in done.stdout.splitlines() if line.startswith("  make ")}
    assert listed >= {"setup", "demo", "test", "test-fast", "lint", "format", "build"}
