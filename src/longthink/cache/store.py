"""Page slots of one layer: the only place where a token's keys and values can be.

Shape suffixes: B batch rows, K KV heads (1 in tables that a whole layer shares), P page slots, T tokens in a page,
S = P * T token slots, D head dim, Q columns of a prompt block, M tokens moved, R pages read, N sink slots.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from longthink import kernels
from longthink.kernels import Slots, entries
from longthink.policies import Moves, PageTable, Policy, Shape


class SlotStore:
    """Keys, values and page table of one layer, in slots that are overwritten in place.

    Parameters
    ----------
    policy
        Says how many tables the layer has and what state they carry.
    key_BKQD
        Any keys of the layer: they give rows, KV heads, head dim, dtype and device.
    cap_B
        Page slots that each row may fill or read.
    pages
        Page slots to allocate.
    dtype
        Format of keys and values; None for that of the keys.
    """

    def __init__(
        self,
        policy: Policy,
        key_BKQD: Tensor,
        cap_B: list[int],
        pages: int,
        dtype: torch.dtype | None = None,
    ) -> None:
        key_BKQD = key_BKQD[:, :, :0].to(dtype or key_BKQD.dtype)
        rows, kv_heads, _, head_dim = key_BKQD.shape
        tables, tokens, device = policy.tables(kv_heads), pages * policy.page_size, key_BKQD.device
        self.tail_BK = torch.zeros(rows, tables, dtype=torch.int64, device=device)
        representatives = key_BKQD.new_zeros(
            rows, kv_heads, pages if policy.uses_representatives else 0, head_dim
        )
        self.table = PageTable(
            page_size=policy.page_size,
            position_BKS=torch.full((rows, tables, tokens), -1, dtype=torch.int32, device=device),
            keys_BKSD=key_BKQD.new_zeros(rows, kv_heads, tokens, head_dim),
            values_BKSD=key_BKQD.new_zeros(rows, kv_heads, tokens, head_dim),
            now_B=torch.full((rows,), -1, dtype=torch.int64, device=device),
            prompt_B=torch.zeros(rows, dtype=torch.int64, device=device),
            cap_B=torch.tensor(cap_B, dtype=torch.int64, device=device),
            cap=max(cap_B),
            kmin_BKPD=representatives,
            kmax_BKPD=representatives.clone(),
            state=policy.init_state(Shape(rows, tables, pages, policy.page_size), device),
        )
        self.sinks_BKND: Tensor | None = None
        """The first keys as they came, where the policy turns them (`Policy.key_shift`)."""
        self.inv_freq_D: Tensor | None = None

    @property
    def keys_BKSD(self) -> Tensor:
        """Keys in the token slots."""
        return self.table.keys_BKSD

    @property
    def values_BKSD(self) -> Tensor:
        """Values in the token slots."""
        return self.table.values_BKSD

    @property
    def slots(self) -> Slots:
        """The slots as the fused kernels take them."""
        table = self.table
        bounds = (table.kmin_BKPD, table.kmax_BKPD) if table.kmin_BKPD.shape[2] else (None, None)
        held = (self.keys_BKSD, self.values_BKSD, table.position_BKS, self.tail_BK, table.now_B)
        return Slots(*held, table.page_size, *bounds)

    @property
    def pages(self) -> int:
        """Page slots allocated."""
        return self.table.position_BKS.shape[-1] // self.table.page_size

    def set_caps(self, cap_B: list[int]) -> None:
        """Set how many page slots each row may fill or read."""
        self.table.cap_B.copy_(torch.tensor(cap_B))
        self.table.cap = max(cap_B)

    # Whole-store operations -----------------------------------------------------------------------------------

    def apply(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor, of which dimension 0 counts rows, by what `change` makes of it."""
        table = self.table
        for field in ("keys_BKSD", "values_BKSD"):
            setattr(table, field, change(getattr(table, field)))
        self.tail_BK = change(self.tail_BK)
        for field in ("position_BKS", "now_B", "prompt_B", "cap_B", "kmin_BKPD", "kmax_BKPD"):
            setattr(table, field, change(getattr(table, field)))
        table.state = {name: change(tensor) for name, tensor in table.state.items()}
        if self.sinks_BKND is not None:
            self.sinks_BKND = change(self.sinks_BKND)

    def tensors(self) -> list[Tensor]:
        """Every tensor of the store, keys and values first."""
        found: list[Tensor] = []

        def collect(tensor: Tensor) -> Tensor:
            found.append(tensor)
            return tensor

        self.apply(collect)
        return found

    def reserve(self, pages: int) -> None:
        """Have at least this many page slots; old ones keep their place."""
        more = pages - self.pages
        if more <= 0:
            return
        table, tokens = self.table, more * self.table.page_size
        table.keys_BKSD = pad(table.keys_BKSD, (0, 0, 0, tokens))
        table.values_BKSD = pad(table.values_BKSD, (0, 0, 0, tokens))
        old_pages = self.pages
        table.position_BKS = pad(table.position_BKS, (0, tokens), value=-1)
        if table.kmin_BKPD.shape[2]:
            table.kmin_BKPD = pad(table.kmin_BKPD, (0, 0, 0, more))
            table.kmax_BKPD = pad(table.kmax_BKPD, (0, 0, 0, more))
        for name, tensor in table.state.items():
            grown = tensor.new_zeros(
                *tensor.shape[:2], tensor.shape[2] // old_pages * pages, *tensor.shape[3:]
            )
            grown[:, :, : tensor.shape[2]] = tensor
            table.state[name] = grown

    def release(self, pages: int) -> None:
        """Give back the page slots behind the first `pages`, which must be empty in all rows."""
        old_pages = self.pages
        if pages >= old_pages:
            return

        def shorten(tensor: Tensor) -> Tensor:
            if tensor.ndim <= 2 or tensor is self.sinks_BKND:
                return tensor
            # A copy, because a view would keep the memory.
            return tensor[:, :, : tensor.shape[2] // old_pages * pages].clone()

        self.apply(shorten)

    def adopt(self, row: int, other: SlotStore, other_row: int = 0) -> None:
        """Make a row what a row of another store of the same policy is, in every slot."""
        self.reserve(other.pages)
        for mine, theirs in zip(self.tensors(), other.tensors(), strict=True):
            if mine.ndim > 2:
                mine[row] = -1 if mine is self.table.position_BKS else 0
                mine[row, :, : theirs.shape[2]] = theirs[other_row]
            else:
                mine[row] = theirs[other_row]

    # The prompt ---------------------------------------------------------------------------------------------

    def fill(
        self, key_BKQD: Tensor, value_BKQD: Tensor, position_BQ: Tensor, kept_BKQ: Tensor | None
    ) -> Tensor:
        """Write a block of prompt tokens into the slots, pages in order of position.

        Parameters
        ----------
        position_BQ
            Logical position of each column, -1 for padding.
        kept_BKQ
            Columns to keep, in whole pages; None for all.

        Returns
        -------
        Tensor
            Column that each token slot took its token from, -1 where it took none, BKS.
        """
        table, page_size = self.table, self.table.page_size
        real_B1Q = (position_BQ >= 0)[:, None]
        if kept_BKQ is None:
            kept_BKQ, slot_BKQ = real_B1Q, position_BQ[:, None]
        else:
            # Kept pages close ranks: a page's slot is the number of kept pages before it.
            offset = position_BQ[:, None] % page_size
            slot_BKQ = ((kept_BKQ & (offset == 0)).cumsum(-1) - 1) * page_size + offset
        tables, tokens = table.position_BKS.shape[1:]
        shape = (len(position_BQ), tables, position_BQ.shape[1])
        # One slot too many takes the columns that are not kept.
        slot_BKQ = torch.where(kept_BKQ, slot_BKQ, tokens).expand(shape)
        columns = torch.arange(shape[2], device=key_BKQD.device).expand(shape)
        source_BKS = torch.full((*shape[:2], tokens + 1), -1, device=key_BKQD.device)
        source_BKS = source_BKS.scatter_(2, slot_BKQ, columns)[..., :-1]

        filled_BKS, column_BKS = source_BKS >= 0, source_BKS.clamp(min=0)
        position = position_BQ[:, None].expand(shape).gather(2, column_BKS).to(torch.int32)
        table.position_BKS.copy_(torch.where(filled_BKS, position, table.position_BKS))
        index = column_BKS[..., None].expand(-1, key_BKQD.shape[1], -1, key_BKQD.shape[3])
        self.keys_BKSD.copy_(torch.where(filled_BKS[..., None], key_BKQD.gather(2, index), self.keys_BKSD))
        self.values_BKSD.copy_(
            torch.where(filled_BKS[..., None], value_BKQD.gather(2, index), self.values_BKSD)
        )
        self._represent()
        self.tail_BK.copy_(table.page_BKP.argmax(-1))
        return source_BKS

    def _represent(self) -> None:
        """Take the representatives of all pages from their keys."""
        table = self.table
        if not table.kmin_BKPD.shape[2]:
            return
        keys = self.keys_BKSD.unflatten(2, (-1, table.page_size))
        resident = table.resident_BKS.unflatten(-1, (-1, table.page_size))[..., None]
        empty = ~resident.any(-2)
        for representative, extreme, neutral in (
            (table.kmin_BKPD, torch.amin, torch.inf),
            (table.kmax_BKPD, torch.amax, -torch.inf),
        ):
            found = extreme(torch.where(resident, keys, neutral), -2)
            representative.copy_(found.masked_fill(empty, 0))

    # One token ----------------------------------------------------------------------------------------------

    def move(self, moves: Moves) -> None:
        """Carry tokens to other slots, with position and token state; then empty the slots they came from."""
        table = self.table
        tokens = table.position_BKS.shape[-1]
        states = [tensor for tensor in table.state.values() if tensor.shape[2] == tokens]
        # The kernel takes one state of one number a token, which is all that a policy of ours has.
        first = states.pop() if states and states[-1].ndim == 3 else None
        for tensor in states:
            tensor[entries(moves.target_BKM, tensor)] = tensor[entries(moves.source_BKM, tensor)]
        kernels.move_tokens(self.keys_BKSD, self.values_BKSD, table.position_BKS, first, *moves)

    def open(self, slot_BK: Tensor, opens_B: Tensor) -> None:
        """Empty the named slots, where the row opens a page, and make them the tail."""
        table, page_size = self.table, self.table.page_size
        slot_BK = torch.where(opens_B[:, None], slot_BK, self.tail_BK)
        self.tail_BK.copy_(slot_BK)
        within = torch.arange(page_size, device=slot_BK.device)
        tokens_BKT = slot_BK[..., None] * page_size + within
        # Old numbers go as well: a NaN left behind would reach the output through its zero weight.
        zeroed = (self.keys_BKSD, self.values_BKSD, *table.state.values())
        for tensor, empty in ((table.position_BKS, -1), *((tensor, 0) for tensor in zeroed)):
            place = entries(tokens_BKT if tensor.shape[2] != self.pages else slot_BK[..., None], tensor)
            opens = opens_B.view(-1, *[1] * (tensor.ndim - 1))
            tensor[place] = torch.where(opens, empty, tensor[place])

    def write(self, key_BKD: Tensor, value_BKD: Tensor) -> None:
        """Write the token of position `now_B` into the tail."""
        table = self.table
        offset_B = table.now_B % table.page_size
        token_BK1 = (self.tail_BK * table.page_size + offset_B[:, None])[..., None]
        place = entries(token_BK1, self.keys_BKSD)
        self.keys_BKSD[place] = key_BKD[:, :, None].to(self.keys_BKSD.dtype)
        self.values_BKSD[place] = value_BKD[:, :, None].to(self.values_BKSD.dtype)
        position = table.now_B.to(torch.int32)[:, None, None].expand_as(token_BK1)
        table.position_BKS[entries(token_BK1, table.position_BKS)] = position

    def widen(self, key_BKD: Tensor) -> None:
        """Widen the tail's representatives by the key of position `now_B`; a page's first key starts them anew."""
        table = self.table
        if not table.kmin_BKPD.shape[2]:
            return
        page = entries(self.tail_BK[..., None], table.kmin_BKPD)
        first = (table.now_B % table.page_size == 0)[:, None, None, None]
        for representative, extreme in ((table.kmin_BKPD, torch.minimum), (table.kmax_BKPD, torch.maximum)):
            key = key_BKD[:, :, None].to(representative.dtype)
            representative[page] = torch.where(first, key, extreme(representative[page], key))

    def read(self, slot_BKR: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and residency of the named pages; a negative slot reads as empty."""
        table, page_size = self.table, self.table.page_size
        within = torch.arange(page_size, device=slot_BKR.device)
        token_BKS = (slot_BKR.clamp(min=0)[..., None] * page_size + within).flatten(2)
        wanted = (slot_BKR >= 0).repeat_interleave(page_size, -1)
        resident = (table.position_BKS[entries(token_BKS, table.position_BKS)] >= 0) & wanted
        place = entries(token_BKS, self.keys_BKSD)
        return self.keys_BKSD[place], self.values_BKSD[place], resident
