"""``longthink generate --chat``: a conversation on one bounded cache, a line for each question."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from longthink.cli.prompts import check_words, encode_prompt, from_utf8
from longthink.cli.terminal import is_terminal, note, write_text
from longthink.errors import BudgetError

if TYPE_CHECKING:
    from torch import Tensor

    from longthink.cli.decode import Decoded
    from longthink.hf import PagedCache

_ANSWER = "\N{LEFT-TO-RIGHT MARK}the answer\N{LEFT-TO-RIGHT MARK}"
"""Stands for the model's answer while the text around it is taken from the chat template."""


class Conversation:
    """Token ids of a conversation, turn by turn, as the model has seen them.

    A template rendered anew for every turn may change what came before (reasoning is often removed), which a cache
    cannot follow. So each turn is rendered as what the template puts behind an answer, or as it is if `raw`.
    """

    def __init__(self, tokenizer: Any, *, raw: bool, builtin: bool) -> None:
        self._tokenizer = tokenizer
        self._raw = raw or not tokenizer.chat_template
        self._builtin = builtin
        self._ids_BN: Tensor | None = None

    def ask(self, question: str) -> dict[str, Tensor]:
        """Return ids and mask of the conversation with another question; it counts once `answered` is called."""
        import torch

        if self._builtin:
            check_words(self._tokenizer, question)
        if self._ids_BN is None:
            return encode_prompt(self._tokenizer, question, raw=self._raw)
        new_BN = self._later_turn(question)
        ends = {self._tokenizer.eos_token_id} - {None}
        if int(self._ids_BN[0, -1]) in ends and int(new_BN[0, 0]) == int(self._ids_BN[0, -1]):
            new_BN = new_BN[:, 1:]  # the answer has ended with this token
        ids_BN = torch.cat([self._ids_BN, new_BN], 1)
        return {"input_ids": ids_BN, "attention_mask": torch.ones_like(ids_BN)}

    def answered(self, asked: dict[str, Tensor], decoded: Decoded) -> None:
        import torch

        self._ids_BN = torch.cat([asked["input_ids"], torch.tensor([decoded.tokens], dtype=torch.int64)], 1)

    def _later_turn(self, question: str) -> Tensor:
        if self._raw:
            text = question
        else:
            messages = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": _ANSWER},
                {"role": "user", "content": question},
            ]
            whole = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            _, found, text = whole.partition(_ANSWER)
            if not found:
                raise ValueError("the chat template leaves out earlier answers: use --raw for a conversation")
        encoded = self._tokenizer(text, return_tensors="pt", add_special_tokens=False)
        if encoded["input_ids"].shape[-1] == 0:
            raise ValueError("the question has no tokens")
        ids_BN: Tensor = encoded["input_ids"]
        return ids_BN


def read_questions(first: str | None) -> Iterator[str]:
    """Yield the questions of the user: the first, if it is given, and then the lines of standard input.

    Raises
    ------
    ValueError
        At once, if there is neither.
    """
    if sys.stdin is None and first is None:
        raise ValueError("standard input is closed: pass the question as an argument")
    return _questions(first)


def _questions(first: str | None) -> Iterator[str]:
    if first is not None:
        yield first
    if sys.stdin is None:
        return
    asks = is_terminal(sys.stdin)
    if asks:
        note("a line is a question; Ctrl-D ends the conversation")
    while True:
        if asks:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.buffer.readline()
        if not line:
            return
        try:
            text = from_utf8(line, "the question")
        except ValueError as error:
            note(str(error))
            continue
        if text.strip():
            yield text.rstrip("\r\n")


def chat(questions: Iterator[str], conversation: Conversation, answer: Any, cache: PagedCache) -> str:
    """Hold a conversation, in which `answer` decodes and streams; return why it ended: ``end`` or ``interrupted``."""
    for question in questions:
        try:
            asked = conversation.ask(question)
            decoded: Decoded = answer(asked)
        except (BudgetError, ValueError) as error:
            # The cache is as it was, and the conversation goes on with another question.
            note(str(error))
            continue
        conversation.answered(asked, decoded)
        write_text("\n")
        bound = cache.bound_tokens
        bounded = "nothing is bounded" if bound is None else f"bound {bound:,} tokens per layer"
        held = len(cache.resident_positions(cache.paged[-1].index)[0][0])
        note(f"{len(decoded.tokens)} tokens · {cache.get_seq_length():,} seen · {held:,} held · {bounded}")
        if decoded.stopped == "interrupted" and not decoded.tokens:
            return "interrupted"
    return "end"
