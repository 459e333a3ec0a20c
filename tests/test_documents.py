"""What README.md, CONTRIBUTING.md and docs/ name exists: commands with their options, modules, attributes, sizes."""

import re
import shlex
from importlib import import_module
from pathlib import Path

import cyclopts
import pytest

from longthink.cli.app import LABORATORY, app

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
CACHE = ("policies", "kernels", "cache", "accelerators")
"""The packages that README.md means by "the cache": what decides, stores and reads, for any model library."""


def fenced(text: str) -> list[tuple[str, str]]:
    """Language and content of each fenced block."""
    return re.findall(r"^```(\w*)[^\n]*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def outside_fences(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def inline(text: str) -> list[str]:
    prose = re.sub(r"^ {4}.*$", "", outside_fences(text), flags=re.MULTILINE)
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]


def shell_lines(text: str) -> list[str]:
    """Lines of indented blocks and of fenced ones in no language; a backslash joins a line with the next."""
    blocks = [code for language, code in fenced(text) if language in ("", "sh", "bash", "console")]
    blocks += [line[4:] for line in outside_fences(text).splitlines() if line.startswith("    ")]
    return "\n".join(blocks).replace("\\\n", " ").splitlines()


def commands(text: str) -> list[str]:
    """Every ``longthink COMMAND ...`` of a page."""
    found = []
    for line in shell_lines(text):
        found += re.findall(r"(?:^|\$\(|\s)(?:\.venv/bin/)?longthink ([a-z][^#)|;&]*)", line)
    for code in inline(text):
        found += re.findall(r"(?:^|\$\()(?:\.venv/bin/)?longthink ([a-z][^)]*)", code)
    return [command.strip() for command in found]


def command_fault(command: str) -> str | None:
    """What is wrong with a command. Arguments may be missing, because prose names commands without any."""
    words = ["1" if word == "N" else word for word in shlex.split(command) if word != "..."]
    try:
        app.parse_args(words, exit_on_error=False, print_error=False)
    except cyclopts.MissingArgumentError:
        # It hides unknown options, which come behind it.
        known = {
            name
            for argument in app.parse_commands(words)[1][-1].assemble_argument_collection()
            for name in argument.names
        }
        unknown = {word.partition("=")[0] for word in words if word.startswith("-")} - known
        return f"longthink {command}: no option {', '.join(unknown)}" if unknown else None
    except cyclopts.CycloptsError as error:
        return f"longthink {command}: {error}"
    return None


def names(text: str) -> set[str]:
    """Dotted names under ``longthink`` in code, those of import statements included."""
    python = [code for language, code in fenced(text) if language == "python"]
    python += [line for line in outside_fences(text).splitlines() if line.startswith("    ")]
    code = "\n".join([*python, *inline(text)])
    found = set(re.findall(r"(?<![\w./\"-])longthink(?:\.[A-Za-z_]\w*)+", code))
    for module, imported in re.findall(r"from (longthink[\w.]*) import (\([^)]*\)|[^\n#]+)", code):
        found |= {f"{module}.{name.split()[0]}" for name in imported.strip("()").split(",") if name.strip()}
    return found


def name_fault(name: str) -> str | None:
    place = import_module("longthink")
    for i, part in enumerate(parts := name.split(".")):
        if i and hasattr(place, part):
            place = getattr(place, part)
        elif i:
            try:
                place = import_module(".".join(parts[: i + 1]))
            except ModuleNotFoundError:
                return f"{name}: {'.'.join(parts[:i])} has no {part}"
    return None


def page_faults(text: str) -> list[str]:
    faults = [*map(command_fault, commands(text)), *map(name_fault, sorted(names(text)))]
    return [fault for fault in faults if fault is not None]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_and_names_of_a_page_exist(path):
    assert page_faults(path.read_text()) == []


def test_every_command_is_in_a_document():
    """A parser that finds nothing would pass every page."""
    named = {command.split()[0] for path in PAGES for command in commands(path.read_text())}
    assert named >= {"generate", "policies", "doctor", "vllm-args", *LABORATORY} - {"demo"}


@pytest.mark.parametrize(
    "breach",
    [
        "    longthink fly --out results",
        "    .venv/bin/longthink report runs --backwards  # a comment",
        "    longthink eval --tasks reasoner/s \\\n        --policy raas",
        "run `longthink bench flight`, and then",
        "`vllm serve MODEL $(longthink vllm-args --budget-of-all 3)`",
        "```\nlongthink generate --decode-budget many\n```",
        "```python\nfrom longthink.cache import LayerCash\n```",
        "```python\nfrom longthink.cache import (\n    LayerCache,\n    LayerCash,\n)\n```",
        "    cache = longthink.make_cash(model)",
        "rows of `longthink.results.store` are",
    ],
)
def test_the_walk_sees(breach):
    assert len(page_faults(breach)) == 1


@pytest.mark.parametrize(
    "fine",
    [
        "    longthink eval ... --workers 4",
        "`longthink trace` and `longthink generate --prefill-chunk-size N`",
        "longthink keeps a fixed number of tokens",
        "```python\nimport longthink\nlongthink.generate(model, ids)\nfrom longthink.hf import DecodeStep\n```",
    ],
)
def test_the_walk_lets_pass(fine):
    assert page_faults(fine) == []


# The size of the cache ------------------------------------------------------------------------------------------


def promised_lines(readme: str) -> int:
    (number,) = re.findall(r"The cache is ([\d,]+) lines of Python", " ".join(readme.split()))
    return int(number.replace(",", ""))


def test_readme_promises_the_size_of_the_cache():
    """All lines of the four packages, rounded up to the next hundred."""
    packages = [ROOT / "src" / "longthink" / package for package in CACHE]
    lines = sum(path.read_text().count("\n") for package in packages for path in package.rglob("*.py"))
    assert promised_lines((ROOT / "README.md").read_text()) == -(-lines // 100) * 100


def test_the_promise_is_read_across_lines():
    assert promised_lines("x. The cache is 4,100\nlines of Python, y") == 4100
