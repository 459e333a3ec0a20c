"""The measurement: dense model and bounded caches read the same text side by side; their predictions are compared.

Exact and without sampling noise: the text is given (teacher forcing), and every cache takes it token by token through
its decode steps. Nothing is kept but a few numbers per token.

Shape suffixes: B texts, N tokens of a block, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from longthink.config import Budget, KvBits
from longthink.hf import PagedCache, make_cache
from longthink.lab.evaluate.forced import ForcedDecode, block_tokens, compiles
from longthink.lab.fidelity.texts import Encoded
from longthink.policies import Policy, Recency, needs_budget

SURE = 0.5
"""A token is long-range if the dense model gives it at least this probability ..."""
LOST = 0.5
"""... and the window of the same budget at most this share of that."""


class Scores(NamedTuple):
    """Sums over the scored tokens of one text: negative log-likelihood (nats) of the text under the dense model and
    under the cache, KL divergence of the cache's distribution from the dense one, and tokens whose most likely next
    token differs; each on all tokens and on the long-range ones.
    """

    tokens: int
    nll_dense: float
    nll: float
    kl: float
    differs: int
    long_tokens: int
    long_nll_dense: float
    long_nll: float
    long_kl: float
    long_differs: int
    evicted: int  # over layers and KV heads, at the end of the text
    kv_bytes: int  # of the tokens resident then
    dense_kv_bytes: int  # of all tokens


NOTHING = Scores(0, 0.0, 0.0, 0.0, 0, 0, 0.0, 0.0, 0.0, 0, 0, 0, 0)


@dataclass
class _Reader:
    """One bounded cache, and what it has predicted so far."""

    cache: PagedCache
    step: ForcedDecode | None
    nll: list[Tensor]
    kl: list[Tensor]
    differs: list[Tensor]
    held: dict[int, tuple[int, int, int]]


def measure(
    model: PreTrainedModel, texts: Sequence[Encoded], policies: Sequence[Policy], budget: Budget | None, *,
    kv_dtype: str | None = None, kv_bits: KvBits | int | str | None = None,
) -> list[list[Scores]]:  # fmt: skip
    """Scores of each policy (outer list) on each text.

    Scored are the tokens behind the budget: those before them are predicted while nothing has been evicted. A text
    that ends before, or whose prompt leaves no room for the policy or for the window, has no scored tokens.

    Parameters
    ----------
    budget
        For all policies; None if they keep everything.
    kv_dtype, kv_bits
        As for `make_cache`, for all policies; the window that long-range tokens are judged by is in full.
    """
    stored = {"kv_dtype": kv_dtype, "kv_bits": kv_bits}
    columns = [[NOTHING] * len(texts) for _ in policies]
    usable = [
        tuple(i for i, text in enumerate(texts) if _is_usable(model, text, policy, budget, stored))
        for policy in policies
    ]
    for rows in filter(None, dict.fromkeys(usable)):
        alike = [i for i, own in enumerate(usable) if own == rows]
        read = [texts[row] for row in rows]
        found = _measure(model, read, [policies[i] for i in alike], budget, stored)
        for i, scores in zip(alike, found, strict=True):
            for row, one in zip(rows, scores, strict=True):
                columns[i][row] = one
    return columns


def _measure(
    model: PreTrainedModel, texts: Sequence[Encoded], policies: Sequence[Policy], budget: Budget | None,
    stored: Mapping[str, Any],
) -> list[list[Scores]]:  # fmt: skip
    window = [] if budget is None else [Recency()]
    batch = _Batch(model, texts)
    dense, dense_nll = DynamicCache(config=model.config), []
    with ExitStack() as stack, torch.no_grad():
        readers = []
        for policy, form in [
            *((policy, stored) for policy in policies),
            *((policy, {}) for policy in window),
        ]:
            bound = asdict(budget) if budget is not None and needs_budget(policy) else {}
            cache = stack.enter_context(make_cache(model, policy=policy, **bound, **form))
            readers.append(_Reader(cache, None, [], [], [], {}))
        for start, stop in batch.blocks():
            expected = _Expected(batch.dense_logits(dense, start, stop), batch.decoded_BN[:, start:stop])
            dense_nll.append(expected.nll)
            for reader in readers:
                expected.compare(reader, batch.logits(reader, start, stop))
                for row in (row for row, end in enumerate(batch.ends) if end == stop):
                    reader.held[row] = _held(reader.cache, row)
        return _scores(texts, readers, torch.cat(dense_nll, 1), budget, with_window=bool(window))


def _is_usable(
    model: PreTrainedModel, text: Encoded, policy: Policy, budget: Budget | None, stored: Mapping[str, Any]
) -> bool:
    """Whether a text goes on behind the budget, and its prompt leaves room for both the policy and the window."""
    if len(text.decoded) <= _first_scored(text, budget):
        return False
    if budget is None:
        return True
    prompt = len(text.prompt)
    for one, form in ((policy, stored), (Recency(), {})):
        if needs_budget(one):
            with make_cache(model, policy=one, **asdict(budget), **form) as cache:
                if not cache.has_room(prompt):
                    return False
    return True


class _Batch:
    """Texts that are read side by side: prompts padded on the left, and what is decoded padded on the right."""

    def __init__(self, model: PreTrainedModel, texts: Sequence[Encoded]) -> None:
        self._model = model
        self.ends = [len(text.decoded) for text in texts]
        width, length = max(len(text.prompt) for text in texts), max(self.ends)
        pads = [[0] * (width - len(text.prompt)) for text in texts]
        rows = list(zip(pads, texts, strict=True))
        self._prompt_BN = torch.tensor([[*pad, *text.prompt] for pad, text in rows], device=model.device)
        self._real_BN = torch.tensor(
            [pad + [1] * len(text.prompt) for pad, text in rows], device=model.device
        )
        decoded = [[*text.decoded] + [0] * (length - len(text.decoded)) for text in texts]
        self.decoded_BN = torch.tensor(decoded, device=model.device)

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Bounds of the blocks of predicted tokens: the first alone, by the prompt, then as many as fit in memory.

        Every text ends with a block, so that what the caches hold then can be read off.
        """
        size = block_tokens(self._model, len(self.ends))
        cuts = sorted({1, *range(1, max(self.ends), size), *self.ends})
        yield from zip([0, *cuts], cuts, strict=False)

    def logits(self, reader: _Reader, start: int, stop: int) -> Tensor:
        """Predictions of the tokens from `start` to `stop` under a bounded cache, BNV."""
        if reader.step is None:
            logits_B1V = self._prefill(reader.cache)
            compile = compiles(self._model, max(self.ends))
            reader.step = ForcedDecode(self._model, reader.cache, compile=compile)
            return logits_B1V
        return reader.step(self.decoded_BN[:, start - 1 : stop - 1])

    def dense_logits(self, cache: DynamicCache, start: int, stop: int) -> Tensor:
        """The same under a dense cache."""
        if start == 0:
            return self._prefill(cache)
        real_BN = self._real_BN
        position_N = torch.arange(start - 1, stop - 1, device=real_BN.device)
        logits_BNV: Tensor = self._model(
            self.decoded_BN[:, start - 1 : stop - 1],
            attention_mask=torch.cat([real_BN, real_BN.new_ones(len(real_BN), stop - 1)], 1),
            position_ids=real_BN.sum(1, keepdim=True) + position_N, past_key_values=cache,
        ).logits  # fmt: skip
        return logits_BNV

    def _prefill(self, cache: DynamicCache | PagedCache) -> Tensor:
        position_BN = (self._real_BN.cumsum(1) - 1).clamp(min=0)
        logits_B1V: Tensor = self._model(
            self._prompt_BN, attention_mask=self._real_BN, position_ids=position_BN, past_key_values=cache,
            logits_to_keep=1,
        ).logits  # fmt: skip
        return logits_B1V


