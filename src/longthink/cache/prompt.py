"""Prompts on their way to the slots: the buffer of a chunked prefill, the mask, and the writing.

Shape suffixes: B batch rows, K KV heads, Q new columns, N columns so far (token slots before them), S token slots,
D head dim, H query heads, F frequency pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longthink.cache.store import SlotStore
from longthink.errors import CacheStateError, UnsupportedFeatureError, UnsupportedModelError
from longthink.kernels.rotation import Rotation, query_sums
from longthink.policies import Policy, TrimsPrompt, policy_spec


class ChunkedPrompt:
    """Keys and values of a chunked prefill until its last chunk: policies choose what to keep from the whole prompt.

    Parameters
    ----------
    columns
        Columns of the whole prompt, padding included.
    """

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self.seen = 0
        self._keys_BKND: Tensor | None = None
        self._values_BKND: Tensor | None = None
        self._real_BN: Tensor | None = None
        self._mass_BKN: Tensor | None = None
        self._sums: dict[str, Tensor] = {}

    @property
    def complete(self) -> bool:
        return self.seen == self.columns

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self._keys_BKND, self._values_BKND) if tensor is not None)

    def add(self, key_BKQD: Tensor, value_BKQD: Tensor, real_BQ: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Append a chunk; returns keys, values and padding mask of all columns so far.

        Raises
        ------
        CacheStateError
            If there are more columns than announced.
        """
        start, self.seen = self.seen, self.seen + real_BQ.shape[1]
        if self.seen > self.columns:
            raise CacheStateError(f"a prompt of {self.columns} columns was announced, and {self.seen} came")
        if self.complete and start == 0:
            return key_BKQD, value_BKQD, real_BQ
        if self._keys_BKND is None or self._values_BKND is None or self._real_BN is None:
            rows, heads = key_BKQD.shape[:2]
            self._keys_BKND = key_BKQD.new_empty(rows, heads, self.columns, key_BKQD.shape[3])
            self._values_BKND = value_BKQD.new_empty(rows, heads, self.columns, value_BKQD.shape[3])
            self._real_BN = real_BQ.new_empty(rows, self.columns)
        self._keys_BKND[:, :, start : self.seen] = key_BKQD
        self._values_BKND[:, :, start : self.seen] = value_BKQD
        self._real_BN[:, start : self.seen] = real_BQ
        seen = slice(self.seen)
        return self._keys_BKND[:, :, seen], self._values_BKND[:, :, seen], self._real_BN[:, seen]

    def add_mass(self, mass_BKN: Tensor) -> Tensor:
        """Add the attention that the columns received from the last chunk; returns their sums so far."""
        if self._mass_BKN is None:
            self._mass_BKN = mass_BKN.new_zeros(*mass_BKN.shape[:2], self.columns)
        self._mass_BKN[..., : self.seen] += mass_BKN
        return self._mass_BKN[..., : self.seen]

    def total(self, name: str, sums: Tensor) -> Tensor:
        """Add sums over the last chunk; returns those over all so far."""
        self._sums[name] = self._sums[name] + sums if name in self._sums else sums
        return self._sums[name]


def sum_queries(
    query_BHQD: Tensor, position_BQ: Tensor, rotation: Rotation | None, chunks: ChunkedPrompt | None
) -> Tensor:
    """`query_sums` over all chunks so far."""
    assert rotation is not None
    sums_BH3F = query_sums(query_BHQD, position_BQ, rotation.to(query_BHQD.device))
    return chunks.total("queries", sums_BH3F) if chunks else sums_BH3F


def causal_mask(real_BN: Tensor, queries: int) -> Tensor:
    """Causal mask of the last `queries` columns over all real columns, shape B1QN."""
    columns = real_BN.shape[1]
    causal_QN = torch.ones(queries, columns, dtype=torch.bool, device=real_BN.device).tril(columns - queries)
    return causal_QN & real_BN[:, None, None]


def write_prompt(
    policy: Policy,
    store: SlotStore,
    block: tuple[Tensor, Tensor],
    position_BQ: Tensor,
    starts: list[int],
    mass_BKN: Tensor | None,
) -> None:
    """Write a prompt to slots that have room for it, without what the policy drops, and let the policy admit it.

    Parameters
    ----------
    block
        Keys and values, BKQD.
    position_BQ
        Logical positions, -1 for padding.
    starts
        Tokens of each row before.
    mass_BKN
        Attention that the slots in use and the columns received, if the policy needs it.
    """
    table = store.table
    old_slots = mass_BKN.shape[2] - position_BQ.shape[1] if mass_BKN is not None else 0
    table.now_B.copy_(torch.maximum(position_BQ.amax(1) + 1, table.now_B))
    if not max(starts):
        table.prompt_B.copy_(table.now_B)
    mass_BKQ = None if mass_BKN is None else mass_BKN[..., old_slots:]
    kept_BKQ = None
    if isinstance(policy, TrimsPrompt):
        kept_BKQ = policy.trim(position_BQ, table.now_B, table.cap_B, mass_BKQ)
    source_BKS = store.fill(*block, position_BQ, kept_BKQ)
    mass_BKS = None
    if mass_BKN is not None and mass_BKQ is not None:
        mass_BKS = torch.where(source_BKS >= 0, mass_BKQ.gather(2, source_BKS.clamp(min=0)), 0)
        mass_BKS[..., :old_slots] += mass_BKN[..., :old_slots]
    store.mark_prompt(starts)
    policy.admit(table, mass_BKS)


def check_query_stats(policy: Policy, rotation: Rotation | None, means_N: Tensor | None) -> None:
    """Check what a policy that needs "query_stats" is given.

    Raises
    ------
    UnsupportedModelError
        Unless RoPE rotates all features of the keys, and it is known how.
    UnsupportedFeatureError
        If the policy needs "calibration" and there are no calibrated means: a wrapper does not pass its file on.
    """
    if "calibration" in policy.needs and means_N is None:
        raise UnsupportedFeatureError(
            f"policy {policy_spec(policy)!r} needs calibrated statistics of queries, and was given none: a policy "
            "that wraps another must also be `Calibrated`"
        )
    if rotation is None or not rotation.inv_freq_D.all():
        fault = (
            "it is not known"
            if rotation is None
            else "it leaves features of the keys as they are, or all of them"
        )
        raise UnsupportedModelError(
            f"policy {policy_spec(policy)!r} takes the positions out of queries and keys: it needs RoPE, as "
            f"rotation=..., that rotates all their features; {fault}"
        )
