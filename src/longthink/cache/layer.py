"""One attention layer's cache: prefill, the decode step, and what it holds.

Shape suffixes: B batch rows, H query heads, K KV heads, G query heads per KV head, Q new tokens, S token slots,
D head dim, N columns that a block of queries may read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from longthink import kernels
from longthink.cache.prompt import ChunkedPrompt, UserPages, causal_mask, page_caps
from longthink.cache.stats import CacheStats
from longthink.cache.step import QKV, Read, decode_step, open_pages, read_slots
from longthink.cache.store import SlotStore
from longthink.cache.turn import read_turn
from longthink.config import Budget
from longthink.errors import BudgetError, CacheStateError, UnsupportedFeatureError, UnsupportedModelError
from longthink.policies import (
    NEEDS,
    Policy,
    ShiftsKeys,
    TrimsPrompt,
    grows,
    needs_budget,
    policy_spec,
)


class FusedStep(Protocol):
    """A layer's decode step by kernels that were made for one policy class: see `longthink.accelerators`."""

    def __init__(self, policy: Policy) -> None: ...

    def serves(self, store: SlotStore) -> bool:
        """Whether the kernels run where the slots are."""
        ...

    def step(self, store: SlotStore, new: QKV, scaling: float) -> Tensor:
        """Do what `decode_step` does for the policy."""
        ...


