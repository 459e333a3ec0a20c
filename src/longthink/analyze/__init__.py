"""Analysis of attention: record what a model reads, tell what becomes of every token, replay policies on it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longthink.analyze.advice import Advice, advise
    from longthink.analyze.lives import Lives, MapClass, PageClass, Rules, map_classes, read_lives
    from longthink.analyze.recorder import Prompt, record
    from longthink.analyze.shares import Share, share_table, telling_texts
    from longthink.analyze.store import Header, Trace, TraceStore, is_trace_store
    from longthink.analyze.whatif import Outcome, what_if

_MODULES = {
    "advice": ("Advice", "advise"),
    "lives": ("Lives", "MapClass", "PageClass", "Rules", "map_classes", "read_lives"),
    "recorder": ("Prompt", "record"),
    "shares": ("Share", "share_table", "telling_texts"),
    "store": ("Header", "Trace", "TraceStore", "is_trace_store"),
    "whatif": ("Outcome", "what_if"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "Advice",
    "Header",
    "Lives",
    "MapClass",
    "Outcome",
    "PageClass",
    "Prompt",
    "Rules",
    "Share",
    "Trace",
    "TraceStore",
    "advise",
    "is_trace_store",
    "map_classes",
    "read_lives",
    "record",
    "share_table",
    "telling_texts",
    "what_if",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
