"""Bounded KV cache of one attention layer: prefill, decode steps, row operations.

Shape suffixes: B batch rows, H query heads, K KV heads, G query heads per KV head, Q new tokens, S token slots,
D head dim, N columns that a block of queries may read, or numbers in a row.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from longthink import kernels
from longthink.cache.layer_rows import LayerRows
from longthink.cache.prompt import ChunkedPrompt, causal_mask, check_query_stats, sum_queries, write_prompt
from longthink.cache.rows import RowCounts
from longthink.cache.shared import LastRead
from longthink.cache.step import QKV, FusedStep, Read, decode_step, open_pages, read_slots
from longthink.cache.store import SlotStore
from longthink.cache.turn import read_turn
from longthink.config import Budget
from longthink.errors import BudgetError, CacheStateError, UnsupportedFeatureError
from longthink.kernels import LogitRule
from longthink.kernels.rotation import Rotation
from longthink.policies import NEEDS, Policy, grows, needs_budget


class LayerCache(LayerRows):
    """Bounded KV cache of one attention layer, for any number of rows.

    Prefill attends densely; a decode step evicts, appends, attends and observes as the policy says. Each row counts
    its own logical positions, so padding takes no slot.

    Parameters
    ----------
    policy
        Which tokens to keep.
    budget
        How many to keep; None only where the policy needs no budget (`dense`).
    rotation
        How the keys carry positions, for policies that shift keys or need "query_stats".
    query_means_N
        Calibrated `query_sums` of all query heads for one query, flat, for policies that need "calibration".
    kv_dtype
        Dtype of the stored keys and values; None for that of the model.
    fused
        Fused decode steps by exact policy class, used where they serve the slots. A subclass may override any hook,
        so it never uses them.

    Raises
    ------
    BudgetError
        If the policy needs a budget and there is none.
    UnsupportedModelError
        If the policy needs "query_stats", and RoPE does not rotate all features of the keys, or is not known.
    ValueError
        If the policy declares an unknown need.
    """

    _read: Read = staticmethod(read_slots)
    _rule: LogitRule = kernels.PLAIN
    _reads_blocks = True  # whether a later turn may be read as one block
    shares_keys = False  # whether other layers attend to the same keys and values

    def __init__(
        self,
        policy: Policy,
        budget: Budget | None = None,
        *,
        rotation: Rotation | None = None,
        query_means_N: Tensor | None = None,
        kv_dtype: torch.dtype | None = None,
        fused: Mapping[type[Policy], type[FusedStep]] | None = None,
    ) -> None:
        if budget is None and needs_budget(policy):
            raise BudgetError(f"policy {policy.name!r} needs a budget: give budget=... or decode_budget=...")
        if unknown := policy.needs.difference(NEEDS):
            raise ValueError(f"policy {policy.name!r} needs {sorted(unknown)}: allowed is {', '.join(NEEDS)}")
        if "query_stats" in policy.needs:
            check_query_stats(policy, rotation, query_means_N)
        fused_step = (fused or {}).get(type(policy))
        self.fused = None if fused_step is None else fused_step(policy)
        self.policy = policy
        self.budget = budget
        self.kv_dtype = kv_dtype
        self.rotation = rotation
        self.query_means_N = query_means_N
        self.reset()

    def reset(self) -> None:
        """Drop all tokens and free the slots."""
        self._store: SlotStore | None = None
        self._chunks: ChunkedPrompt | None = None
        self.rows = RowCounts(self.policy, self.budget)
        self._announced = 0
        self.later_turns = False
        self._prepared = False
        self._last_read = LastRead()

    # State --------------------------------------------------------------------------------------------------

    @property
    def next_position_B(self) -> Tensor:
        """Logical position of each row's next token, on the device."""
        return self.store.table.now_B.clone()

    @property
    def is_fused(self) -> bool:
        """Whether decode steps are fused."""
        # Kernels know the prompt as the first pages of the text.
        return self.fused is not None and not self.later_turns and self.fused.serves(self.store)

    # Attention ----------------------------------------------------------------------------------------------

    @property
    def in_chunked_prefill(self) -> bool:
        """Whether columns of an announced prompt are still to come."""
        return self._chunks is not None or self._announced > 0

    def begin_chunked_prefill(self, columns: int) -> None:
        """Announce a prompt, the first or that of a later turn, whose columns come in chunks."""
        if self._store is None:
            self._chunks = ChunkedPrompt(columns)
        else:
            self._announced = columns

    def attend(
        self,
        query_BHQD: Tensor,
        key_BKQD: Tensor,
        value_BKQD: Tensor,
        valid_BQ: Tensor | None = None,
        scaling: float | None = None,
        rule: LogitRule = kernels.PLAIN,
    ) -> Tensor:
        """Append new tokens and return their attention output.

        The first call is the prefill. Later, one token is a decode step (unless a chunked prefill was begun), and
        several are the prompt of another turn: protected as the first one is, and with a decode budget the cache
        grows by its pages. It is read as one block, or token by token if something must be evicted for it.

        Parameters
        ----------
        valid_BQ
            True for real tokens, False for padding; None if all are real.
        scaling
            Factor on q.k; ``D ** -0.5`` by default.
        rule
            What the layer does with its logits besides, in all calls.

        Returns
        -------
        Tensor
            Output, BHQD with the head dim of the values; meaningless at padding.

        Raises
        ------
        BudgetError
            If the prompt does not fit; the cache is left unchanged.
        CacheStateError
            If the number of rows changed.
        """
        scaling = query_BHQD.shape[-1] ** -0.5 if scaling is None else scaling
        if valid_BQ is not None and bool(valid_BQ.all()):
            valid_BQ = None
        if self._store is not None and len(self.rows.lengths) != len(query_BHQD):
            raise CacheStateError(
                f"the cache holds {len(self.rows.lengths)} rows and was given {len(query_BHQD)}"
            )
        columns = query_BHQD.shape[2]
        if not columns:
            return query_BHQD.new_empty(*query_BHQD.shape[:3], value_BKQD.shape[3])
        self._rule = rule
        if self._store is not None:
            self._store.rule = rule
        block = query_BHQD, key_BKQD, value_BKQD
        by_user = columns > 1 or self._announced > 0
        if self._store is None or (by_user and grows(self.policy) and self._reads_blocks):
            out_BHQD = self._prefill(block, valid_BQ, scaling)
        elif by_user:
            out_BHQD = self._read_turn(block, valid_BQ, scaling)
        else:
            active_B = None if valid_BQ is None else valid_BQ[:, 0]
            new = query_BHQD[:, :, 0], key_BKQD[:, :, 0], value_BKQD[:, :, 0]
            out_BHQD = self._decode_active(new, active_B, scaling)[:, :, None]
        self._announced = max(0, self._announced - columns)
        return out_BHQD

    def attend_again(self, query_BHQD: Tensor, scaling: float | None, rule: LogitRule) -> Tensor:
        """Attention of another layer to what the last call has read, BHQD; the policy is not shown its queries."""
        scaling = query_BHQD.shape[-1] ** -0.5 if scaling is None else scaling
        if (out_BHQD := self._last_read.attend(query_BHQD, scaling, rule)) is not None:
            return out_BHQD
        query_BKGD = query_BHQD[:, :, 0].unflatten(1, (self.store.keys_BKSD.shape[1], -1))
        return self._read(self.policy, self.store, query_BKGD, scaling)[0].flatten(1, 2)[:, :, None]

    def _read_turn(self, block: QKV, valid_BQ: Tensor | None, scaling: float) -> Tensor:
        """Read the prompt of a later turn, as one block unless something must be evicted for it."""
        rows, _, columns, _ = block[0].shape
        counts = [columns] * rows if valid_BQ is None else valid_BQ.sum(1).tolist()
        caps = self.rows.later_caps(counts)
        needed, starts = self.rows.slots_needed(counts), self.rows.lengths
        self.rows.add_prompt(counts, caps)
        self.later_turns = True
        self._make_room(*block[1:])
        self.refresh_compile_marks()
        if self._reads_blocks and all(pages <= cap for pages, cap in zip(needed, caps, strict=True)):
            out_BHQD = read_turn(self.policy, self.store, block, valid_BQ, starts, scaling)
            self.store.mark_prompt(starts)
            if self.shares_keys:
                self._last_read.keep_turn(self.store, starts, valid_BQ, columns)
            return out_BHQD
        if self.shares_keys:
            raise UnsupportedFeatureError(
                "a later turn for which something must be evicted cannot be read where layers share keys and values: "
                "give a larger budget, or decode_budget"
            )
        self.rows.lengths = starts
        out_BHQD = block[0].new_empty(*block[0].shape[:3], block[2].shape[3])
        for i in range(columns):
            query_BHD, key_BKD, value_BKD = (tensor[:, :, i] for tensor in block)
            active_B = None if valid_BQ is None else valid_BQ[:, i]
            out_BHQD[:, :, i] = self._decode_active((query_BHD, key_BKD, value_BKD), active_B, scaling)
            self.store.mark_prompt(starts)
        return out_BHQD

    def check_room(self, lengths: list[int] | None, counts: list[int] | None, columns: int) -> None:
        """Raise `BudgetError` if a prompt does not fit.

        The rows would be rewound to `lengths` before (None for no change), and have `counts` new tokens (None for
        `columns` in all).
        """
        if self._chunks is not None or (self._store is not None and not needs_budget(self.policy)):
            return
        self.rows.check_room(lengths, counts, columns)

    def rewind(self, lengths: list[int]) -> None:
        """Drop each row's tokens from these lengths on: padding that was read. What it evicted does not return."""
        self.store.truncate(lengths)
        self.rows.rewind(lengths, (self.store.table.page_BKP >= 0).sum(-1).amax(1).tolist())

    # Prefill ------------------------------------------------------------------------------------------------

    def _prefill(self, block: QKV, valid_BQ: Tensor | None, scaling: float) -> Tensor:
        query_BHQD, key_BKQD, value_BKQD = block
        rows, _, columns, _ = query_BHQD.shape
        read_BQ = query_BHQD.new_ones(rows, columns, dtype=torch.bool) if valid_BQ is None else valid_BQ
        chunks, real_BQ = self._chunks, read_BQ
        if chunks is not None:
            # The keys are those of all chunks so far, the queries those of this chunk.
            key_BKQD, value_BKQD, real_BQ = chunks.add(key_BKQD, value_BKQD, read_BQ)
        old_B = torch.tensor(self.rows.lengths or [0] * rows, device=real_BQ.device)
        position_BQ = torch.where(real_BQ, old_B[:, None] + real_BQ.cumsum(1) - 1, -1)
        counts = real_BQ.sum(1).tolist()
        caps = self.rows.first_caps(counts) if self._store is None else self.rows.later_caps(counts)

        keys_BKND, values_BKND, readable_BN = key_BKQD, value_BKQD, real_BQ
        if self._store is not None:
            # Prefill extends a cache only where nothing is evicted, so all heads hold the same tokens.
            keys_BKND = torch.cat([self._store.keys_BKSD, key_BKQD], 2)
            values_BKND = torch.cat([self._store.values_BKSD, value_BKQD], 2)
            readable_BN = torch.cat([self._store.table.resident_BKS[:, 0], real_BQ], 1)
        plain = valid_BQ is None and readable_BN.shape[1] == columns
        mask_B1QN = None if plain and not self.shares_keys else causal_mask(readable_BN, columns)
        if self.shares_keys and mask_B1QN is not None:
            self._last_read.keep(keys_BKND, values_BKND, mask_B1QN)
        read_by = scaling, self._rule
        out_BHQD = kernels.block_attention(query_BHQD, keys_BKND, values_BKND, mask_B1QN, *read_by)
        mass_BKN = None
        if "prompt_mass" in self.policy.needs:
            mask = causal_mask(readable_BN, columns) if mask_B1QN is None else mask_B1QN
            mass_BKN = kernels.column_mass(query_BHQD, keys_BKND, mask, read_BQ, *read_by)
            mass_BKN = chunks.add_mass(mass_BKN) if chunks else mass_BKN
        sums_BH3F = None
        if "query_stats" in self.policy.needs:
            sums_BH3F = sum_queries(query_BHQD, position_BQ[:, -columns:], self.rotation, chunks)

        self._see_prompt(query_BHQD, key_BKQD, read_BQ, real_BQ)

        if chunks is None or chunks.complete:
            self._chunks = None
            self._admit(key_BKQD, value_BKQD, position_BQ, counts, caps, mass_BKN)
            if sums_BH3F is not None:
                means_BN = sums_BH3F.flatten(1) / real_BQ.sum(1, keepdim=True).clamp(min=1)
                if self.query_means_N is not None:
                    means_BN = self.query_means_N.to(means_BN).expand_as(means_BN).clone()
                self.store.keep_query_stats(means_BN, self.rotation)
        return out_BHQD

    def _see_prompt(self, query_BHQD: Tensor, key_BKQD: Tensor, read_BQ: Tensor, real_BQ: Tensor) -> None:
        """What a subclass learns of a prompt before it is written: from queries of a chunk, and keys so far."""

    def _admit(
        self, key_BKQD: Tensor, value_BKQD: Tensor, position_BQ: Tensor, counts: list[int], caps: list[int],
        mass_BKN: Tensor | None,
    ) -> None:  # fmt: skip
        """Write the prompt to the slots."""
        starts = self.rows.lengths or [0] * len(counts)
        self.rows.add_prompt(counts, caps)
        self._make_room(key_BKQD, value_BKQD)
        write_prompt(self.policy, self.store, (key_BKQD, value_BKQD), position_BQ, starts, mass_BKN)
        self.store.keep_shifted(self.policy, self.rotation)

    def _make_room(self, key_BKQD: Tensor, value_BKQD: Tensor) -> None:
        """Allocate the slots that the rows need."""
        caps = self.rows.caps
        pages = -(-max(self.rows.lengths) // self.policy.page_size) if grows(self.policy) else max(caps)
        if self._store is None:
            form = self.kv_dtype, value_BKQD.shape[3], self._rule
            self._store = SlotStore(self.policy, key_BKQD, caps, pages, *form)
        self._store.reserve(pages)
        self._store.set_caps(caps)

    # Decode -------------------------------------------------------------------------------------------------

    def _decode_active(self, new: QKV, active_B: Tensor | None, scaling: float) -> Tensor:
        """Decode step of the active rows; the others are restored."""
        if active_B is None or bool(active_B.all()):
            return self._decode(new, scaling)
        self._reserve(max(self.rows.lengths) + 1)
        idle = (~active_B).nonzero().flatten()
        kept = [tensor[idle] for tensor in self.store.tensors()]
        lengths = list(self.rows.lengths)
        out_BHD = self._decode(new, scaling)
        for tensor, rows in zip(self.store.tensors(), kept, strict=True):
            tensor[idle] = rows
        for row in idle.tolist():
            self.rows.lengths[row] = lengths[row]
        return out_BHD

    def _decode(self, new: QKV, scaling: float) -> Tensor:
        evicts = self.begin_step()
        if evicts is not None:
            self.open_pages(evicts=evicts)
        return self.step(new, scaling)

    def begin_step(self) -> bool | None:
        """Count a new token in every row, on the host only.

        Returns
        -------
        bool or None
            None if no row opens a page; else whether one of them may have to evict.
        """
        self._last_read.clear()
        evicts = self.rows.add_token()
        if evicts is not None:
            self._reserve(max(self.rows.lengths))
        return evicts

    def prepare_compile(self) -> None:
        """Mark dynamic sizes and static addresses for the compiler."""
        self._prepared = True
        varies = grows(self.policy) or self.budget is None or self.budget.decode_budget is not None
        self.store.mark_for_compiler(varies=varies)

    def refresh_compile_marks(self) -> None:
        """Mark again after tensors were replaced."""
        if self._prepared:
            self.prepare_compile()

    def open_pages(self, *, evicts: bool) -> None:
        """Open pages for the step that `begin_step` counted: tensor code only, compilable."""
        open_pages(self.policy, self.store, evicts=evicts)

    def step(self, new: QKV, scaling: float) -> Tensor:
        """Append the token that `begin_step` counted and return its attention output, BHD: tensor code only."""
        if self.fused is not None and self.is_fused:
            return self.fused.step(self.store, new, scaling)
        return decode_step(self.policy, self.store, new, scaling, self._read)

    def _reserve(self, tokens: int) -> None:
        """Allocate slots for this many tokens, where the cache grows."""
        needed = -(-tokens // self.policy.page_size)
        if grows(self.policy) and needed > self.store.pages:
            # At most 1024 tokens spare, because each step reads them all; the copies are amortised.
            self.store.reserve(needed + min(self.store.pages // 4, 1024 // self.policy.page_size))
            self.refresh_compile_marks()