class LayerCache(CacheStats):
    """Bounded cache of one attention layer, for any number of rows.

    The prompt is attended densely; a decode step evicts, writes, reads and learns as the policy says. Rows count
    their own logical positions, so padding never takes a slot.

    Parameters
    ----------
    policy
        What to keep.
    budget
        How much to keep; may be None only where the policy needs none (`dense`).
    inv_freq_D
        RoPE frequencies of the keys, for policies that number tokens inside the cache.
    kv_dtype
        Format that keys and values are kept in; None for that of the model.
    fused
        Decode steps by exact class of policy, taken where they serve the slots. A subclass of such a policy may
        override any hook, so it never takes them.

    Raises
    ------
    BudgetError
        If the policy needs a budget and there is none.
    ValueError
        If the policy declares a need that there is not.
    """

    _read: Read = staticmethod(read_slots)

    def __init__(
        self,
        policy: Policy,
        budget: Budget | None = None,
        *,
        inv_freq_D: Tensor | None = None,
        kv_dtype: torch.dtype | None = None,
        fused: Mapping[type[Policy], type[FusedStep]] | None = None,
    ) -> None:
        if budget is None and needs_budget(policy):
            raise BudgetError(f"policy {policy.name!r} needs a budget: give budget=... or decode_budget=...")
        if unknown := policy.needs.difference(NEEDS):
            raise ValueError(f"policy {policy.name!r} needs {sorted(unknown)}: allowed is {', '.join(NEEDS)}")
        fused_step = (fused or {}).get(type(policy))
        self.fused = None if fused_step is None else fused_step(policy)
        """The policy's own kernels, where there are any."""
        self.policy = policy
        self.budget = budget
        self.kv_dtype = kv_dtype
        self._inv_freq_D = inv_freq_D
        self.reset()

    def reset(self) -> None:
        """Forget everything and free the slots."""
        self._store: SlotStore | None = None
        self._chunks: ChunkedPrompt | None = None
        # Host copies of lengths and caps: knowing when a page opens must not wait for the device.
        self._lengths: list[int] = []
        self._caps: list[int] = []
        self._user: list[UserPages] = []
        self._announced = 0
        self._prepared = False

    # What it holds ------------------------------------------------------------------------------------------

    @property
    def length_B(self) -> Tensor:
        """Tokens that each row has seen, padding not counted."""
        return torch.tensor(self._lengths, dtype=torch.int64)

    @property
    def next_position_B(self) -> Tensor:
        """Logical position of each row's next token, on the device of the cache."""
        return self.store.table.now_B.clone()

    @property
    def is_fused(self) -> bool:
        """Whether steps are taken by the policy's own kernels."""
        return self.fused is not None and self.fused.serves(self.store)

    @property
    def sizes(self) -> tuple[torch.Size, int]:
        """Shape of the slots of keys and of values, and the largest cap: what changes when rows change hands."""
        return self.store.keys_BKSD.shape, self.store.table.cap

    def select_rows(self, rows: Tensor) -> None:
        """Make row i what row ``rows[i]`` was (beam search, batch changes)."""
        if self._store is None:
            return
        self._store.apply(lambda tensor: tensor.index_select(0, rows.to(tensor.device)))
        self._lengths, self._caps = ([old[i] for i in rows.tolist()] for old in (self._lengths, self._caps))
        self._user = [self._user[i] for i in rows.tolist()]
        self._store.set_caps(self._caps)

    def adopt(self, row: int, other: LayerCache) -> None:
        """Make a row, or one behind the last, what the only row of another cache is (continuous batching)."""
        if self._store is None or other._store is None or len(other._lengths) != 1:
            raise CacheStateError("adopt needs a cache with rows, and another with exactly one")
        if row == len(self._lengths):
            # Any row makes room: all of it is overwritten.
            self.select_rows(torch.tensor([*range(row), 0]))
        self._store.adopt(row, other._store)
        self._lengths[row], self._caps[row] = other._lengths[0], other._caps[0]
        self._user[row] = other._user[0]
        self._store.set_caps(self._caps)
        self.release()

    def release(self) -> None:
        """Give back slots that no row can use: after a long row has left."""
        if self._store is None:
            return
        needed = max(self._lengths) // self.policy.page_size + 1
        # What grows keeps some room, or it would be copied again at the next page.
        self._store.release(needed + needed // 2 if grows(self.policy) else max(self._caps))
        self.refresh_compile_marks()

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
    ) -> Tensor:
        """Take in new tokens and return their attention output.

        The first tokens are the prompt. On a live cache one token is a decode step, unless it was announced as a
        prompt, and several are a later turn: what the user wrote. It is protected as the prompt is, and with a decode
        budget the cache grows by its pages. Where nothing has to be evicted for it, it is read as one block, else token
        by token.

        Parameters
        ----------
        valid_BQ
            True for real tokens, False for padding; None if all are real.
        scaling
            Factor on q.k; ``D ** -0.5`` by default.

        Returns
        -------
        Tensor
            Shape BHQD. What stands at padding has no meaning.

        Raises
        ------
        BudgetError
            If the prompt does not fit; the cache is then as it was.
        CacheStateError
            If the number of rows changed.
        """
        scaling = query_BHQD.shape[-1] ** -0.5 if scaling is None else scaling
        if valid_BQ is not None and bool(valid_BQ.all()):
            valid_BQ = None
        if self._store is not None and len(self._lengths) != len(query_BHQD):
            raise CacheStateError(
                f"the cache holds {len(self._lengths)} rows and was given {len(query_BHQD)}"
            )
        columns = query_BHQD.shape[2]
        block = query_BHQD, key_BKQD, value_BKQD
        by_user = columns > 1 or self._announced > 0
        if self._store is None or (by_user and grows(self.policy)):
            out_BHQD = self._prefill(*block, valid_BQ, scaling)
        elif by_user:
            out_BHQD = self._read_turn(block, valid_BQ, scaling)
        else:
            active_B = None if valid_BQ is None else valid_BQ[:, 0]
            new = query_BHQD[:, :, 0], key_BKQD[:, :, 0], value_BKQD[:, :, 0]
            out_BHQD = self._decode_active(new, active_B, scaling)[:, :, None]
        self._announced = max(0, self._announced - columns)
        return out_BHQD

    def _read_turn(self, block: QKV, valid_BQ: Tensor | None, scaling: float) -> Tensor:
        query_BHQD, key_BKQD, value_BKQD = block
        rows, _, columns, _ = query_BHQD.shape
        counts = [columns] * rows if valid_BQ is None else valid_BQ.sum(1).tolist()
        old = self._lengths
        opened = self._start_turn(counts)
        if all(pages <= cap for pages, cap in zip(opened, self._caps, strict=True)):
            out_BHQD = read_turn(self.policy, self.store, block, valid_BQ, old, scaling)
            self._lengths = [length + count for length, count in zip(old, counts, strict=True)]
            self._protect(old)
            return out_BHQD
        out_BHQD = torch.empty_like(query_BHQD)
        for i in range(columns):
            active_B = None if valid_BQ is None else valid_BQ[:, i]
            new = query_BHQD[:, :, i], key_BKQD[:, :, i], value_BKQD[:, :, i]
            out_BHQD[:, :, i] = self._decode_active(new, active_B, scaling)
            self._protect(old)
        return out_BHQD

    def _start_turn(self, counts: list[int]) -> list[int]:
        """Make room for a turn of so many tokens, and return the page slots that each row fills without eviction."""
        page_size = self.policy.page_size
        lengths = [length + count for length, count in zip(self._lengths, counts, strict=True)]
        caps = self._caps_of_turn(lengths)
        held = [min(-(-n // page_size), cap) for n, cap in zip(self._lengths, self._caps, strict=True)]
        new = [-(-m // page_size) - -(-n // page_size) for n, m in zip(self._lengths, lengths, strict=True)]
        self._user, self._caps = self._user_after(lengths), caps
        self.store.reserve(max(caps))
        self.store.set_caps(caps)
        self.refresh_compile_marks()
        return [old + more for old, more in zip(held, new, strict=True)]

    def _user_after(self, lengths: list[int]) -> list[UserPages]:
        """Pages of the user when a turn has made the rows as long as this."""
        old = self._lengths or [0] * len(lengths)
        user = self._user or [UserPages()] * len(lengths)
        return [
            pages.and_then(start, length - start, self.policy.page_size)
            for pages, start, length in zip(user, old, lengths, strict=True)
        ]

    def _caps_of_turn(self, lengths: list[int]) -> list[int]:
        """Page slots of each row when a later turn has made it as long as this, if it fits; else `BudgetError`."""
        if needs_budget(self.policy):
            lengths = [pages.count * self.policy.page_size for pages in self._user_after(lengths)]
        return page_caps(self.policy, self.budget, lengths, turns=True)

    def _protect(self, starts: list[int]) -> None:
        """Mark the pages from these positions on as the user's."""
        table = self.store.table
        first_B = torch.tensor(
            [start // self.policy.page_size for start in starts], device=table.now_B.device
        )
        self.store.user_BKP.masked_fill_(table.page_BKP >= first_B[:, None, None], 1)

    # The prompt ---------------------------------------------------------------------------------------------

    def _prefill(
        self,
        query_BHQD: Tensor,
        key_BKQD: Tensor,
        value_BKQD: Tensor,
        valid_BQ: Tensor | None,
        scaling: float,
    ) -> Tensor:
        rows, _, columns, _ = query_BHQD.shape
        read_BQ = query_BHQD.new_ones(rows, columns, dtype=torch.bool) if valid_BQ is None else valid_BQ
        chunks, real_BQ = self._chunks, read_BQ
        if chunks is not None:
            # All columns so far take the place of a whole prompt; only the new ones ask.
            key_BKQD, value_BKQD, real_BQ = chunks.add(key_BKQD, value_BKQD, read_BQ)
        old_B = torch.tensor(self._lengths or [0] * rows, device=real_BQ.device)
        position_BQ = torch.where(real_BQ, old_B[:, None] + real_BQ.cumsum(1) - 1, -1)
        lengths = (old_B + real_BQ.sum(1)).tolist()
        caps = (
            self._caps_of_turn(lengths)
            if self._store is not None
            else page_caps(self.policy, self.budget, lengths)
        )

        keys_BKND, values_BKND, readable_BN = key_BKQD, value_BKQD, real_BQ
        if self._store is not None:
            # Blocks follow each other only where nothing is evicted, so all heads hold the same tokens.
            keys_BKND = torch.cat([self._store.keys_BKSD, key_BKQD], 2)
            values_BKND = torch.cat([self._store.values_BKSD, value_BKQD], 2)
            readable_BN = torch.cat([self._store.table.resident_BKS[:, 0], real_BQ], 1)
        plain = valid_BQ is None and readable_BN.shape[1] == columns
        mask_B1QN = None if plain else causal_mask(readable_BN, columns)
        out_BHQD = kernels.block_attention(query_BHQD, keys_BKND, values_BKND, mask_B1QN, scaling)
        mass_BKN = None
        if "prompt_mass" in self.policy.needs:
            mask = causal_mask(readable_BN, columns) if mask_B1QN is None else mask_B1QN
            mass_BKN = kernels.column_mass(query_BHQD, keys_BKND, mask, read_BQ, scaling)
            mass_BKN = chunks.add_mass(mass_BKN) if chunks else mass_BKN

        if chunks is None or chunks.complete:
            self._chunks = None
            self._admit(key_BKQD, value_BKQD, position_BQ, lengths, caps, mass_BKN)
        return out_BHQD

    def _admit(
        self,
        key_BKQD: Tensor,
        value_BKQD: Tensor,
        position_BQ: Tensor,
        lengths: list[int],
        caps: list[int],
        mass_BKN: Tensor | None,
    ) -> None:
        """Put the prompt into slots; from here on the block is part of the cache."""
        pages = -(-max(lengths) // self.policy.page_size) if grows(self.policy) else max(caps)
        if self._store is None:
            self._store = SlotStore(self.policy, key_BKQD, caps, pages, self.kv_dtype)
        old_slots = self._store.table.position_BKS.shape[-1] if self._lengths else 0
        self._store.reserve(pages)
        self._store.set_caps(caps)
        table = self._store.table
        table.now_B.copy_(torch.tensor(lengths))
        if not self._lengths:
            table.prompt_B.copy_(table.now_B)
        mass_BKQ = None if mass_BKN is None else mass_BKN[..., old_slots:]
        kept_BKQ = None
        if isinstance(self.policy, TrimsPrompt):
            kept_BKQ = self.policy.trim(position_BQ, table.now_B, table.cap_B, mass_BKQ)
        source_BKS = self._store.fill(key_BKQD, value_BKQD, position_BQ, kept_BKQ)
        mass_BKS = None
        if mass_BKN is not None and mass_BKQ is not None:
            mass_BKS = torch.where(source_BKS >= 0, mass_BKQ.gather(2, source_BKS.clamp(min=0)), 0)
            mass_BKS[..., :old_slots] += mass_BKN[..., :old_slots]
        self._protect(self._lengths or [0] * len(lengths))
        self.policy.admit(table, mass_BKS)
        self._user = self._user_after(lengths)
        self._lengths, self._caps = lengths, caps
        if isinstance(self.policy, ShiftsKeys) and self.policy.shifted_tokens():
            count = self.policy.shifted_tokens()
            self._store.shifted_BKND = self._store.keys_BKSD[:, :, :count].clone()
            self._store.inv_freq_D = self._checked_frequencies().to(key_BKQD.device)

    def _checked_frequencies(self) -> Tensor:
        if self._inv_freq_D is None:
            raise UnsupportedModelError(
                f"policy {policy_spec(self.policy)!r} turns keys inside the cache and needs the model's RoPE "
                "frequencies, which this model does not offer; use streaming_llm:positions=logical"
            )
        return self._inv_freq_D

    # One token ----------------------------------------------------------------------------------------------

    def _decode_active(self, new: QKV, active_B: Tensor | None, scaling: float) -> Tensor:
        """Decode step in which only some rows take part; the others stay as they are."""
        if active_B is None or bool(active_B.all()):
            return self._decode(new, scaling)
        self._reserve(max(self._lengths) + 1)
        idle = (~active_B).nonzero().flatten()
        kept = [tensor[idle] for tensor in self.store.tensors()]
        lengths = list(self._lengths)
        out_BHD = self._decode(new, scaling)
        for tensor, rows in zip(self.store.tensors(), kept, strict=True):
            tensor[idle] = rows
        for row in idle.tolist():
            self._lengths[row] = lengths[row]
        return out_BHD

    def _decode(self, new: QKV, scaling: float) -> Tensor:
        evicts = self.begin_step()
        if evicts is not None:
            self.open_pages(evicts=evicts)
        return self.step(new, scaling)

    def begin_step(self) -> bool | None:
        """Count a new token for every row, on the host alone: nothing waits for the device.

        Returns
        -------
        bool or None
            None if no row opens a page; else whether one of them may have to evict another.
        """
        page_size, lengths = self.policy.page_size, self._lengths
        self._lengths = [length + 1 for length in lengths]
        if all(length % page_size for length in lengths):
            return None
        self._reserve(max(self._lengths))
        pages = (length // page_size + 1 for length in lengths)
        return not grows(self.policy) and any(page > cap for page, cap in zip(pages, self._caps, strict=True))

    def prepare_compile(self) -> None:
        """Tell the compiler which sizes differ between caches of the same policy and budget, and what stays put."""
        self._prepared = True
        for tensor in self.store.tensors():
            if tensor.device.type == "cuda":
                torch._dynamo.mark_static_address(tensor)
            varies = grows(self.policy) or self.budget is None or self.budget.decode_budget is not None
            if varies and tensor.ndim > 2 and tensor is not self.store.shifted_BKND:
                torch._dynamo.maybe_mark_dynamic(tensor, 2)

    def refresh_compile_marks(self) -> None:
        """Tell the compiler again, since tensors were replaced."""
        if self._prepared:
            self.prepare_compile()

    def open_pages(self, *, evicts: bool) -> None:
        """Open pages where the step that has begun needs them: tensors alone, for a compiler."""
        open_pages(self.policy, self.store, evicts=evicts)

    def step(self, new: QKV, scaling: float) -> Tensor:
        """Take in the token of the step that has begun, and return its attention output: tensors alone."""
        if self.fused is not None and self.fused.serves(self.store):
            return self.fused.step(self.store, new, scaling)
        return decode_step(self.policy, self.store, new, scaling, self._read)

    def _reserve(self, tokens: int) -> None:
        """Have slots for so many tokens, where the cache grows."""
        needed = -(-tokens // self.policy.page_size)
        if grows(self.policy) and needed > self.store.pages:
            # A quarter more, and at most 1024 tokens, of which each step reads all: the copy in between is not felt.
            self.store.reserve(needed + min(self.store.pages // 4, 1024 // self.policy.page_size))
            self.refresh_compile_marks()
