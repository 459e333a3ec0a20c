"""Problem sets on the Hugging Face Hub, and which of their columns hold what."""

from __future__ import annotations

from dataclasses import dataclass

from longthink.errors import DataError, needs_extra
from longthink.lab.evaluate.files import Fields, Item, to_items


@dataclass(frozen=True)
class Source:
    """A problem set on the Hub: arguments of ``load_dataset``, its columns, and the default token limit."""

    dataset: str
    config: str | None
    split: str
    fields: Fields
    max_new_tokens: int


def _fields(question: str, answer: str, id: str | None) -> Fields:
    return Fields(question=question, answer=answer, id=id)


SOURCES: dict[str, Source] = {
    "gsm8k": Source("openai/gsm8k", "main", "test", _fields("question", "answer", None), 8192),
    "math500": Source(
        "HuggingFaceH4/MATH-500", None, "test", _fields("problem", "answer", "unique_id"), 16384
    ),
    "aime24": Source("HuggingFaceH4/aime_2024", None, "train", _fields("problem", "answer", "id"), 32768),
    "aime25": Source("math-ai/aime25", None, "test", _fields("problem", "answer", "id"), 32768),
    # 1983 to 2024, the same set as in lm-evaluation-harness
    "aime": Source("gneubig/aime-1983-2024", None, "train", _fields("Question", "Answer", "ID"), 32768),
}
"""Problem sets by task name."""


def read_hub(name: str) -> list[Item]:
    """Load the problem set of a task from the Hub or from the local cache; `DataError` if that fails."""
    source = SOURCES[name]
    with needs_extra("eval"):
        from datasets import load_dataset
    where = f"task {name!r}, data set {source.dataset}"
    try:
        table = load_dataset(source.dataset, source.config, split=source.split)
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{where} cannot be loaded: {reason} (or give a copy: --data FILE.jsonl or FILE.parquet)"
        ) from error
    records = ((f"{where}, row {number}", record) for number, record in enumerate(table, 1))
    return to_items(records, name, source.fields)
