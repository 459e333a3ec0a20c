"""Replay: a layer's cache whose attention is given instead of computed.

The policy, the page table and the order of a step are those of decoding; only the softmax is taken from a recorded
trace: over resident tokens it is the dense attention that falls on them, scaled to one.

Shape suffixes: C budgets, L layers, B = C * L batch rows, K KV heads, G query heads per KV head, H query heads,
N tokens so far, S token slots, D head dim (0 where a trace holds no vectors).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longthink.cache.layer import LayerCache
from longthink.cache.prompt import page_caps
from longthink.cache.store import SlotStore
from longthink.config import Budget
from longthink.errors import CacheStateError
from longthink.policies import Policy, SelectsPages


class ReplayedLayers(LayerCache):
    """Several layers under several budgets at once: one batch row for each pair, the layers of a budget together.

    Parameters
    ----------
    policy
        What to keep, the same in all rows.
    budgets
        How much to keep: one per C, each large enough for the prompt; ``[None]`` where the policy needs none.
    layers
        How many layers (L).
    """

    def __init__(self, policy: Policy, budgets: Sequence[Budget | None], layers: int) -> None:
        super().__init__(policy, budgets[0])
        self._budget_B = [budget for budget in budgets for _ in range(layers)]
        self._shape = (len(budgets), layers)
        self._attention_LKGN = torch.empty(0)
        self._kept_BKG = torch.empty(0)

    def prefill(self, keys_LKND: Tensor, values_LKND: Tensor, mass_LKN: Tensor) -> None:
        """Take in the prompt.

        Parameters
        ----------
        mass_LKN
            Attention that each prompt token got from the prompt, summed over queries and the heads of its group.
        """
        prompt = keys_LKND.shape[2]
        lengths = [prompt] * len(self._budget_B)
        position_BN = torch.arange(prompt).expand(len(lengths), -1)
        keys, values, mass = (self._for_rows(tensor) for tensor in (keys_LKND, values_LKND, mass_LKN))
        seen = mass if "prompt_mass" in self.policy.needs else None
        # Nothing to turn: no key is multiplied with a query here.
        self._inv_freq_D = torch.zeros(keys.shape[-1] // 2)
        caps = [page_caps(self.policy, budget, [prompt])[0] for budget in self._budget_B]
        self._admit(keys, values, position_BN, lengths, caps, seen)

    def decode(
        self, attention_LKGN: Tensor, query_LHD: Tensor, key_LKD: Tensor, value_LKD: Tensor, scaling: float
    ) -> Tensor:
        """Replay one decode step and return the share of the attention that falls on what is read, CLKG.

        Parameters
        ----------
        attention_LKGN
            Dense attention of the new token, itself included.
        """
        if self._store is None:
            raise CacheStateError("begin with the prompt")
        self._attention_LKGN = attention_LKGN
        new = self._for_rows(query_LHD), self._for_rows(key_LKD), self._for_rows(value_LKD)
        self._decode(new, scaling)
        return self._kept_BKG.unflatten(0, self._shape)

    def _for_rows(self, tensor: Tensor) -> Tensor:
        """What every layer has, for every budget."""
        return tensor.expand(self._shape[0], *tensor.shape).flatten(0, 1)

    def _read(
        self, policy: Policy, store: SlotStore, query_BKGD: Tensor, scaling: float
    ) -> tuple[Tensor, Tensor | None]:
        """Read the trace in place of the slots."""
        del scaling
        table, tokens = store.table, self._attention_LKGN.shape[-1]
        selected_BKR = policy.select(table, query_BKGD) if isinstance(policy, SelectsPages) else None
        position_BKS = table.position_BKS
        if selected_BKR is not None:
            within = torch.arange(table.page_size)
            slot_BKS = (selected_BKR.clamp(min=0)[..., None] * table.page_size + within).flatten(2)
            wanted_BKS = (selected_BKR >= 0).repeat_interleave(table.page_size, -1)
            position_BKS = torch.where(wanted_BKS, position_BKS.gather(2, slot_BKS), -1)
        attention = self._attention_LKGN.expand(self._shape[0], *self._attention_LKGN.shape)
        place_CLK1S = position_BKS.unflatten(0, self._shape)[:, :, :, None].long()
        index = place_CLK1S.clamp(0, tokens - 1).expand(*attention.shape[:-1], -1)
        held = attention.gather(-1, index) * (place_CLK1S >= 0)
        held_BKGS = held.flatten(0, 1)
        self._kept_BKG = held_BKGS.sum(-1)
        weights = None
        if "weights" in policy.needs:
            tiny = torch.finfo(held_BKGS.dtype).tiny
            weights = held_BKGS / self._kept_BKG[..., None].clamp(min=tiny)
        # Nobody reads the output: what the model makes of it was recorded.
        return query_BKGD, weights
