"""Analysis of attention: record what a model reads, tell what becomes of every token, replay policies on it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from longthink._lazy import lazy_names

if TYPE_CHECKING:
    from longthink.lab.analyze.advice import Advice, advise
    from longthink.lab.analyze.lives import Lives, MapClass, PageClass, map_classes, read_lives
    from longthink.lab.analyze.recorder import Prompt, record
    from longthink.lab.analyze.rules import Rules
    from longthink.lab.analyze.shares import Share, share_table, telling_texts
    from longthink.lab.analyze.store import Header, Trace, TraceStore, is_trace_store
    from longthink.lab.analyze.whatif import Outcome, what_if

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

__getattr__ = lazy_names(
    __name__,
    {
        "advice": ("Advice", "advise"),
        "lives": ("Lives", "MapClass", "PageClass", "map_classes", "read_lives"),
        "recorder": ("Prompt", "record"),
        "rules": ("Rules",),
        "shares": ("Share", "share_table", "telling_texts"),
        "store": ("Header", "Trace", "TraceStore", "is_trace_store"),
        "whatif": ("Outcome", "what_if"),
    },
)


def __dir__() -> list[str]:
    return __all__
