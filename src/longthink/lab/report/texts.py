"""Some of the texts that models wrote, right and wrong ones, for the page."""

from __future__ import annotations

from itertools import groupby

from longthink.lab.report.cells import Row, group_of, size_of
from longthink.lab.report.escape import for_html
from longthink.lab.results.store import ResultStore

RIGHT, WRONG = 1, 2
"""Texts shown of each configuration."""
HEAD, TAIL = 500, 900
"""Characters shown of a longer text, from its beginning and from its end."""

_CHOSEN = f"""
SELECT model, revision, dtype, temperature, top_p, top_k, policy, budget, decode_budget, task, seed, config,
       problem, sample, text, answer, gold, correct, finish, generated_tokens
FROM samples
QUALIFY row_number() OVER (PARTITION BY config, correct ORDER BY finish = 'no_room', problem, sample)
        <= CASE WHEN correct THEN {RIGHT} ELSE {WRONG} END
ORDER BY task, policy, budget, decode_budget, model, seed, config, correct DESC, problem, sample
"""


def sample_texts(store: ResultStore) -> str:
    """Return the texts as HTML, one closed block for each configuration."""
    blocks = []
    for _, rows in groupby(store.query(_CHOSEN), key=lambda row: row["config"]):
        mine = list(rows)
        first = mine[0]
        title = (
            f"{first['task']}: {first['policy']}, {size_of(first).label}, seed {first['seed']} "
            f"({group_of(first).label})"
        )
        blocks.append(f"<details><summary>{for_html(title)}</summary>{''.join(map(_text, mine))}</details>")
    return "".join(blocks)


def shortened(text: str) -> str:
    """Return a text of readable length: its beginning and its end."""
    left_out = len(text) - HEAD - TAIL
    if left_out <= 0:
        return text
    return f"{text[:HEAD]}\n\n[... {left_out:,} characters left out ...]\n\n{text[-TAIL:]}"


def _text(row: Row) -> str:
    verdict = '<span class="right">right</span>' if row["correct"] else '<span class="wrong">wrong</span>'
    answer = "none found" if row["answer"] is None else row["answer"]
    facts = (
        f"problem <code>{for_html(row['problem'])}</code>, sample {row['sample']}: {verdict}. "
        f"Answer <code>{for_html(answer)}</code>, gold <code>{for_html(row['gold'])}</code>. "
        f"{row['generated_tokens']:,} tokens, finish: {for_html(row['finish'])}"
    )
    return f"<div>{facts}</div><pre>{for_html(shortened(row['text']))}</pre>"
