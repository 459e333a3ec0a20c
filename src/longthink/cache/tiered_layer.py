"""`TieredCache`: the cache of one attention layer in which pages are packed when they leave a window.

The budget counts tokens in the format of the pages in full. Their bytes, less the pages in full and the order of the
channels, hold as many packed pages as fit, steps and minima included.

Shape suffixes: B batch rows, K KV heads, Q new tokens, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from longthink.cache.layer import LayerCache
from longthink.cache.rows import RowCounts
from longthink.cache.step import Read
from longthink.cache.tiered_store import TieredStore, open_tiered_pages, pages_that_stay, read_tiers
from longthink.config import Budget, KvBits
from longthink.errors import BudgetError, UnsupportedFeatureError, UnsupportedModelError
from longthink.kernels import PLAIN, LogitRule, packing
from longthink.kernels.reference import wide_dtype
from longthink.kernels.rotation import Rotation
from longthink.policies import Policy, RanksPages, SavesTokens, grows, policy_spec, with_page_size


class TieredRows(RowCounts):
    """Counts of rows whose caps are page slots of both kinds.

    Parameters
    ----------
    policy, budget, kv_bits
        Those of the layer.
    page_bytes
        Bytes of a page in full, of a packed one, and of the order of the channels, for one KV head.
    """

    def __init__(
        self, policy: Policy, budget: Budget | None, kv_bits: KvBits, page_bytes: tuple[int, int, int]
    ) -> None:
        super().__init__(policy, budget)
        self._kv_bits, self._page_bytes = kv_bits, page_bytes
        self._stays = pages_that_stay(policy, kv_bits)

    def full_pages(self, prompt_pages: int) -> int:
        """Slots in full of a row with so many prompt pages."""
        return min(prompt_pages, self._stays) + self._kv_bits.window // self._policy.page_size

    @property
    def needed(self) -> tuple[int, int]:
        """Slots in full, and packed slots, that serve all rows."""
        full = [self.full_pages(prompt.count) for prompt in self.prompts]
        held = self.caps
        if grows(self._policy):
            held = [-(-length // self._policy.page_size) for length in self.lengths]
        # A row that has few prompt pages in full may need more packed ones. A size of 1 compiles to another program.
        least = 2 if grows(self._policy) else 1
        return max(full), max(least, *(pages - own for pages, own in zip(held, full, strict=True)))

    @override
    def page_caps(self, lengths: list[int], *, turns: bool = False) -> list[int]:
        policy, budget = self._policy, self._budget
        if budget is None or grows(policy):
            return super().page_caps(lengths, turns=turns)
        return [self._cap(budget, length, "prompts" if turns else "a prompt") for length in lengths]

    def _cap(self, budget: Budget, length: int, what: str) -> int:
        page_size, (in_full, packed, order) = self._policy.page_size, self._page_bytes
        total, prompt_pages = budget.pages(length, page_size), -(-length // page_size)
        full = self.full_pages(prompt_pages)
        cap = full + max(0, (total - full) * in_full - order) // packed
        required = max(self._policy.required_pages(length), full + 1)
        if cap < required:
            least = full + -(-((required - full) * packed + order) // in_full)
            short = (least - total) * page_size
            given = budget.decode_budget if budget.budget is None else budget.budget
            name = "budget" if budget.budget is not None else "decode_budget"
            raise BudgetError(
                f"{budget} holds {cap} pages of {page_size} tokens with kv_bits={self._kv_bits}, but policy "
                f"{policy_spec(self._policy)!r} needs {required} for {what} of {length} tokens and a window of "
                f"{self._kv_bits.window}. Give {name} >= {(given or 0) + short}, or a smaller window"
            )
        return cap


class TieredCache(LayerCache):
    """`LayerCache` whose pages are packed when they leave a window of recent ones.

    A later turn is read token by token: pages are packed meanwhile.

    Parameters
    ----------
    policy
        With pages of ``kv_bits.page`` tokens: see `with_pages`.
    kv_bits
        Bits, window, and whether the prompt is packed too.
    head_dim, dtype
        Those of the keys, as the cache keeps them in full.
    budget, rotation, query_means_N, kv_dtype
        As for `LayerCache`.

    Raises
    ------
    UnsupportedFeatureError
        If the policy moves single tokens and cannot rank pages.
    """

    _read: Read = staticmethod(read_tiers)
    _reads_blocks = False

    def __init__(
        self,
        policy: Policy,
        budget: Budget | None = None,
        *,
        kv_bits: KvBits,
        head_dim: int,
        dtype: torch.dtype,
        rotation: Rotation | None = None,
        query_means_N: Tensor | None = None,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        if isinstance(policy, SavesTokens) and not isinstance(policy, RanksPages):
            raise UnsupportedFeatureError(
                f"policy {policy_spec(policy)!r} moves single tokens, and kv_bits={kv_bits} packs whole pages: "
                "choose another policy, or give it `page_worth` (RanksPages)"
            )
        self.kv_bits = kv_bits
        in_full = policy.page_size * 2 * head_dim * dtype.itemsize
        packed = packing.page_bytes(policy.page_size, head_dim, kv_bits.keys, kv_bits.values)
        self._page_bytes = in_full, packed, packing.order_bytes(head_dim)
        super().__init__(policy, budget, rotation=rotation, query_means_N=query_means_N, kv_dtype=kv_dtype)

    @override
    def reset(self) -> None:
        super().reset()
        assert self.kv_bits is not None
        self.rows = TieredRows(self.policy, self.budget, self.kv_bits, self._page_bytes)

    @property
    def tiers(self) -> TieredStore:
        """The slots; only after prefill."""
        assert isinstance(self._store, TieredStore)
        return self._store

    @property
    @override
    def kv_bytes(self) -> int:
        chunks = self._chunks.nbytes if self._chunks else 0
        return chunks + (0 if self._store is None else self.tiers.kv_bytes)

    @property
    @override
    def metadata_bytes(self) -> int:
        if self._store is None:
            return 0
        return sum(tensor.nbytes for tensor in self._store.tensors()) - self.tiers.kv_bytes

    @override
    def row_held_kv_bytes(self, row: int) -> int:
        tokens, heads = self.tiers.keys_BKSD.shape[2], self.tiers.keys_BKSD.shape[1]
        resident_KS = self.tiers.table.resident_BKS[row]
        in_full = resident_KS[:, :tokens].sum() * 2 * self.tiers.keys_BKSD[0, 0, 0].nbytes
        pages = resident_KS[:, tokens:].unflatten(-1, (-1, self.policy.page_size)).any(-1).sum()
        packed = pages * self._page_bytes[1]
        return int(in_full + packed) * heads // len(resident_KS) + self._page_bytes[2] * heads

    @property
    @override
    def sizes(self) -> tuple[torch.Size, int]:
        store = self.tiers
        return torch.Size([*store.keys_BKSD.shape, store.packed_pages]), store.table.cap

    @override
    def release(self) -> None:
        if self._store is None:
            return
        full, packed = self._needed
        # A cache that grows keeps spare slots, or the next page would copy it again.
        self.tiers.shrink(full, packed + packed // 2 if grows(self.policy) else packed)
        self.refresh_compile_marks()

    @override
    def attend(
        self, query_BHQD: Tensor, key_BKQD: Tensor, value_BKQD: Tensor, valid_BQ: Tensor | None = None,
        scaling: float | None = None, rule: LogitRule = PLAIN,
    ) -> Tensor:  # fmt: skip
        """As for `LayerCache`; `UnsupportedModelError` for attention that packed pages are not read with."""
        if not rule.is_plain or value_BKQD.shape[3] != key_BKQD.shape[3]:
            raise UnsupportedModelError(
                f"kv_bits={self.kv_bits} cannot be used with this model: its attention has sinks, soft-capping or "
                f"values of another head dim ({value_BKQD.shape[3]}) than the keys ({key_BKQD.shape[3]})"
            )
        return super().attend(query_BHQD, key_BKQD, value_BKQD, valid_BQ, scaling, rule)

    @override
    def open_pages(self, *, evicts: bool) -> None:
        open_tiered_pages(self.policy, self.tiers, evicts=evicts)

    @property
    def _needed(self) -> tuple[int, int]:
        assert isinstance(self.rows, TieredRows)
        return self.rows.needed

    @override
    def _see_prompt(self, query_BHQD: Tensor, key_BKQD: Tensor, read_BQ: Tensor, real_BQ: Tensor) -> None:
        if self._store is not None:
            return
        queries = query_BHQD.to(wide_dtype(query_BHQD.dtype)).masked_fill(~read_BQ[:, None, :, None], 0)
        squares_BKD = queries.square().sum(2).unflatten(1, (key_BKQD.shape[1], -1)).sum(2)
        if self._chunks is not None:
            squares_BKD = self._chunks.total("squares", squares_BKD)
        if self._chunks is None or self._chunks.complete:
            self._order_BKD = packing.order_channels(key_BKQD, real_BQ, squares_BKD)

    @override
    def _make_room(self, key_BKQD: Tensor, value_BKQD: Tensor) -> None:
        full, packed = self._needed
        caps = self.rows.caps
        if self._store is None:
            assert self.kv_bits is not None
            form = self.kv_bits, self._order_BKD, self.kv_dtype
            self._store = TieredStore(self.policy, key_BKQD, caps, full, packed, *form)
        store = self.tiers
        store.resize(max(full, store.full_pages), max(packed, store.packed_pages))
        store.set_caps(caps)

    @override
    def _reserve(self, tokens: int) -> None:
        if not grows(self.policy):
            return
        assert isinstance(self.rows, TieredRows)
        store, rows = self.tiers, self.rows
        least_full = min(rows.full_pages(prompt.count) for prompt in rows.prompts)
        needed = -(-tokens // self.policy.page_size) - least_full
        if needed > store.packed_pages:
            spare = min(store.packed_pages // 4, 1024 // self.policy.page_size)
            store.resize(store.full_pages, needed + spare)
            self.refresh_compile_marks()


def with_pages(policy: Policy, kv_bits: KvBits) -> Policy:
    """The policy with pages of as many tokens as are packed together.

    Raises
    ------
    UnsupportedFeatureError
        If it keeps single tokens.
    """
    try:
        return with_page_size(policy, kv_bits.page)
    except ValueError as error:
        raise UnsupportedFeatureError(
            f"policy {policy_spec(policy)!r} keeps single tokens, and kv_bits={kv_bits} packs pages of "
            f"{kv_bits.page}: choose a policy of pages, such as recall, raas or recency"
        ) from error
