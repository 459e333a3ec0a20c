"""The page of tables, made from the content of the JSON file."""

from typing import Any

from .parts import ONCE

WORTH_KEEPING = 1.2
"""Least speedup over the general route: fused kernels below it are deleted (docs/gpu.md)."""


def page(content: dict[str, Any]) -> str:
    """All tables, in Markdown."""
    machine, versions = content.get("machine", {}), content.get("versions", {})
    lines = [f"# GPU check of {content['made']}", ""]
    if content["self_test"]:
        lines += ["**Self-test with tiny models: its numbers mean nothing.**", ""]
    if not content["ended"]:
        lines += ["**Not ended yet, or killed.**", ""]
    lines += [
        f"{machine.get('device', 'device unknown')}, {machine.get('memory_gb', '?')} GB, copy "
        f"{content.get('copy_gb_per_s', '?')} GB/s; "
        + ", ".join(f"{name} {version}" for name, version in versions.items()),
        "",
        f"{content['seconds']:.0f} s in all. Times are medians over blocks of 16 steps, one of which opens pages.",
    ]
    for table in (_tests, _routes, _once, _few_layers, _dense, _kernels, _parts):
        lines += table(content)
    return "\n".join([*lines, ""])


def _tests(content: dict[str, Any]) -> list[str]:
    rows = [(group, n["passed"], n["failed"], n["skipped"]) for group, n in content["tests"].items()]
    failed = [
        f"- `{row['test'].partition('::')[2]}`: {row['message'][:160]}".replace("\n", " ")
        for part in content["parts"]
        for row in part.get("found", {}).get("rows", [])
        if row.get("outcome") == "failed"
    ]
    return [*_table("Tests", "group, passed, failed, skipped", rows), *_below(failed)]


def _routes(content: dict[str, Any]) -> list[str]:
    head = (
        "shape, layers, policy, budget, rows, general ms, fused ms, general all layers, fused all layers, "
        f"times as fast, {WORTH_KEEPING} or more, host ms, of copy, K and V MB, most allocated MB, "
        "graphs per step, ready after s"
    )
    rows = []
    for cell in content["routes"]:
        general, fused = cell.get("general", {}), cell.get("fused", {})
        faster = cell.get("times_as_fast")

        def both(name: str, show: Any = str, sides: Any = (general, fused)) -> str:
            return " / ".join("-" if side.get(name) is None else show(side[name]) for side in sides)

        rows.append((
            cell["shape"], f"{cell['layers']} of {cell['layers_of']}", cell["policy"], cell["budget"],
            cell["rows"], general.get("ms", "-"), fused.get("ms", "-"), general.get("ms_all_layers", "-"),
            fused.get("ms_all_layers", "-"), faster or "-",
            "-" if faster is None else "yes" if faster >= WORTH_KEEPING else "no",
            both("host_ms"), both("of_copy", _percent), both("kv_bytes", _megabytes),
            both("peak_bytes", _megabytes), both("replays_per_step"), both("warm_up_s"),
        ))  # fmt: skip
    return _table("General route and fused kernels, per step (general / fused)", head, rows)


def _once(content: dict[str, Any]) -> list[str]:
    """What it costs and saves to compile a layer once, and not each of them."""
    head = "shape, policy, budget, rows, general ms, once ms, general ready after s, once ready after s, once graphs"
    rows = []
    for cell in content["routes"]:
        if once := cell.get(ONCE):
            general = cell.get("general", {})
            rows.append((
                cell["shape"], cell["policy"], cell["budget"], cell["rows"], general.get("ms", "-"), once["ms"],
                general.get("warm_up_s", "-"), once["warm_up_s"], once["replays_per_step"],
            ))  # fmt: skip
    return _table("One program for all layers of a kind (once)", head, rows) if rows else []


def _few_layers(content: dict[str, Any]) -> list[str]:
    """Times scaled from few layers against those measured with all layers."""
    rows, whole = [], {}
    for cell in content["routes"]:
        for route in ("general", "fused"):
            if route in cell:
                key = (cell["shape"], cell["policy"], cell["budget"], cell["rows"], route)
                if cell["layers"] == cell["layers_of"]:
                    whole[key] = cell[route]["ms"]
                elif key in whole:
                    scaled = cell[route]["ms_all_layers"]
                    rows.append((*key, cell["layers"], scaled, whole[key], round(scaled / whole[key], 3)))
    head = "shape, policy, budget, rows, route, layers, scaled ms, all layers ms, scaled / measured"
    return _table("Do few layers predict all?", head, rows) if rows else []


def _dense(content: dict[str, Any]) -> list[str]:
    head = (
        "shape, layers, cache, rows, tokens, ms, all layers, host ms, of copy, K and V MB, most allocated MB"
    )
    rows = [
        (
            row["shape"], f"{row['layers']} of {row['layers_of']}", row["cache"], row["rows"], row["tokens"],
            row["ms"], row["ms_all_layers"], row["host_ms"],
            "-" if row["of_copy"] is None else _percent(row["of_copy"]), _megabytes(row["kv_bytes"]),
            "-" if row["peak_bytes"] is None else _megabytes(row["peak_bytes"]),
        )
        for row in content["dense"]
    ]  # fmt: skip
    notes = [
        f"- {part['name']}: {text}"
        for part in content["parts"]
        for text in (*part.get("found", {}).get("errors", ()), part.get("found", {}).get("flash"))
        if text
    ]
    return [*_table("Dense caches of transformers, per step", head, rows), *_below(notes)]


def _kernels(content: dict[str, Any]) -> list[str]:
    lines = []
    for part in content["parts"]:
        if "kernels" in part.get("found", {}):
            rows = [
                (kernel["name"], kernel["calls"], kernel["ms"]) for kernel in part["found"]["kernels"][:8]
            ]
            lines += _table(
                f"Slowest operations of {part['name']}", "operation, calls per step, ms per step", rows
            )
    return lines


def _parts(content: dict[str, Any]) -> list[str]:
    rows = [
        (
            part["name"], part["state"], part.get("seconds", "-"), f"{part['limit_s']:.0f}",
            part.get("note", "").replace("|", "/")[:160],
        )
        for part in content["parts"]
    ]  # fmt: skip
    return _table("Parts", "part, state, seconds, limit, note", rows)


def _table(title: str, head: str, rows: list[tuple[Any, ...]]) -> list[str]:
    if not rows:
        return ["", f"## {title}", "", "Nothing was measured."]
    names = head.split(", ")
    lines = [names, ["---"] * len(names), *rows]
    return ["", f"## {title}", "", *("| " + " | ".join(map(str, line)) + " |" for line in lines)]


def _below(lines: list[str]) -> list[str]:
    return ["", *lines] if lines else []


def _percent(share: float) -> str:
    return f"{share:.0%}"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.0f}"
