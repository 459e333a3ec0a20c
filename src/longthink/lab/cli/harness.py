"""``longthink lm-eval``: the command of lm-evaluation-harness, which then knows the model ``longthink``."""

import argparse
import json
from collections.abc import Sequence
from typing import Annotated, Any

from cyclopts import Parameter

from longthink.config import DEFAULT_POLICY


def lm_eval(*arguments: Annotated[str, Parameter(allow_leading_hyphen=True)]) -> int:
    """Run lm-evaluation-harness on a bounded cache: all its arguments, and its model "longthink".

    For example: longthink lm-eval --model longthink --model_args pretrained=MODEL,policy=raas,budget=1024
    --tasks gsm8k. Needs the extra lm-eval.

    Parameters
    ----------
    arguments
        What would follow "lm_eval"; "lm_eval run --help" lists it.
    """
    _check_budget(arguments)
    from longthink.lab.evaluate.harness import main

    main(arguments)
    return 0


def _check_budget(arguments: Sequence[str]) -> None:
    """Refuse a policy and a budget that do not suit each other, before the harness loads for a minute."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--model", "-M")
    parser.add_argument("--model_args", "-a", nargs="*", action="extend", default=[])
    parser.add_argument("--config")
    try:
        given, _ = parser.parse_known_args(arguments)
        values = _model_values(given.model_args)
    except (argparse.ArgumentError, ValueError):
        return
    if given.model != "longthink" or given.config is not None:
        return
    from longthink.policies import make_policy, policy_budget

    budget = {name: values[name] for name in ("budget", "decode_budget") if name in values}
    policy_budget(make_policy(values.get("policy", DEFAULT_POLICY)), **budget)


def _model_values(words: Sequence[str]) -> dict[str, Any]:
    text = ",".join(words).strip()
    if text.startswith("{"):
        return dict(json.loads(text))
    pairs = (part.partition("=") for part in text.split(",") if part)
    return {name.strip(): int(value) if value.isdecimal() else value for name, _, value in pairs}
