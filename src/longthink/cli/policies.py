"""``longthink policies``: what each policy keeps, and what it costs."""

import dataclasses
from typing import Any

from longthink.cli.options import Switch
from longthink.cli.table import Table
from longthink.cli.terminal import write_json, write_table


def policies(*, json: Switch = False) -> int:
    """List the cache policies.

    Time and memory are per token and per layer, for N tokens of text and a budget of L.

    Parameters
    ----------
    json
        Print a JSON list.
    """
    from longthink.policies import available_policies, get_policy_class

    rows: list[dict[str, Any]] = []
    for cls in map(get_policy_class, available_policies()):
        info = {name: getattr(cls.info, name) for name in ("time", "memory", "keeps")}
        options = {option.name: option.default for option in dataclasses.fields(cls)}
        rows.append({"name": cls.name, **info, "options": options, "source": cls.info.source})
    if json:
        write_json(rows)
        return 0
    for row in rows:
        row["options"] = "\n".join(f"{name}={value}" for name, value in row["options"].items())
    note = "time and memory per token and layer; N: tokens of text so far, L: budget"
    columns = dict.fromkeys(("policy", "time", "memory"), "code")
    columns |= {"keeps": "words", "options": "code", "source": "words"}
    write_table(Table(note=note, columns=columns, rows=[list(row.values()) for row in rows]))
    return 0
