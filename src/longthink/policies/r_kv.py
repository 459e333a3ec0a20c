"""R-KV: keep tokens that recent queries attend to, as long as no other key says the same.

Shape suffixes besides the usual ones: W queries in the ring, V slots visited in a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from longthink.config import check_int, check_range
from longthink.kernels.reference import masked_softmax, wide_dtype
from longthink.policies.base import PageTable, PolicyInfo, Shape, Step
from longthink.policies.keydiff import unit_vectors
from longthink.policies.registry import register
from longthink.policies.tokens import VotingPolicy, pool_neighbours, record


@register("r_kv")
@dataclass(frozen=True, kw_only=True)
class RKV(VotingPolicy):
    """Evict the token with the least ``lam * importance - (1 - lam) * redundancy`` (arXiv 2505.24133, eq. 3 to 7).

    Importance (eq. 3, 4): logits of the last `window` queries, the maximum over the heads of a group, softmax over
    the candidates, maximum over neighbours, mean over the queries. Redundancy (eq. 5, 6): the mean cosine of a
    token's key with the other keys, without those whose most recent similar key it is (a cosine above `threshold`),
    softmax over the candidates. The last `window` tokens stay and are no candidates.

    To compare all pairs of keys in each step would cost O(L^2) time, and running sums would drift and lack the links
    that an eviction changes. So a step compares all keys with the new one and with those of `refresh` slots in turn:
    O(L), and no estimate is older than 2 L / `refresh` steps. Differs from the paper: it compares all pairs once per
    128 steps and evicts 128 tokens, here one token leaves before one is written. The queries of the first prompt do
    not count. The prompt is pinned; if it is not, one longer than the budget keeps its last tokens.

    Parameters
    ----------
    lam
        Weight of importance; that of redundancy is the rest.
    window
        Number of last queries that count. Their tokens stay, as far as they fill at most half of the free slots.
    kernel
        Number of neighbours, the token itself included, over which attention is pooled; odd.
    threshold
        Cosine above which two keys are similar.
    refresh
        Slots whose redundancy is estimated anew in each step.
    pin_prompt
        Never evict a prompt token. Otherwise a prompt longer than the budget keeps its last tokens, and all compete.
    """

    info: ClassVar[PolicyInfo] = PolicyInfo(
        time="O(L)",
        memory="O(L)",
        keeps="prompt + attended tokens without similar keys + most recent tokens",
        source="arXiv 2505.24133",
    )

    window: int = 8
    kernel: int = 7
    lam: float = 0.1
    threshold: float = 0.5
    refresh: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("lam", self.lam, 0.0, 1.0)
        check_range("threshold", self.threshold, -1.0, 1.0)
        check_int("refresh", self.refresh, 1)

    @property
    @override
    def needs(self) -> frozenset[str]:
        return frozenset({"vectors"})

    @override
    def init_state(self, shape: Shape, device: torch.device) -> dict[str, Tensor]:
        sizes = shape.B, shape.K, shape.P * shape.T
        return {
            "attention": torch.zeros(*sizes, self.window, device=device),
            # Position + 1 of the most recent similar token, 0 for none.
            "similar": torch.zeros(sizes, dtype=torch.int32, device=device),
            "likeness": torch.zeros(sizes, device=device),
        }

    @override
    def worth(self, table: PageTable) -> Tensor:
        candidate_BKS, position_BKS = self.candidates(table), table.position_BKS
        # A softmax over all residents, restricted to the candidates, is the paper's softmax over the candidates.
        share_BKSW = table.state["attention"] * candidate_BKS[..., None]
        total_BK1W = share_BKSW.sum(2, keepdim=True)
        share_BKSW = share_BKSW / total_BK1W.clamp(min=torch.finfo(total_BK1W.dtype).tiny)
        importance_BKSW = pool_neighbours(share_BKSW, candidate_BKS, position_BKS, self.kernel, "max")
        redundancy_BKS = masked_softmax(table.state["likeness"], candidate_BKS)
        return self.lam * importance_BKSW.mean(-1) - (1 - self.lam) * redundancy_BKS

    @override
    def observe(self, table: PageTable, step: Step) -> None:
        keys_BKSD = table.keys_BKSD.to(wide_dtype(table.keys_BKSD.dtype))
        logits_BKGS = step.query_BKGD.to(keys_BKSD.dtype) @ keys_BKSD.transpose(-1, -2) * step.scaling
        shared_BKS = masked_softmax(logits_BKGS.amax(2), table.resident_BKS)
        record(table.state["attention"], shared_BKS, table.now_B)
        self._refresh(table, unit_vectors(keys_BKSD, table.resident_BKS))

    def _refresh(self, table: PageTable, unit_BKSD: Tensor) -> None:
        """Estimate the redundancy of the new token, and of the slots whose turn it is (V of them)."""
        similar_BKS, position_BKS = table.state["similar"], table.position_BKS
        now_B11 = table.now_B[:, None, None]
        new_BK1 = (position_BKS == now_B11).to(torch.int8).argmax(-1, keepdim=True)
        slot_BKV = torch.cat([new_BK1, self._in_turn(table, new_BK1)], -1)

        at_BKVD = slot_BKV[..., None].expand(-1, -1, -1, unit_BKSD.shape[-1])
        cosine_BKVS = unit_BKSD.gather(2, at_BKVD) @ unit_BKSD.transpose(-1, -2)
        itself_BKVS = slot_BKV[..., None] == torch.arange(unit_BKSD.shape[2], device=slot_BKV.device)
        cosine_BKVS = cosine_BKVS.masked_fill(itself_BKVS, 0.0)
        close_BKVS = (cosine_BKVS > self.threshold) & ~itself_BKVS & table.resident_BKS[:, :, None]
        close_BKVS = close_BKVS & table.resident_BKS.gather(2, slot_BKV)[..., None]

        # After a rewind, what was similar may be a token that was dropped.
        similar_BKS.masked_fill_(similar_BKS > now_B11, 0)
        latest_BKV = torch.where(close_BKVS, position_BKS[:, :, None] + 1, 0).amax(-1)
        similar_BKS.scatter_(2, slot_BKV, latest_BKV)
        similar_BKS.copy_(torch.where(close_BKVS[:, :, 0], (now_B11 + 1).to(torch.int32), similar_BKS))
        links_BKVS = similar_BKS[:, :, None] == position_BKS.gather(2, slot_BKV)[..., None] + 1
        total_BKV = cosine_BKVS.masked_fill(links_BKVS, 0.0).sum(-1)
        likeness_BKV = total_BKV / table.resident_BKS.sum(-1, keepdim=True)
        table.state["likeness"].scatter_(2, slot_BKV, likeness_BKV.to(table.state["likeness"].dtype))

    def _in_turn(self, table: PageTable, new_BK1: Tensor) -> Tensor:
        """Slots to visit in this step, BKV: all in turn, whatever the number of tokens; the new one for empty slots.

        Turns go round a power of two. Round the number of tokens, which grows with `now_B` at first, they would go on
        missing the same slots; and the number of slots depends on other rows.
        """
        count_BK1 = table.resident_BKS.sum(-1, keepdim=True)
        powers = 2 ** torch.arange(31, device=count_BK1.device)
        round_BK1 = 2 ** (count_BK1 > powers).sum(-1, keepdim=True)
        turn_BV = table.now_B[:, None] * self.refresh + torch.arange(self.refresh, device=count_BK1.device)
        turn_BKV = turn_BV[:, None] % round_BK1
        return torch.where(turn_BKV < count_BK1, turn_BKV, new_BK1)
