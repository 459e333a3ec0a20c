"""Decode with the fused calls what a `LayerCache` decodes with its own steps, from a copy of its slots.

Shape suffixes: B rows, K KV heads, G query heads per KV head, D head dim.
"""

from types import ModuleType
from typing import Any

import torch

from longthink.cache import LayerCache
from longthink.kernels.reference_step import Learn, Slots, Turn, Used


class FusedLayer:
    """One layer decoded by `step_attention`, `bookkeep` and `move_tokens` of the given modules."""

    def __init__(self, layer: LayerCache, attention: ModuleType, book: ModuleType) -> None:
        self.attention, self.book, self.policy = attention, book, layer.policy
        assert layer._store is not None
        self.store = layer._store
        copies = iter([tensor.clone() for tensor in self.store.tensors()])
        self.store.apply(lambda tensor: next(copies))
        self.options: dict[str, Any] = {
            f: getattr(self.policy, f, None) for f in ("score", "used", "r", "alpha")
        }
        self.keep_house()

    @property
    def learn(self) -> Learn:
        state = self.store.table.state
        if self.policy.name == "raas":
            kinds = {"exact": "mass", "bound": "bound_share" if self.options["used"] == "alpha" else "bound"}
            return Learn(kinds[self.options["score"]])
        if self.policy.name == "milestone":
            return Learn("marks", state["marked"], self.options["alpha"], self.policy.young // 2)
        return Learn("heavy", state["mass"]) if self.policy.name == "h2o" else Learn()

    def step(self, query_BKGD, key_BKD, value_BKD, scaling):
        """Return the output of one step, BKGD, and the scores for `keep_house`, which must follow."""
        table = self.store.table
        table.now_B.add_(1)
        low, high = table.kmin_BKPD, table.kmax_BKPD
        slots = Slots(
            table.keys_BKSD, table.values_BKSD, table.position_BKS, self.store.tail_BK, table.now_B, table.page_size,
            *((low, high) if self.policy.uses_representatives else ()),
        )  # fmt: skip
        new = query_BKGD, key_BKD, value_BKD
        if self.policy.name == "quest":
            return self.attention.select_attention(*new, slots, table.cap_B, scaling), None
        return self.attention.step_attention(*new, slots, scaling, self.learn)

    def keep_house(self, score=None):
        """Do what is done once a step for all layers; here there is one."""
        table, policy = self.store.table, self.policy
        used = recent = keepers = priority = None
        if policy.name == "raas":
            priority = table.state["stamp"]
            if score is not None:
                share = self.options["r"] if self.options["used"] == "top_r" else None
                used = Used(priority, score, share, self.options["alpha"])
        if policy.name == "h2o":
            recent, priority = policy._recent(table.cap_B), table.state["mass"]
        if policy.name == "milestone":
            keepers = policy._keepers(table)[1]
        # A cache that grows reads `cap_B` pages, and fills all there are.
        cap = torch.full_like(table.cap_B, self.store.pages) if policy.grows else table.cap_B
        pinned = table.prompt_B if policy.pins_prompt else torch.zeros_like(table.prompt_B)
        turn = Turn(
            table.position_BKS, self.store.tail_BK, table.now_B, table.prompt_B, cap, table.page_size, pinned,
            recent, keepers, priority,
        )  # fmt: skip
        full_BK = self.book.bookkeep(turn, used)
        if policy.name == "milestone" and bool(full_BK.any()):
            moves = policy.moves(table, self.store.tail_BK, full_BK)
            self.book.move_tokens(
                table.keys_BKSD, table.values_BKSD, table.position_BKS, table.state["marked"], *moves
            )
