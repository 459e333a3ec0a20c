"""``longthink lm-eval``: the command of lm-evaluation-harness, which then knows the model ``longthink``."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter


def lm_eval(*arguments: Annotated[str, Parameter(allow_leading_hyphen=True)]) -> int:
    """Run lm-evaluation-harness on a bounded cache: all its arguments, and its model "longthink".

    For example: longthink lm-eval --model longthink --model_args pretrained=MODEL,policy=raas,budget=1024
    --tasks gsm8k. Needs the extra lm-eval.

    Parameters
    ----------
    arguments
        What would follow "lm_eval"; "lm_eval run --help" lists it.
    """
    from longthink.evaluate.harness import main

    main(arguments)
    return 0
