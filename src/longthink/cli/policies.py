"""``longthink policies``: what each policy keeps, and what it costs."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from longthink.cli.options import Switch
from longthink.cli.table import Table
from longthink.cli.terminal import write_json, write_table

if TYPE_CHECKING:
    from longthink.policies import Policy


def policies(*, json: Switch = False) -> int:
    """List the cache policies.

    Time and memory are per token and per layer, for N tokens of text and a budget of L.

    Parameters
    ----------
    json
        Print a JSON list.
    """
    from longthink.policies import available_policies, get_policy_class

    rows = [_describe(get_policy_class(name)) for name in available_policies()]
    if json:
        write_json(rows)
    else:
        _print_table(rows)
    return 0


def _describe(cls: type[Policy]) -> dict[str, Any]:
    return {
        "name": cls.name,
        "time": cls.info.time,
        "memory": cls.info.memory,
        "keeps": cls.info.keeps,
        "options": {option.name: option.default for option in dataclasses.fields(cls)},
        "source": cls.info.source,
    }


def _print_table(rows: list[dict[str, Any]]) -> None:
    table = Table(
        note="time and memory per token and layer; N: tokens of text so far, L: budget",
        columns=dict.fromkeys(("policy", "time", "memory"), "code")
        | {"keeps": "words", "options": "code", "source": "words"},
        rows=[
            [
                row["name"], row["time"], row["memory"], row["keeps"],
                "\n".join(f"{name}={value}" for name, value in row["options"].items()), row["source"],
            ]
            for row in rows
        ],
    )  # fmt: skip
    write_table(table)
