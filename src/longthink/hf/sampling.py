"""Sampling the next token of each row, with a random generator for each row."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longthink.config import check_sampling


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is sampled. Temperature 0 takes the most likely token.

    Parameters
    ----------
    temperature
        Divides the logits.
    top_p
        Sample from the smallest set of tokens with this probability; None for all.
    top_k
        Sample from this many most likely tokens; None for all.

    Raises
    ------
    ValueError
        If a value is out of range, or `top_p` or `top_k` are given with temperature 0.
    """

    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None

    def __post_init__(self) -> None:
        check_sampling(self.temperature, self.top_p, self.top_k)

    def choose(self, logits_BV: Tensor, generators: Sequence[torch.Generator]) -> list[int]:
        """Token of each row.

        Each row draws one number from its own generator, on the CPU, whatever the device, so its tokens do not depend
        on the rest of the batch.
        """
        if self.temperature == 0:
            return logits_BV.argmax(-1).tolist()
        weights_BV, order_BV = self._weights(logits_BV)
        total_BV = weights_BV.cumsum(-1)
        draws = [torch.rand((), dtype=torch.float64, generator=generator) for generator in generators]
        drawn_B1 = torch.stack(draws).to(total_BV)[:, None] * total_BV[:, -1:]
        # Rounding could select the token after the last candidate.
        last_B1 = (weights_BV > 0).sum(-1, keepdim=True) - 1
        place_B1 = torch.searchsorted(total_BV, drawn_B1, right=True).minimum(last_B1)
        return order_BV.gather(-1, place_B1).flatten().tolist()

    def _weights(self, logits_BV: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities in descending order, zero for tokens that are no candidates, and their tokens."""
        wide = torch.float32 if logits_BV.device.type == "mps" else torch.float64
        logits_BV = logits_BV.to(wide) / self.temperature
        sorted_BV, order_BV = logits_BV.sort(stable=True, dim=-1, descending=True)
        if self.top_k is not None:
            sorted_BV[:, self.top_k :] = -torch.inf
        weights_BV = sorted_BV.softmax(-1)
        if self.top_p is not None:
            before_BV = weights_BV.cumsum(-1) - weights_BV
            # The first token is always a candidate.
            before_BV[:, 0] = -1
            weights_BV = torch.where(before_BV < self.top_p, weights_BV, 0)
        return weights_BV, order_BV


def sample_rows(
    logits_BV: Tensor, samplings: Sequence[Sampling], generators: Sequence[torch.Generator]
) -> list[int]:
    chosen = [0] * len(samplings)
    for sampling in dict.fromkeys(samplings):
        rows = [row for row, other in enumerate(samplings) if other == sampling]
        tokens = sampling.choose(logits_BV[rows], [generators[row] for row in rows])
        for row, token in zip(rows, tokens, strict=True):
            chosen[row] = token
    return chosen


def generator_for(key: str) -> torch.Generator:
    """Random generator seeded by the key alone: the same on every machine and in every process."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1
    return torch.Generator().manual_seed(seed)
