"""The command line application: its commands, and the one way into all of them.

Only light modules are imported here; torch, transformers and matplotlib are imported inside the commands that use
them, so that ``longthink --help`` answers at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

from cyclopts import App, Parameter

from longthink.cli.doctor import doctor
from longthink.cli.errors import check_surroundings, guarded
from longthink.cli.generate import generate
from longthink.cli.options import Switch
from longthink.cli.policies import policies
from longthink.cli.reasoner import reasoner_app
from longthink.cli.vllm_args import vllm_args

LABORATORY = {
    "demo": "demo:demo",
    "eval": "eval:evaluate",
    "bench": "bench:bench_app",
    "trace": "trace:trace",
    "what-if": "whatif:what_if",
    "advise": "advise:advise",
    "report": "report:report",
    "lm-eval": "harness:lm_eval",
}
"""Commands of the laboratory and their places in `longthink.lab.cli`, imported when used: the core needs none."""

PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
"""Threads that wait must sleep: spinning counts as CPU time, and takes it from others."""


def wait_passively(words: list[str]) -> None:
    """Start the process again with `PASSIVE` set, if ``words`` call for a benchmark and it is not.

    OpenMP reads these variables when torch is loaded, so they cannot be set later. Where programs cannot be
    replaced by another (Windows), or torch is there already, nothing happens; the output says how it ran.
    """
    command = next((word for word in words if not word.startswith("-")), None)
    if command != "bench" or os.name != "posix" or "torch" in sys.modules:
        return
    if any(os.environ.get(name) != value for name, value in PASSIVE.items()):
        sys.stdout.flush()
        os.execve(sys.executable, sys.orig_argv, os.environ | PASSIVE)


def _version() -> str:
    from longthink import __version__

    return f"longthink {__version__}"


app = App(
    name="longthink",
    help="Bounded KV cache for reasoning models: constant memory per token, however long the chain of thought.",
    version=_version,
    help_format="markdown",
    suppress_keyboard_interrupt=False,
)
for _command in (generate, policies, doctor):
    app.command(_command)
app.command(vllm_args, name="vllm-args")
app.command(reasoner_app)
for _name, _place in LABORATORY.items():
    # The help of lm-eval is the harness's own.
    _own_help: dict[str, Any] = {"help_flags": [], "version_flags": []} if _name == "lm-eval" else {}
    app.command(f"longthink.lab.cli.{_place}", name=_name, **_own_help)
app.meta.group_parameters = "Global options"
app.meta.suppress_keyboard_interrupt = False
# What stands behind "--" is for the command, so the delimiter must reach it.
app.meta.end_of_options_delimiter = ""


@app.meta.default
def _launch(
    *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    debug: Switch = False,
) -> int:
    """Run one command.

    Parameters
    ----------
    debug
        Show tracebacks and the messages of the libraries underneath.
    """

    def action() -> int:
        if not debug:
            _quiet_libraries()
        result = app(
            _dash_is_stdin(tokens), exit_on_error=False, print_error=False, result_action="return_value"
        )
        return result if isinstance(result, int) else 0

    return guarded(action, debug=debug)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Parameters
    ----------
    arguments
        The words after ``longthink``; None takes them from ``sys.argv``.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if sys.stderr is None:
        # Notes would go to standard output instead, into the middle of a JSON document.
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  (open as long as the process is)
    if arguments is None:
        wait_passively(words)

    def action() -> int:
        check_surroundings(words)
        if not words or words[0].startswith("-"):
            for name in LABORATORY:
                app[name]  # import it: the list of commands shows the first line of each
        result = app.meta(words, exit_on_error=False, print_error=False, result_action="return_value")
        return result if isinstance(result, int) else 0

    return guarded(action, debug=False)


def _dash_is_stdin(tokens: Sequence[str]) -> list[str]:
    """Write a lone ``-`` as ``--file=-``: the parser takes it for a nameless option."""
    words = list(tokens)
    end = words.index("--") if "--" in words else len(words)
    for i in range(end):
        if words[i] == "-" and words[i - 1] != "--file":
            words[i] = "--file=-"
    return words


def _quiet_libraries() -> None:
    """Keep the warnings and progress bars of the libraries underneath off the terminal."""
    import os
    import warnings

    warnings.simplefilter("ignore")
    # Read when the libraries are imported, which is later than this.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
