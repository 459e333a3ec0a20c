"""The commands and options are a promise: changing one must be meant.

To accept a change: ``python -m tests.cli.test_surface > tests/cli/surface.txt``.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from longthink.cli.app import app

FROZEN = Path(__file__).with_name("surface.txt")


def surface(node=app, path="longthink"):
    """Lines of all commands with their arguments, options and defaults, from the application itself."""
    lines = [path]
    if node.default_command is not None:
        for argument in node.assemble_argument_collection():
            if argument.parse and argument.show:
                shown = "" if argument.field_info.required else f" = {argument.field_info.default}"
                lines.append(f"  {' '.join(argument.names)}{shown}")
    for name in sorted(name for name in node if not name.startswith("-")):
        lines += surface(node[name], f"{path} {name}")
    return lines


def test_surface_is_the_frozen_one():
    assert surface(app) + surface(app.meta)[1:2] == FROZEN.read_text().splitlines()


def test_help_names_every_command(call):
    code, out, _ = call("--help")
    assert code == 0
    for name in ("generate", "demo", "policies", "calibrate", "doctor", "reasoner", "--version", "--debug"):
        assert name in out


def test_version(call):
    from longthink import __version__

    assert call("--version") == (0, f"longthink {__version__}\n", "")


def test_help_loads_no_heavy_package():
    code = (
        "import sys; from longthink.cli import main; main(['generate', '--help']); "
        "print(sorted({'torch', 'transformers', 'matplotlib', 'numpy'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("command", ["generate", "demo", "policies", "calibrate", "doctor", "reasoner"])
def test_every_command_explains_itself(call, command):
    code, out, err = call(command, "--help")
    assert (code, err) == (0, "")
    assert f"Usage: longthink {command}" in out


if __name__ == "__main__":
    print("\n".join(surface(app) + surface(app.meta)[1:2]))


def test_the_package_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "longthink", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("longthink ")
