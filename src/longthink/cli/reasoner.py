"""``longthink reasoner``: the built-in model's problems."""

from cyclopts import App

from longthink.cli.options import ProblemOptions
from longthink.cli.terminal import write_text

reasoner_app = App(
    name="reasoner", help="The problems of the built-in reasoning model.", suppress_keyboard_interrupt=False
)

_PROBLEM = ProblemOptions()


@reasoner_app.command
def problem(*, options: ProblemOptions = _PROBLEM) -> int:
    """Print a problem and its worked solution."""
    from longthink.reasoner import make_problem

    made = make_problem(seed=options.seed, profile=options.profile, size=options.size)
    write_text(f"Problem\n{made.prompt}\n\nSolution\n{made.solution}\n\nAnswer\n{made.answer}\n")
    return 0
