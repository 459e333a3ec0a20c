"""Problem sets on the Hugging Face Hub: where they are, and which of their columns hold what."""

from __future__ import annotations

from dataclasses import dataclass

from longthink.errors import DataError, needs_extra
from longthink.lab.evaluate.files import Fields, Row, to_rows


@dataclass(frozen=True, kw_only=True)
class Source:
    """A problem set on the Hub.

    Attributes
    ----------
    dataset, config, split
        Arguments of ``datasets.load_dataset``; config None is the only one.
    fields
        Its columns.
    max_new_tokens
        Tokens that a reasoning model may need at most.
    """

    dataset: str
    config: str | None = None
    split: str
    fields: Fields
    max_new_tokens: int


SOURCES: dict[str, Source] = {
    "gsm8k": Source(
        dataset="openai/gsm8k",
        config="main",
        split="test",
        fields=Fields(question="question", answer="answer", id=None),
        max_new_tokens=8192,
    ),
    "math500": Source(
        dataset="HuggingFaceH4/MATH-500",
        split="test",
        fields=Fields(question="problem", answer="answer", id="unique_id"),
        max_new_tokens=16384,
    ),
    "aime24": Source(
        dataset="HuggingFaceH4/aime_2024",
        split="train",
        fields=Fields(question="problem", answer="answer", id="id"),
        max_new_tokens=32768,
    ),
    "aime25": Source(
        dataset="math-ai/aime25",
        split="test",
        fields=Fields(question="problem", answer="answer", id="id"),
        max_new_tokens=32768,
    ),
    # The years 1983 to 2024, as lm-evaluation-harness has them too.
    "aime": Source(
        dataset="gneubig/aime-1983-2024",
        split="train",
        fields=Fields(question="Question", answer="Answer", id="ID"),
        max_new_tokens=32768,
    ),
}
"""Problem sets by task name."""


def read_hub(name: str) -> list[Row]:
    """Load the problem set of a task from the Hub, or from the local copy that an earlier run left.

    Raises
    ------
    DataError
        If it cannot be had, or has other columns than it should.
    MissingExtraError
        If ``datasets`` is not installed.
    """
    source = SOURCES[name]
    with needs_extra("eval"):
        from datasets import load_dataset
    where = f"task {name!r}, data set {source.dataset}"
    try:
        table = load_dataset(source.dataset, source.config, split=source.split)
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{where} cannot be had: {reason} (a copy in a file will do: --data FILE.jsonl or FILE.parquet)"
        ) from error
    records = ((f"{where}, row {number}", record) for number, record in enumerate(table, 1))
    return to_rows(records, source.fields)
