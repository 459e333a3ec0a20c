"""Replay: layer caches whose attention comes from a recorded trace.

Policy, page table and order of a step are those of decoding. The attention over resident tokens is the recorded dense
attention on them, renormalised.

Shape suffixes: C budgets, L layers, B = C * L batch rows, K KV heads, G query heads per KV head, H query heads,
N tokens so far, S token slots, D head dim (0 where a trace holds no vectors).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longthink.cache.layer import LayerCache
from longthink.cache.rows import page_caps
from longthink.cache.store import SlotStore
from longthink.config import Budget
from longthink.errors import CacheStateError
from longthink.kernels.rotation import Rotation
from longthink.policies import Policy, SelectsPages


class ReplayedLayers(LayerCache):
    """Caches of several layers at several budgets, one batch row for each pair; layers vary fastest.

    Parameters
    ----------
    policy
        Policy of all rows.
    budgets
        Budgets (C), each large enough for the prompt; ``[None]`` where the policy needs none.
    layers
        Number of layers (L).
    """

    def __init__(self, policy: Policy, budgets: Sequence[Budget | None], layers: int) -> None:
        super().__init__(policy, budgets[0])
        self._budget_B = [budget for budget in budgets for _ in range(layers)]
        self._shape = (len(budgets), layers)
        self._attention_LKGN = torch.empty(0)
        self._kept_BKG = torch.empty(0)

    def prefill(self, keys_LKND: Tensor, values_LKND: Tensor, mass_LKN: Tensor) -> None:
        """Fill the caches with the prompt.

        Parameters
        ----------
        mass_LKN
            Attention that each prompt token received from the prompt, summed over queries and the heads of its group.
        """
        prompt = keys_LKND.shape[2]
        lengths = [prompt] * len(self._budget_B)
        position_BN = torch.arange(prompt).expand(len(lengths), -1)
        keys, values, mass = (self._for_rows(tensor) for tensor in (keys_LKND, values_LKND, mass_LKN))
        seen = mass if "prompt_mass" in self.policy.needs else None
        # No key meets a query here, so shifted keys need no rotation.
        self.rotation = Rotation(torch.zeros(keys.shape[-1] // 2))
        caps = [page_caps(self.policy, budget, [prompt])[0] for budget in self._budget_B]
        self._admit(keys, values, position_BN, lengths, caps, seen)

    def decode(
        self, attention_LKGN: Tensor, query_LHD: Tensor, key_LKD: Tensor, value_LKD: Tensor, scaling: float
    ) -> Tensor:
        """Replay one decode step; returns the share of the dense attention that falls on what is read, CLKG.

        Parameters
        ----------
        attention_LKGN
            Dense attention of the new token, itself included.

        Raises
        ------
        CacheStateError
            Before `prefill`.
        """
        if self._store is None:
            raise CacheStateError("prefill the prompt before decoding")
        self._attention_LKGN = attention_LKGN
        new = self._for_rows(query_LHD), self._for_rows(key_LKD), self._for_rows(value_LKD)
        self._decode(new, scaling)
        return self._kept_BKG.unflatten(0, self._shape)

    def _for_rows(self, tensor: Tensor) -> Tensor:
        """Repeat a tensor of all layers for each budget."""
        return tensor.expand(self._shape[0], *tensor.shape).flatten(0, 1)

    def _read(
        self, policy: Policy, store: SlotStore, query_BKGD: Tensor, scaling: float
    ) -> tuple[Tensor, Tensor | None]:
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
        # The output is ignored: the next queries are recorded too.
        return query_BKGD, weights
