"""The measurement: dense model and bounded caches read the same text side by side; their predictions are compared.

Exact and without sampling noise: the text is given (teacher forcing), and every cache takes it token by token through
its decode steps. Nothing is kept but a few numbers per token.

Shape suffixes: B texts, N tokens of a block, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from longthink.config import Budget
from longthink.hf import PagedCache, make_cache
from longthink.hf.forced import LOGITS_AT_ONCE, ForcedDecode
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
    compile: bool,
) -> list[list[Scores]]:  # fmt: skip
    """Scores of each policy (outer list) on each text.

    Scored are the tokens behind the budget: those before them are predicted while nothing has been evicted. A text
    that ends before, or whose prompt leaves no room for the policy or for the window, has no scored tokens.

    Parameters
    ----------
    budget
        For all policies; None if they keep everything.
    compile
        Whether the decode steps are compiled where they can be.
    """
    columns = [[NOTHING] * len(texts) for _ in policies]
    usable = [
        tuple(i for i, text in enumerate(texts) if _is_usable(text, policy, budget)) for policy in policies
    ]
    for rows in filter(None, dict.fromkeys(usable)):
        alike = [i for i, own in enumerate(usable) if own == rows]
        read = [texts[row] for row in rows]
        found = _measure(model, read, [policies[i] for i in alike], budget, compile=compile)
        for i, scores in zip(alike, found, strict=True):
            for row, one in zip(rows, scores, strict=True):
                columns[i][row] = one
    return columns


def _measure(
    model: PreTrainedModel, texts: Sequence[Encoded], policies: Sequence[Policy], budget: Budget | None, *,
    compile: bool,
) -> list[list[Scores]]:  # fmt: skip
    window = [Recency()] if budget is not None else []
    prompt_BN, real_BN = _left_padded([text.prompt for text in texts], model.device)
    decoded_BN = _right_padded([text.decoded for text in texts], model.device)
    ends = [len(text.decoded) for text in texts]
    dense, dense_nll = DynamicCache(config=model.config), []
    with ExitStack() as stack, torch.no_grad():
        readers = []
        for policy in [*policies, *window]:
            bound = budget if needs_budget(policy) and budget is not None else None
            given = {} if bound is None else asdict(bound)
            cache = stack.enter_context(make_cache(model, policy=policy, **given))
            readers.append(_Reader(cache, None, [], [], [], {}))
        for start, stop in _blocks(ends, len(texts) * model.config.get_text_config().vocab_size):
            expected = _Expected(
                _dense_logits(model, dense, (prompt_BN, real_BN), decoded_BN, start, stop),
                decoded_BN[:, start:stop],
            )
            dense_nll.append(expected.nll)
            for reader in readers:
                logits_BNV = _logits(model, reader, (prompt_BN, real_BN), decoded_BN, start, stop, compile)
                expected.compare(reader, logits_BNV)
                for row in (row for row, end in enumerate(ends) if end == stop):
                    reader.held[row] = _held(reader.cache, row)
        return _scores(texts, readers, torch.cat(dense_nll, 1), budget, with_window=bool(window))


def _is_usable(text: Encoded, policy: Policy, budget: Budget | None) -> bool:
    """Whether a text goes on behind the budget, and its prompt leaves room for both the policy and the window."""
    if len(text.decoded) <= _first_scored(text, budget):
        return False
    return budget is None or all(
        one.required_pages(len(text.prompt)) <= budget.pages(len(text.prompt), one.page_size)
        for one in (policy, Recency())
        if needs_budget(one)
    )


def _blocks(ends: Sequence[int], vocabulary: int) -> Iterator[tuple[int, int]]:
    """Bounds of the blocks of predicted tokens: the first alone, by the prompt, and then as many as fit in memory.

    Every text ends with a block, so that what the caches hold then can be read off.
    """
    size = max(16, LOGITS_AT_ONCE // vocabulary)
    cuts = sorted({1, *range(1, max(ends), size), *ends})
    yield from zip([0, *cuts], cuts, strict=False)


def _logits(
    model: PreTrainedModel, reader: _Reader, prompt: tuple[Tensor, Tensor], decoded_BN: Tensor, start: int,
    stop: int, compile: bool,
) -> Tensor:  # fmt: skip
    if reader.step is None:
        logits_B1V = _prefill(model, reader.cache, *prompt)
        reader.step = ForcedDecode(model, reader.cache, compile=compile)
        return logits_B1V
    return reader.step(decoded_BN[:, start - 1 : stop - 1])


def _prefill(
    model: PreTrainedModel, cache: DynamicCache | PagedCache, prompt_BN: Tensor, real_BN: Tensor
) -> Tensor:
    position_BN = (real_BN.cumsum(1) - 1).clamp(min=0)
    logits: Tensor = model(
        prompt_BN, attention_mask=real_BN, position_ids=position_BN, past_key_values=cache, logits_to_keep=1
    ).logits
    return logits


def _dense_logits(
    model: PreTrainedModel,
    cache: DynamicCache,
    prompt: tuple[Tensor, Tensor],
    decoded_BN: Tensor,
    start: int,
    stop: int,
) -> Tensor:
    if start == 0:
        return _prefill(model, cache, *prompt)
    real_BN = prompt[1]
    read_BN = decoded_BN[:, start - 1 : stop - 1]
    mask_BN = torch.cat([real_BN, real_BN.new_ones(len(real_BN), stop - 1)], 1)
    position_BN = real_BN.sum(1, keepdim=True) + torch.arange(start - 1, stop - 1, device=real_BN.device)
    logits: Tensor = model(
        read_BN, attention_mask=mask_BN, position_ids=position_BN, past_key_values=cache
    ).logits
    return logits


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
    seen = sum(layer.slots.rows.lengths[row] * layer.slots.store.keys_BKSD.shape[1] for layer in cache.layers)
    evicted, dense = cache.row_evicted(row), cache.row_dense_kv_bytes(row)
    return evicted, dense * (seen - evicted) // seen, dense


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
            sure = dense <= -torch.tensor(SURE).log()
            lost = torch.zeros_like(sure)
            if window_BN is not None:
                lost = sure & (window_BN[row, part].double() - dense >= -torch.tensor(LOST).log())
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


def _left_padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    tokens = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows], device=device)
    real = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return tokens, real


def _right_padded(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([list(row) + [0] * (width - len(row)) for row in rows], device=device)
