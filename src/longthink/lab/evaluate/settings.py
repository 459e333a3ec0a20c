"""Settings from a YAML or TOML file, and the plan of a sweep made of them and of command-line options."""

import difflib
import tomllib
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from longthink.errors import needs_extra
from longthink.lab.evaluate.plan import Plan

RUN_SETTINGS: dict[str, type] = {"out": str, "workers": int, "ray": str}  # beside those of `Plan`
SWEEP_SETTINGS = [field.name for field in fields(Plan)] + list(RUN_SETTINGS)


def read_settings(path: Path, known: Collection[str] = SWEEP_SETTINGS) -> dict[str, Any]:
    """Read a YAML or TOML file; ``-`` and ``_`` in names are the same, and unknown ones a `ValueError`."""
    if path.suffix not in (".toml", ".yaml", ".yml"):
        raise ValueError(f"{str(path)!r} must end in .yaml, .yml or .toml")
    text = path.read_text(encoding="utf-8")
    try:
        values = tomllib.loads(text) if path.suffix == ".toml" else _yaml(text)
    except ValueError as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold settings such as '{next(iter(known))}: ...'")
    return {_checked(path, str(key), known): value for key, value in values.items() if value is not None}


def _yaml(text: str) -> Any:
    with needs_extra("eval"):
        import yaml
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"not YAML: {error}") from error


def _checked(path: Path, key: str, known: Collection[str]) -> str:
    name = key.replace("-", "_")
    if name in known:
        return name
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
    raise ValueError(f"{path}: unknown setting {key!r}: {hint}")


def make_plan(values: Mapping[str, Any]) -> tuple[Plan, dict[str, Any]]:
    """Return the plan of a sweep and the other settings."""
    converted = typed_settings(values, get_type_hints(Plan) | RUN_SETTINGS)
    run = {name: converted.pop(name) for name in RUN_SETTINGS if name in converted}
    return Plan(**converted), run


def typed_settings(values: Mapping[str, Any], types: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings in their types, or `ValueError`; lists may be lists, single values or text with commas."""
    return {name: _convert(name, value, types[name]) for name, value in values.items()}


def _convert(name: str, value: Any, wanted: Any) -> Any:
    if str(wanted).startswith("tuple"):
        kind = get_args(wanted)[0]
        words = value.split(",") if isinstance(value, str) else value
        words = list(words) if isinstance(words, list | tuple) else [words]
        words = [word.strip() if isinstance(word, str) else word for word in words]
        return tuple(dict.fromkeys(_scalar(name, word, kind) for word in words if word != ""))
    kinds = [kind for kind in get_args(wanted) or (wanted,) if kind is not type(None)]
    return _scalar(name, value, kinds[0])


def _scalar(name: str, value: Any, kind: type) -> Any:
    if kind is int and isinstance(value, str):
        with suppress(ValueError):
            return int(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or isinstance(value, bool):
        wanted = {int: "an integer", float: "a number", str: "a text"}[kind]
        raise ValueError(f"{name}={value!r} must be {wanted}")
    return value