class _Expected:
    """What the dense model predicts in a block."""

    def __init__(self, logits_BNV: Tensor, token_BN: Tensor) -> None:
        self._log_BNV = logits_BNV.float().log_softmax(-1)
        self._probability_BNV = self._log_BNV.exp()
        # The sum of p log p is finite where p is 0.
        self._entropy_BN = -(self._probability_BNV * self._log_BNV.clamp(min=-1e4)).sum(-1)
        self._best_BN = self._log_BNV.argmax(-1)
        self._token_BN1 = token_BN[..., None]
        self.nll = -self._log_BNV.gather(-1, self._token_BN1)[..., 0]

    def compare(self, reader: _Reader, logits_BNV: Tensor) -> None:
        log_BNV = logits_BNV.float().log_softmax(-1)
        reader.nll.append(-log_BNV.gather(-1, self._token_BN1)[..., 0])
        reader.differs.append(log_BNV.argmax(-1) != self._best_BN)
        cross_BN = -(self._probability_BNV * log_BNV.clamp_(min=-1e4)).sum(-1)
        reader.kl.append((cross_BN - self._entropy_BN).clamp(min=0))


def _held(cache: PagedCache, row: int) -> tuple[int, int, int]:
    """Tokens evicted, bytes of those that are resident, and bytes of all, for one row."""
    return cache.row_evicted(row), cache.row_held_kv_bytes(row), cache.row_dense_kv_bytes(row)


def _scores(
    texts: Sequence[Encoded], readers: list[_Reader], dense_nll_BN: Tensor, budget: Budget | None, *,
    with_window: bool,
) -> list[list[Scores]]:  # fmt: skip
    window_BN = torch.cat(readers[-1].nll, 1) if with_window else None
    found = []
    for reader in readers[: len(readers) - with_window]:
        nll_BN, kl_BN, differs_BN = (torch.cat(part, 1) for part in (reader.nll, reader.kl, reader.differs))
        rows = []
        for row, text in enumerate(texts):
            part = slice(_first_scored(text, budget), len(text.decoded))
            dense, nll, kl, differs = (
                x[row, part].double() for x in (dense_nll_BN, nll_BN, kl_BN, differs_BN)
            )
            sure = dense <= -math.log(SURE)
            lost = torch.zeros_like(sure)
            if window_BN is not None:
                lost = sure & (window_BN[row, part].double() - dense >= -math.log(LOST))
            sums = [
                [float(x[chosen].sum()) for x in (dense, nll, kl, differs)] for chosen in (slice(None), lost)
            ]
            (all_dense, all_nll, all_kl, all_differs), (far_dense, far_nll, far_kl, far_differs) = sums
            evicted, held, whole = reader.held[row]
            rows.append(
                Scores(
                    len(dense), all_dense, all_nll, all_kl, int(all_differs), int(lost.sum()), far_dense, far_nll,
                    far_kl, int(far_differs), evicted, held, whole,
                )
            )  # fmt: skip
        found.append(rows)
    return found


def _first_scored(text: Encoded, budget: Budget | None) -> int:
    if budget is None:
        return 0
    if budget.decode_budget is not None:
        return budget.decode_budget
    assert budget.budget is not None
    return max(0, budget.budget - len(text.prompt))
