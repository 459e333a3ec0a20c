"""Page slots of one layer: the only memory for keys and values.

Shape suffixes: B batch rows, K KV heads (1 in tables that a whole layer shares), P page slots, T tokens in a page,
S = P * T token slots, D head dim (keys and values may differ in it), Q columns of a prompt block, M tokens moved,
R pages read, N first token slots, or numbers in a row.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy

import torch
from torch import Tensor
from torch.nn.functional import pad

from longthink import kernels
from longthink.errors import UnsupportedModelError
from longthink.kernels import PLAIN, At, LogitRule, entries
from longthink.kernels.rotation import Rotation
from longthink.policies import Moves, PageTable, Policy, Shape, ShiftsKeys, page_tables, policy_spec

_OF_STORE = ("keys_BKSD", "values_BKSD", "tail_BK", "kmin_BKPD", "kmax_BKPD")
_OF_TABLE = ("position_BKS", "now_B", "prompt_B", "cap_B", "user_BKP")
_MEANS = "query_means_BN"
_STATE = "state."


class SlotStore:
    """Keys, values and page table of one layer, in slots that are overwritten in place.

    Parameters
    ----------
    policy
        Determines the number of page tables, their state and what the policy sees.
    key_BKQD
        Any keys of the layer: they determine rows, KV heads, head dim, dtype and device.
    cap_B
        Page slots that each row may fill or read.
    pages
        Page slots to allocate.
    dtype
        Dtype of keys and values; None for that of `key_BKQD`.
    value_dim
        Head dim of the values; None for that of the keys.
    rule
        What the layer does with its logits.
    """

    def __init__(
        self,
        policy: Policy,
        key_BKQD: Tensor,
        cap_B: list[int],
        pages: int,
        dtype: torch.dtype | None = None,
        value_dim: int | None = None,
        rule: LogitRule = PLAIN,
    ) -> None:
        key_BKQD = key_BKQD[:, :, :0].to(dtype or key_BKQD.dtype)
        rows, kv_heads, _, head_dim = key_BKQD.shape
        tables, tokens, device = page_tables(policy, kv_heads), pages * policy.page_size, key_BKQD.device
        self.tail_BK = torch.zeros(rows, tables, dtype=torch.int64, device=device)
        self.keys_BKSD = key_BKQD.new_zeros(rows, kv_heads, tokens, head_dim)
        self.values_BKSD = key_BKQD.new_zeros(rows, kv_heads, tokens, value_dim or head_dim)
        self.rule = rule
        # Read once: the compiler need not trace a subclass's property.
        self.needs = policy.needs
        bounded = pages if "key_bounds" in self.needs else 0
        self.kmin_BKPD = key_BKQD.new_zeros(rows, kv_heads, bounded, head_dim)
        self.kmax_BKPD = key_BKQD.new_zeros(rows, kv_heads, bounded, head_dim)
        self.shifted_BKND: Tensor | None = None
        """The first keys as written, where the policy shifts them (`ShiftsKeys`)."""
        self.rotation: Rotation | None = None
        self.table = PageTable(
            page_size=policy.page_size,
            position_BKS=torch.full((rows, tables, tokens), -1, dtype=torch.int32, device=device),
            now_B=torch.zeros(rows, dtype=torch.int64, device=device),
            prompt_B=torch.zeros(rows, dtype=torch.int64, device=device),
            cap_B=torch.tensor(cap_B, dtype=torch.int64, device=device),
            cap=max(cap_B),
            state=policy.init_state(Shape(rows, tables, pages, policy.page_size), device),
            user_BKP=torch.zeros(rows, tables, pages, dtype=torch.int8, device=device),
        )
        self._expose_needs()

    def _expose_needs(self) -> None:
        self.table.vectors = (self.keys_BKSD, self.values_BKSD) if "vectors" in self.needs else None
        self.table.key_bounds = (self.kmin_BKPD, self.kmax_BKPD) if self.has_key_bounds else None

    @property
    def has_key_bounds(self) -> bool:
        return self.kmin_BKPD.shape[2] > 0

    @property
    def user_BKP(self) -> Tensor:
        """Pages that hold a token of a prompt: see `PageTable`."""
        assert self.table.user_BKP is not None
        return self.table.user_BKP

    @property
    def pages(self) -> int:
        """Number of allocated page slots."""
        return self.table.position_BKS.shape[-1] // self.table.page_size

    def set_caps(self, cap_B: list[int]) -> None:
        """Set the page slots that each row may fill or read."""
        self.table.cap_B.copy_(torch.tensor(cap_B))
        self.table.cap = max(cap_B)

    # The whole store ----------------------------------------------------------------------------------------

    def apply(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor by ``change(tensor)``."""
        state = {}
        for name, tensor in self.named_tensors().items():
            if name.startswith(_STATE):
                state[name.removeprefix(_STATE)] = change(tensor)
            else:
                setattr(self.table if name in (*_OF_TABLE, _MEANS) else self, name, change(tensor))
        self.table.state = state
        self._expose_needs()

    def tensors(self) -> list[Tensor]:
        """All tensors, keys and values first."""
        return list(self.named_tensors().values())

    def named_tensors(self) -> dict[str, Tensor]:
        """All tensors by name, keys and values first; dimension 0 counts rows."""
        named = {name: getattr(self, name) for name in _OF_STORE}
        named |= {name: getattr(self.table, name) for name in _OF_TABLE}
        named |= {_STATE + name: tensor for name, tensor in self.table.state.items()}
        more = {"shifted_BKND": self.shifted_BKND, _MEANS: self.table.query_means_BN}
        return named | {name: tensor for name, tensor in more.items() if tensor is not None}

    def mark_for_compiler(self, *, varies: bool) -> None:
        """Mark static addresses, and where it `varies` the number of slots, for the compiler."""
        for tensor in self.tensors():
            if tensor.device.type == "cuda":
                torch._dynamo.mark_static_address(tensor)
            if varies and tensor.ndim > 2 and tensor is not self.shifted_BKND:
                torch._dynamo.maybe_mark_dynamic(tensor, 2)

    def reserve(self, pages: int) -> None:
        """Grow to at least this many page slots; existing ones keep their place."""
        more = pages - self.pages
        if more <= 0:
            return
        table, tokens, old_pages = self.table, more * self.table.page_size, self.pages
        self.keys_BKSD = pad(self.keys_BKSD, (0, 0, 0, tokens))
        self.values_BKSD = pad(self.values_BKSD, (0, 0, 0, tokens))
        if self.has_key_bounds:
            self.kmin_BKPD = pad(self.kmin_BKPD, (0, 0, 0, more))
            self.kmax_BKPD = pad(self.kmax_BKPD, (0, 0, 0, more))
        table.position_BKS = pad(table.position_BKS, (0, tokens), value=-1)
        table.user_BKP = pad(self.user_BKP, (0, more))
        for name, tensor in table.state.items():
            grown = tensor.new_zeros(
                *tensor.shape[:2], tensor.shape[2] // old_pages * pages, *tensor.shape[3:]
            )
            grown[:, :, : tensor.shape[2]] = tensor
            table.state[name] = grown
        self._expose_needs()

    def release(self, pages: int) -> None:
        """Free the page slots behind the first `pages`, as far as they are empty in all rows."""
        old_pages = self.pages
        if pages >= old_pages:
            return
        # After a rewind the last slots may be in use, and others free.
        filled_P = (self.table.page_BKP >= 0).flatten(0, 1).any(0)
        end_P = torch.arange(1, old_pages + 1, device=filled_P.device)
        pages = max(pages, int((end_P * filled_P).max()))

        def shorten(tensor: Tensor) -> Tensor:
            if tensor.ndim <= 2 or tensor is self.shifted_BKND:
                return tensor
            # A view would keep the memory.
            return tensor[:, :, : tensor.shape[2] // old_pages * pages].clone()

        self.apply(shorten)

    def only(self, row: int) -> SlotStore:
        """A copy of one row alone."""
        store = copy(self)
        store.table = copy(self.table)
        store.apply(lambda tensor: tensor[row : row + 1].clone())
        return store

    def adopt(self, row: int, other: SlotStore, other_row: int = 0) -> None:
        """Overwrite a row with a row of another store of the same policy."""
        self.reserve(other.pages)
        for mine, theirs in zip(self.tensors(), other.tensors(), strict=True):
            if mine.ndim > 2:
                mine[row] = -1 if mine is self.table.position_BKS else 0
                mine[row, :, : theirs.shape[2]] = theirs[other_row]
            else:
                mine[row] = theirs[other_row]

    def keep_shifted(self, policy: Policy, rotation: Rotation | None) -> None:
        """Keep the first keys as written, where the policy shifts them.

        Raises
        ------
        UnsupportedModelError
            If it does, and the rotation is not known.
        """
        count = policy.shifted_tokens() if isinstance(policy, ShiftsKeys) else 0
        if not count:
            return
        if rotation is None:
            raise UnsupportedModelError(
                f"policy {policy_spec(policy)!r} shifts keys: it needs the model's RoPE, as rotation=..."
            )
        self.shifted_BKND = self.keys_BKSD[:, :, :count].clone()
        self.rotation = rotation.to(self.keys_BKSD.device)

    def keep_query_stats(self, means_BN: Tensor, rotation: Rotation | None) -> None:
        """Keep what a policy that needs "query_stats" reads: means over the queries of each row's first prompt."""
        assert rotation is not None
        self.table.query_means_BN, self.table.key_rotation = means_BN, rotation.to(means_BN.device)

    # Prefill ------------------------------------------------------------------------------------------------

    def fill(
        self, key_BKQD: Tensor, value_BKQD: Tensor, position_BQ: Tensor, kept_BKQ: Tensor | None
    ) -> Tensor:
        """Write a block of prompt tokens to the slots, pages in order of position.

        Parameters
        ----------
        position_BQ
            Logical position of each column, -1 for padding.
        kept_BKQ
            Columns to keep, in whole pages; None for all.

        Returns
        -------
        Tensor
            Source column of each token slot, -1 where nothing was written, BKS.
        """
        table, page_size = self.table, self.table.page_size
        real_B1Q = (position_BQ >= 0)[:, None]
        if kept_BKQ is None:
            kept_BKQ, slot_BKQ = real_B1Q, position_BQ[:, None]
        else:
            # Kept pages are packed: the slot of a page is the number of kept pages before it.
            offset = position_BQ[:, None] % page_size
            slot_BKQ = ((kept_BKQ & (offset == 0)).cumsum(-1) - 1) * page_size + offset
        tables, tokens = table.position_BKS.shape[1:]
        shape = (len(position_BQ), tables, position_BQ.shape[1])
        # Columns that are not kept go to an extra slot.
        slot_BKQ = torch.where(kept_BKQ, slot_BKQ, tokens).expand(shape)
        columns = torch.arange(shape[2], device=key_BKQD.device).expand(shape)
        source_BKS = torch.full((*shape[:2], tokens + 1), -1, device=key_BKQD.device)
        source_BKS = source_BKS.scatter_(2, slot_BKQ, columns)[..., :-1]

        filled_BKS, column_BKS = source_BKS >= 0, source_BKS.clamp(min=0)
        position = position_BQ[:, None].expand(shape).gather(2, column_BKS).to(torch.int32)
        table.position_BKS.copy_(torch.where(filled_BKS, position, table.position_BKS))
        for slots, block in ((self.keys_BKSD, key_BKQD), (self.values_BKSD, value_BKQD)):
            index = column_BKS[..., None].expand(-1, block.shape[1], -1, block.shape[3])
            slots.copy_(torch.where(filled_BKS[..., None], block.gather(2, index), slots))
        self.compute_key_bounds()
        self.tail_BK.copy_(table.page_BKP.argmax(-1))
        return source_BKS

    def compute_key_bounds(self) -> None:
        """Compute the key bounds of all pages from their keys."""
        if not self.has_key_bounds:
            return
        table = self.table
        keys = self.keys_BKSD.unflatten(2, (-1, table.page_size))
        resident = table.resident_BKS.unflatten(-1, (-1, table.page_size))[..., None]
        empty = ~resident.any(-2)
        for bound, extreme, neutral in (
            (self.kmin_BKPD, torch.amin, torch.inf),
            (self.kmax_BKPD, torch.amax, -torch.inf),
        ):
            found = extreme(torch.where(resident, keys, neutral), -2)
            bound.copy_(found.masked_fill(empty, 0))

    def mark_prompt(self, starts: list[int]) -> None:
        """Mark the pages from these positions on as pages of a prompt, where a row has tokens behind them."""
        table = self.table
        start_B11 = torch.tensor(starts, device=table.now_B.device)[:, None, None]
        written_B11 = table.now_B[:, None, None] > start_B11
        self.user_BKP.masked_fill_((table.page_BKP >= start_B11 // table.page_size) & written_B11, 1)

    def truncate(self, lengths: list[int]) -> None:
        """Drop the tokens from these positions on, and make the page of the next token the tail."""
        table, page_size = self.table, self.table.page_size
        length_B11 = torch.tensor(lengths, device=table.now_B.device)[:, None, None]
        shorter_B11 = length_B11 < table.now_B[:, None, None]
        if self.shifted_BKND is not None:
            # A row cut inside its first tokens takes them for the keys as written again.
            first_BKND = self.keys_BKSD[:, :, : self.shifted_BKND.shape[2]]
            first_BKND.copy_(torch.where(shorter_B11[..., None], self.shifted_BKND, first_BKND))
        dropped_BKS = table.position_BKS >= length_B11
        table.position_BKS.masked_fill_(dropped_BKS, -1)
        page_BKP = table.page_BKP
        # The next token may be written to a slot without opening its page.
        for tensor in (self.keys_BKSD, self.values_BKSD, self.user_BKP, *table.state.values()):
            gone = page_BKP < 0 if tensor.shape[2] == self.pages else dropped_BKS
            tensor.masked_fill_(gone.reshape(*gone.shape, *[1] * (tensor.ndim - 3)), 0)
        self.compute_key_bounds()
        table.now_B.copy_(length_B11[:, 0, 0])
        # A slot of tokens that were moved there may have the same number, so every token must stand in its place.
        position_BKPT = table.position_BKS.unflatten(-1, (-1, page_size))
        next_B11 = length_B11 // page_size
        place_B11T = (next_B11 * page_size)[..., None] + torch.arange(page_size, device=page_BKP.device)
        in_place_BKPT = (position_BKPT < 0) | (position_BKPT == place_B11T)
        tail_BKP = (page_BKP == next_B11) & in_place_BKPT.all(-1)
        tail_BK = torch.where(tail_BKP.any(-1), tail_BKP.int().argmax(-1), (page_BKP < 0).int().argmax(-1))
        self.tail_BK.copy_(torch.where(shorter_B11[..., 0], tail_BK, self.tail_BK))
        if self.has_key_bounds:
            # A tail whose first tokens are gone begins with neutral bounds, as if the next token were its first.
            fresh_BK = shorter_B11[..., 0] & ~tail_BKP.any(-1)
            page = entries(self.tail_BK[..., None], self.kmin_BKPD)
            for bound, sign in ((self.kmin_BKPD, 1), (self.kmax_BKPD, -1)):
                neutral = sign * torch.finfo(bound.dtype).max / 4
                bound[page] = torch.where(fresh_BK[..., None, None], neutral, bound[page])

    # Decode -------------------------------------------------------------------------------------------------

    def move(self, moves: Moves) -> None:
        """Copy tokens to other slots, with position and token state, and empty their old slots."""
        table = self.table
        tokens = table.position_BKS.shape[-1]
        per_token = [tensor for tensor in table.state.values() if tensor.shape[2] == tokens]

        def carried(tensor: Tensor) -> tuple[Tensor, kernels.Index, kernels.Index]:
            return tensor, entries(moves.source_BKM, tensor), entries(moves.target_BKM, tensor)

        contents = [carried(tensor) for tensor in (self.keys_BKSD, self.values_BKSD, *per_token)]
        kernels.move_tokens(carried(table.position_BKS), contents)

    def open_pages(self, slot_BK: Tensor, opens_B: Tensor) -> None:
        """Where a row opens a page, empty the given slots and make them the tail."""
        table, page_size = self.table, self.table.page_size
        slot_BK = torch.where(opens_B[:, None], slot_BK, self.tail_BK)
        self.tail_BK.copy_(slot_BK)
        within = torch.arange(page_size, device=slot_BK.device)
        tokens_BKT = slot_BK[..., None] * page_size + within

        def opened(tensor: Tensor) -> At:
            per_page = tensor.shape[2] == self.pages
            return At(tensor, entries(slot_BK[..., None] if per_page else tokens_BKT, tensor))

        contents = [
            opened(tensor)
            for tensor in (self.keys_BKSD, self.values_BKSD, self.user_BKP, *table.state.values())
        ]
        kernels.empty(opened(table.position_BKS), contents, opens_B)

    def append(self, key_BKD: Tensor, value_BKD: Tensor) -> None:
        """Write the token at position `now_B` to the tail."""
        table = self.table
        offset_B = table.now_B % table.page_size
        token_BK1 = (self.tail_BK * table.page_size + offset_B[:, None])[..., None]
        key_BK1D, value_BK1D = key_BKD[:, :, None], value_BKD[:, :, None]
        at = entries(token_BK1, self.keys_BKSD)
        kernels.append(At(self.keys_BKSD, at), At(self.values_BKSD, at), key_BK1D, value_BK1D)
        position = table.now_B.to(torch.int32)[:, None, None].expand_as(token_BK1)
        table.position_BKS[entries(token_BK1, table.position_BKS)] = position
        if self.has_key_bounds:
            page = entries(self.tail_BK[..., None], self.kmin_BKPD)
            first = (offset_B == 0)[:, None, None, None]
            kernels.widen(At(self.kmin_BKPD, page), At(self.kmax_BKPD, page), key_BK1D, first)

    def read(self, slot_BKR: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and residency mask of the given page slots; a negative slot reads as empty."""
        table, page_size = self.table, self.table.page_size
        within = torch.arange(page_size, device=slot_BKR.device)
        token_BKS = (slot_BKR.clamp(min=0)[..., None] * page_size + within).flatten(2)
        wanted = (slot_BKR >= 0).repeat_interleave(page_size, -1)
        resident = (table.position_BKS[entries(token_BKS, table.position_BKS)] >= 0) & wanted
        at = entries(token_BKS, self.keys_BKSD)
        return self.keys_BKSD[at], self.values_BKSD[at], resident
