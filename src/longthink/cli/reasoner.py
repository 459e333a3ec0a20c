"""``longthink reasoner``: the built-in model's problems, training and evaluation."""

from __future__ import annotations

from cyclopts import App

from longthink.cli.options import ProblemOptions
from longthink.cli.terminal import out_console

reasoner_app = App(
    name="reasoner", help="The built-in reasoning model: its problems, its training, its accuracy."
)

_DEFAULTS = ProblemOptions()


@reasoner_app.command
def problem(*, options: ProblemOptions = _DEFAULTS) -> int:
    """Print a problem and its worked solution."""
    from longthink.reasoner import make_problem

    made = make_problem(seed=options.seed, profile=options.profile, size=options.size)
    console = out_console()
    for title, text in (("Problem", made.prompt), ("Solution", made.solution), ("Answer", made.answer)):
        console.print(title, style="bold")
        console.print(text, markup=False, soft_wrap=True)
        console.print()
    return 0
