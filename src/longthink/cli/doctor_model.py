"""``longthink doctor --model``: is a model served, and what does its cache take, before any weights are loaded?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from longthink.cli.errors import EXIT_FAILED
from longthink.cli.table import Table
from longthink.cli.terminal import out_console, write_json, write_table
from longthink.cli.text import size_text
from longthink.models import load_config

if TYPE_CHECKING:
    from longthink.hf.forecast import Forecast

BUDGETS = (1024, 4096, 16384)
LENGTHS = (32_768, 131_072)


def examine_model(name: str, *, json: bool) -> int:
    """Print what the configuration of a model says; the exit code."""
    from longthink.hf.forecast import forecast
    from longthink.hf.support import unsupported_config

    config = load_config(name)
    reason = unsupported_config(config)
    report: dict[str, Any] = {
        "model": name,
        "architecture": (config.architectures or [config.model_type])[0],
        "served": reason is None,
        "reason": reason,
    }
    if reason is None:
        report |= _costs(forecast(config))
    if json:
        write_json(report)
    else:
        _print(report)
    return 0 if reason is None else EXIT_FAILED


def _costs(found: Forecast) -> dict[str, Any]:
    return {
        "layers": {"bounded": found.full, "windowed": len(found.windows), "recurrent": found.recurrent},
        "windows": sorted(set(found.windows)),
        "bytes_per_token": found.token_bytes,
        "dense_bytes": {str(tokens): found.dense_bytes(tokens) for tokens in LENGTHS},
        "budgets": [
            {
                "budget": budget,
                "kv_bytes": found.bounded_bytes(budget),
                "saved": {
                    str(tokens): found.dense_bytes(tokens) - found.bounded_bytes(budget) for tokens in LENGTHS
                },
            }
            for budget in BUDGETS
        ],
    }


def _print(report: dict[str, Any]) -> None:
    console = out_console()
    verdict = "served" if report["served"] else f"not served: it has {report['reason']}"
    console.print(f"model    {report['model']} ({report['architecture']}): {verdict}", markup=False)
    if not report["served"]:
        return
    layers, windows = report["layers"], ", ".join(f"{window:,}" for window in report["windows"])
    kinds = [f"{layers['bounded']} with full attention, which the budget bounds"]
    if layers["windowed"]:
        kinds.append(f"{layers['windowed']} with a window of {windows} tokens")
    if layers["recurrent"]:
        kinds.append(f"{layers['recurrent']} with a state of fixed size, which is not counted below")
    console.print(f"layers   {'; '.join(kinds)}", markup=False)
    console.print(f"a token  {report['bytes_per_token']:,} bytes in the bounded layers", markup=False)
    dense = report["dense_bytes"]
    write_table(
        Table(
            title="Keys and values of one row",
            columns={"tokens kept": "formatted", "cache": "size"}
            | {f"saved at {tokens:,} tokens": "formatted" for tokens in LENGTHS},
            rows=[
                ["all (dense)", None, *(f"0 of {size_text(dense[str(tokens)])}" for tokens in LENGTHS)],
                *(
                    [
                        f"{row['budget']:,}",
                        row["kv_bytes"],
                        *(_saved(row["saved"][str(tokens)], dense[str(tokens)]) for tokens in LENGTHS),
                    ]
                    for row in report["budgets"]
                ),
            ],
            note="transformers keeps something smaller of a token, from which it computes keys and values."
            if any(size < 0 for row in report["budgets"] for size in row["saved"].values())
            else "",
        )
    )


def _saved(size: int, dense: int) -> str:
    if size < 0:
        return f"nothing: {size_text(-size)} more"
    return f"{size_text(size)} ({size / dense:.0%})"
