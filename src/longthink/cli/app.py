"""The command line application: its commands, and the one way into all of them.

Only light modules are imported here; torch, transformers and matplotlib are imported inside the commands that use
them, so that ``longthink --help`` answers at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

from cyclopts import App, Parameter

from longthink.cli.advise import advise
from longthink.cli.bench import bench_app, wait_passively
from longthink.cli.bench_peers import peers
from longthink.cli.bench_vllm import vllm
from longthink.cli.demo import demo
from longthink.cli.doctor import doctor
from longthink.cli.errors import check_surroundings, guarded
from longthink.cli.eval import evaluate
from longthink.cli.generate import generate
from longthink.cli.harness import lm_eval
from longthink.cli.options import Switch
from longthink.cli.policies import policies
from longthink.cli.reasoner import reasoner_app
from longthink.cli.report import report
from longthink.cli.trace import trace
from longthink.cli.vllm_args import vllm_args
from longthink.cli.whatif import what_if


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
for _command in (generate, demo, policies, doctor, report, trace, advise):
    app.command(_command)
app.command(what_if, name="what-if")
app.command(vllm_args, name="vllm-args")
app.command(evaluate, name="eval")
app.command(reasoner_app)
bench_app.command(peers)
bench_app.command(vllm)
app.command(bench_app)
# Its --help is the harness's own.
app.command(lm_eval, name="lm-eval", help_flags=[], version_flags=[])
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
