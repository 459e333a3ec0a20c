"""Oracle of `vase`: rounds of steps, the largest values, and exponential clocks for the rest."""

import math

from tests.oracle.base import Setting, Vector, exact_product, softmax
from tests.oracle.pages import MASK, mix
from tests.oracle.tokens import CompetingTokensOracle

SINKS = 4
BOUNDLESS = 1e30


class VaseOracle(CompetingTokensOracle):
    """The oldest tokens compete: some are reserved, and of the others the one whose clock rings last goes."""

    def __init__(
        self,
        setting: Setting,
        *,
        window: int = 64,
        large: float = 0.25,
        seed: int = 0,
        pin_prompt: bool = True,
    ) -> None:
        super().__init__(setting, pin_prompt=pin_prompt)
        self.window, self.large, self.seed = window, large, seed
        self.attention: list[dict[int, float]] = [{} for _ in range(self.heads.kv)]
        self.this_round: list[dict[int, float]] = [{} for _ in range(self.heads.kv)]

    def cut(self, kept: list[int]) -> list[int]:
        sinks = min(SINKS, self.capacity() - 1)
        return kept[:sinks] + kept[sinks - self.capacity() :]

    def first_recent(self, now: int) -> int:
        return max((now // self.window - 1) * self.window, now - self.room() + 1)

    def after_prefill(self, kv_head: int, first: int, queries: list[list[Vector]]) -> None:
        attention = self.attention[kv_head]
        for position in range(first, self.length):
            attention[position] = 0.0
            for query_head in self.heads.queries_of(kv_head) if not self.pin_prompt else ():
                query = queries[query_head][position - first]
                for p, share in softmax(self.logits(query, kv_head, range(position + 1))).items():
                    attention[p] += share

    def after_step(self, kv_head: int, shares: list[dict[int, float]], now: int) -> None:
        this_round = self.this_round[kv_head]
        for position in self.kept[kv_head]:
            received = sum(share[position] for share in shares)
            this_round[position] = this_round.get(position, 0.0) + received
        if (now + 1) % self.window == 0:
            self.attention[kv_head], self.this_round[kv_head] = this_round, {}

    def victim(self, kv_head: int, competing: list[int], now: int) -> int:
        largest = {p: self.spread(kv_head, p) for p in competing}
        reserved = self.best(largest, math.ceil(exact_product(self.large, len(competing))), signs=largest)
        rings = {p: self.clock(kv_head, p, now) for p in competing if p not in reserved}
        return next(iter(self.best(rings, 1, signs=rings))) if rings else min(competing)

    def spread(self, kv_head: int, position: int) -> float:
        value = self.values[kv_head][position]
        return BOUNDLESS if position < SINKS else max(value) - min(value)

    def clock(self, kv_head: int, position: int, now: int) -> float:
        """When the clock of a token rings: exponential, with the attention of the last round as its rate."""
        draw = mix(self.seed & MASK)
        for word in (kv_head, position, now // self.window):
            draw = mix((draw + word) & MASK)
        rate = self.attention[kv_head].get(position, 0.0)
        # The library adds up in float32, which has no smaller numbers.
        self.doubtful |= 0 < rate < 1e-37
        return -math.log(((draw >> 32) + 0.5) / 2**32) / rate if rate else BOUNDLESS
