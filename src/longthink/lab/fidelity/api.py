"""`fidelity`: the measurement as a function, for a model that is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from longthink.config import KvBits
from longthink.lab.evaluate.plan import budgets_for
from longthink.lab.fidelity.measure import measure
from longthink.lab.fidelity.solver import encode
from longthink.lab.fidelity.summary import Summary, summaries
from longthink.lab.fidelity.texts import Encoded, Text
from longthink.policies import Policy, make_policy, policy_spec


def fidelity(
    model: PreTrainedModel,
    texts: Sequence[str | tuple[str, str] | tuple[Sequence[int], Sequence[int]]],
    *,
    policies: Sequence[str | Policy],
    budgets: Sequence[int] = (),
    decode_budgets: Sequence[int] = (),
    tokenizer: Any = None,
    rows: int = 4,
    reference: str = "recency",
    kv_dtype: str | None = None,
    kv_bits: KvBits | int | str | None = None,
) -> list[Summary]:
    """Measure how far a model's predictions under bounded caches are from its own with a dense one.

    Parameters
    ----------
    model
        A model that `make_cache` serves.
    texts
        Plain texts, pairs of question and reasoning, or pairs of token ids: those of a prompt and those that follow.
    policies
        Policies or their specs. All of them are measured at each of the budgets.
    budgets, decode_budgets
        Tokens to keep per layer: including the prompt, and on top of it.
    tokenizer
        For texts that are no tokens yet.
    rows
        Texts that are read side by side.
    reference
        The policy that the others are compared with, text by text.
    kv_dtype, kv_bits
        Format of keys and values, and bits of those outside the recent window, as for `make_cache`.

    Returns
    -------
    list of Summary
        One per policy and budget: see ``docs/fidelity.md``.

    Raises
    ------
    BudgetError
        If a policy needs a budget and there is none.
    ValueError
        If there is no text, or text without a tokenizer.
    """
    encoded = [_encoded(text, tokenizer) for text in texts]
    if not encoded:
        raise ValueError("texts is empty: give at least one")
    chosen = [make_policy(policy) for policy in policies]
    bounds = {policy: budgets_for(policy, budgets, decode_budgets) for policy in chosen}
    found = []
    for bound in dict.fromkeys(bound for own in bounds.values() for bound in own):
        alike = [policy for policy in chosen if bound in bounds[policy]]
        for start in range(0, len(encoded), rows):
            part = encoded[start : start + rows]
            columns = measure(model, part, alike, bound, kv_dtype=kv_dtype, kv_bits=kv_bits)
            for policy, column in zip(alike, columns, strict=True):
                spec = policy_spec(policy)
                found += [
                    {
                        "config": f"{spec} {bound}", "model": model.name_or_path, "source": "texts",
                        "policy": spec, "text": str(start + row), "budget": bound and bound.budget,
                        "decode_budget": bound and bound.decode_budget, **scores._asdict(),
                    }
                    for row, scores in enumerate(column)
                ]  # fmt: skip
    return summaries(found, reference=reference)


def _encoded(text: Any, tokenizer: Any) -> Encoded:
    if not isinstance(text, str):
        first, second = text
        if not isinstance(first, str):
            return Encoded(tuple(map(int, first)), tuple(map(int, second)))
    if tokenizer is None:
        raise ValueError("texts are no tokens: give the model's tokenizer")
    question, body = (None, text) if isinstance(text, str) else text
    return encode(Text(source="texts", id="", question=question, body=body), tokenizer, None)
