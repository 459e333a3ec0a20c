"""The command line application: its commands and their common entry point.

Only light modules are imported here; commands import torch, transformers and matplotlib when they run, so that
``longthink --help`` answers in 0.3 s.
"""

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Annotated, Any

from cyclopts import App, Parameter

from longthink import __version__
from longthink.cli.calibrate import calibrate
from longthink.cli.doctor import doctor
from longthink.cli.errors import check_surroundings, guarded
from longthink.cli.generate import generate
from longthink.cli.options import Switch
from longthink.cli.policies import policies
from longthink.cli.progress import show_log
from longthink.cli.reasoner import reasoner_app
from longthink.cli.vllm_args import vllm_args
from longthink.errors import MissingExtraError

LABORATORY = {
    "demo": ("demo:demo", "plot"),
    "eval": ("eval:evaluate", "eval"),
    "fidelity": ("fidelity:fidelity", "eval"),
    "bench": ("bench:bench_app", "eval"),
    "trace": ("trace:trace", "analyze"),
    "what-if": ("whatif:what_if", "analyze"),
    "advise": ("advise:advise", "eval"),
    "report": ("report:report", "report"),
    "lm-eval": ("harness:lm_eval", "lm-eval"),
}
"""Commands of the laboratory, their places in `longthink.lab.cli`, imported on use, and the extra that brings each.

The laboratory is a wheel of its own, longthink-lab, so it may be missing.
"""

PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
"""Makes waiting threads sleep: spinning counts as CPU time and takes it from other threads."""


def wait_passively(words: list[str]) -> None:
    """Restart the process with `PASSIVE` set, if ``words`` start a benchmark and it is not set.

    OpenMP reads these variables when torch is loaded, so they cannot be set later. On Windows, and if torch has been
    loaded, this has no effect; benchmark output records the settings.
    """
    command = next((word for word in words if not word.startswith("-")), None)
    if command != "bench" or os.name != "posix" or "torch" in sys.modules:
        return
    if any(os.environ.get(name) != value for name, value in PASSIVE.items()):
        sys.stdout.flush()
        os.execve(sys.executable, sys.orig_argv, os.environ | PASSIVE)


def add_laboratory(app: App, *, installed: bool) -> None:
    """Add the commands of the laboratory; where it is not installed they say how to install it."""
    for name, (place, extra) in LABORATORY.items():
        if installed:
            # The help of lm-eval is the harness's own.
            own_help: dict[str, Any] = {"help_flags": [], "version_flags": []} if name == "lm-eval" else {}
            app.command(f"longthink.lab.cli.{place}", name=name, **own_help)
        else:
            app.command(
                _missing(name, extra), name=name, group="Not installed", help_flags=[], version_flags=[]
            )


def _missing(name: str, extra: str) -> Callable[..., None]:
    remedy = f'pip install "longthink[{extra}]"'

    def missing(*words: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)]) -> None:
        raise MissingExtraError(f"{name} belongs to the laboratory, which is not installed: {remedy}")

    missing.__doc__ = remedy
    return missing


app = App(
    name="longthink",
    help="Bounded KV cache for reasoning models: constant memory per token, however long the chain of thought.",
    version=f"longthink {__version__}",
    help_format="markdown",
    suppress_keyboard_interrupt=False,
)
for _command in (generate, policies, calibrate, doctor):
    app.command(_command)
app.command(vllm_args, name="vllm-args")
app.command(reasoner_app)
add_laboratory(app, installed=find_spec("longthink.lab") is not None)
app.meta.group_parameters = "Global options"
app.meta.suppress_keyboard_interrupt = False
# Words after "--" are for the command, so the delimiter must reach it.
app.meta.end_of_options_delimiter = ""


@app.meta.default
def _launch(
    *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)], debug: Switch = False
) -> int:
    """Run one command.

    Parameters
    ----------
    debug
        Show tracebacks and the messages of the underlying libraries.
    """

    def action() -> int:
        show_log()
        if not debug:
            warnings.simplefilter("ignore")
            # Read when the libraries are imported, which is after this.
            os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        result = app(
            _dash_is_stdin(tokens), exit_on_error=False, print_error=False, result_action="return_value"
        )
        return result if isinstance(result, int) else 0

    return guarded(action, debug=debug)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (``arguments`` are the words after ``longthink``) and return its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if sys.stderr is None:
        # Notes would otherwise go to standard output, into the middle of a JSON document.
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  (open until the process ends)
    if os.environ.get("COLUMNS") == "0":
        # Some terminals say so for "not known"; rich would print nothing.
        del os.environ["COLUMNS"]
    if arguments is None:
        wait_passively(words)

    def action() -> int:
        check_surroundings(words)
        if not words or words[0].startswith("-"):
            for name in LABORATORY:
                app[name]  # imports it: the list of commands shows the first line of its docstring
        result = app.meta(words, exit_on_error=False, print_error=False, result_action="return_value")
        return result if isinstance(result, int) else 0

    return guarded(action, debug=False)


def _dash_is_stdin(tokens: Sequence[str]) -> list[str]:
    """Replace a lone ``-`` by ``--file=-``: the parser would take it for an option without a name."""
    words = list(tokens)
    end = words.index("--") if "--" in words else len(words)
    for i in range(end):
        if words[i] == "-" and words[i - 1] != "--file":
            words[i] = "--file=-"
    return words
