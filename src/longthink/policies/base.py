"""The contract of a policy: which page gives way, and what a policy may learn from a step.

Shape suffixes: B batch rows, K KV heads (1 where one table serves the whole layer), G query heads per KV head,
P page slots, T tokens in a page, S = P * T token slots, D head dim, Q columns of a prompt block, R pages read,
M tokens moved.
"""

from __future__ import annotations

import dataclasses
from abc import ABC
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from longthink.config import Budget, check_choice
from longthink.errors import BudgetError
from longthink.kernels import Learn, Rule, Used, evictable_pages, logical_pages

PAGE_SIZES = (1, 4, 8, 16, 32)


@dataclass
class PageTable:
    """What one layer's slots hold: the whole of a policy's world.

    A policy reads every field and writes only into the tensors of `state`, in place.

    Attributes
    ----------
    page_size
        Tokens in a page (T).
    position_BKS
        Logical position of the token in each token slot, int32, -1 where there is none.
    keys_BKSD, values_BKSD
        Keys and values of all KV heads, in the token slots.
    now_B
        Logical position of the token of the current step, int64.
    prompt_B
        Prompt tokens of each row, int64.
    cap_B, cap
        Page slots that each row may fill (or, where the cache grows, read), int64; and the largest of them.
    kmin_BKPD, kmax_BKPD
        Representatives: elementwise min and max of the keys of each page. Empty (P = 0) unless the policy asks.
    state
        The policy's own tensors, from `Policy.init_state`. Dimension 2 counts page slots or token slots; the
        cache zeroes an entry when its slot is opened anew, moves token entries with their tokens, and takes rows
        apart and together along dimension 0.
    """

    page_size: int
    position_BKS: Tensor
    keys_BKSD: Tensor
    values_BKSD: Tensor
    now_B: Tensor
    prompt_B: Tensor
    cap_B: Tensor
    cap: int
    kmin_BKPD: Tensor
    kmax_BKPD: Tensor
    state: dict[str, Tensor] = field(default_factory=dict)

    @property
    def page_BKP(self) -> Tensor:
        """Logical page in each slot (position // page_size), int32, -1 where the slot is empty."""
        return logical_pages(self.position_BKS, self.page_size)

    @property
    def resident_BKS(self) -> Tensor:
        """True where a token slot holds a token."""
        return self.position_BKS >= 0


class Shape(NamedTuple):
    """Sizes of a table, for `Policy.init_state`: rows, page tables, page slots, page size."""

    B: int
    K: int
    P: int
    T: int


class Step(NamedTuple):
    """What a policy may learn from one decode step.

    Attributes
    ----------
    query_BKGD
        Queries of the new token, grouped by KV head.
    weights_BKGS
        Exact softmax attention over the token slots; None unless the policy's `uses_weights`.
    scaling
        Factor on q.k before the softmax.
    agree
        Gives the largest of each number over all processes that hold some heads of the layer; None where one process
        holds them all, or each goes its own way.
    score_BKP
        Score of each page, the maximum over the group, where the kernel that read the pages has counted it
        (`Policy.learn`).
    """

    query_BKGD: Tensor
    weights_BKGS: Tensor | None
    scaling: float
    agree: Callable[[Tensor], Tensor] | None = None
    score_BKP: Tensor | None = None


class Moves(NamedTuple):
    """Tokens that change place before a slot is overwritten; a pair with source == target moves nothing.

    Attributes
    ----------
    source_BKM, target_BKM
        Token slots. The sources become empty unless they are overwritten themselves.
    """

    source_BKM: Tensor
    target_BKM: Tensor


@dataclass(frozen=True, kw_only=True)
class Policy(ABC):
    """Base of all policies: a frozen set of switches and pure functions over a `PageTable`.

    A subclass overrides what it needs; the defaults keep the prompt and evict the oldest page. State lives in
    the table, never in the policy object, so one policy object serves any number of layers and caches.

    The order of one decode step is: when the new token opens a page and all slots are full, `victim` names the
    slot that gives way and `moves` may save tokens from it; the token is written; `select` may name the pages to
    read; attention runs; `observe` learns.
    """

    name: ClassVar[str]
    time: ClassVar[str]
    memory: ClassVar[str]
    keeps: ClassVar[str]
    source: ClassVar[str]

    grows: ClassVar[bool] = False
    """The cache never evicts: slots are added as the text grows, and the budget only bounds what is read."""
    needs_budget: ClassVar[bool] = True
    uses_prefill_mass: ClassVar[bool] = False
    """`trim` and `admit` get the attention mass of the prompt's columns."""
    by_rule: ClassVar[bool] = False
    """What gives way follows from `rule` and from a `priority` that reads positions and state alone, and state is
    written as `learn` or `stamps` say: then one kernel does it for all layers, where there is one."""
    reads_by_bound: ClassVar[bool] = False
    """`select` names the pages with the highest bounds, which is a kernel of its own, where there is one."""

    page_size: int = 16

    def __post_init__(self) -> None:
        check_choice("page_size", self.page_size, PAGE_SIZES)

    # What the cache asks once -------------------------------------------------------------------------------

    @property
    def pins_prompt(self) -> bool:
        """Whether all prompt pages stay; then the prompt must fit in the budget."""
        return True

    @property
    def uses_representatives(self) -> bool:
        """Whether the cache shall keep each page's representative."""
        return False

    @property
    def uses_weights(self) -> bool:
        """Whether `observe` needs the exact attention weights."""
        return False

    @property
    def keeps_maxima(self) -> bool:
        """Whether the state holds the largest that any step gave: steps may then be observed side by side."""
        return False

    @property
    def uses_vectors(self) -> bool:
        """Whether what is kept or read depends on queries, keys or values, beyond the attention weights.

        A recorded trace holds them only if it was asked to, and such a policy cannot be replayed on one without.
        """
        return self.uses_representatives

    @property
    def shares_prompt(self) -> bool:
        """Whether rows with the same prompt may share its pages: what is learned of prompt pages never matters."""
        return not self.init_state(Shape(1, 1, 1, self.page_size), torch.device("meta"))

    def tables(self, kv_heads: int) -> int:
        """Page tables a layer has: one per KV head, or 1 for the whole layer."""
        return kv_heads

    def required_pages(self, prompt: int) -> int:
        """Fewest page slots with which a row with this many prompt tokens can be decoded."""
        return -(-prompt // self.page_size) + 1 if self.pins_prompt else 1

    def make_budget(self, budget: int | None = None, decode_budget: int | None = None) -> Budget | None:
        """Return the budget of these many tokens, or None where the policy keeps everything.

        Raises
        ------
        BudgetError
            If the policy needs a budget and none is given, or the other way round.
        ValueError
            If both are given, or one is out of range.
        """
        given = budget is not None or decode_budget is not None
        if given and not self.needs_budget:
            raise BudgetError(f"policy {self.name!r} keeps everything: give neither budget nor decode_budget")
        if not given and self.needs_budget:
            raise BudgetError(f"policy {self.name!r} needs a budget: give budget=... or decode_budget=...")
        return Budget(budget=budget, decode_budget=decode_budget) if given else None

    def for_layer(self, layer_idx: int) -> Policy:
        """Return the policy that serves this layer."""
        del layer_idx
        return self

    def init_state(self, shape: Shape, device: torch.device) -> dict[str, Tensor]:
        """Zeroed tensors that the policy needs, B x K x (P or S) x anything."""
        del shape, device
        return {}

    # After the prompt ---------------------------------------------------------------------------------------

    def trim(
        self, position_BQ: Tensor, length_B: Tensor, cap_B: Tensor, mass_BKQ: Tensor | None
    ) -> Tensor | None:
        """Mark the prompt tokens to keep, bool BKQ in whole pages; None keeps all. Only without a pinned prompt.

        Parameters
        ----------
        position_BQ
            Logical position of each column of the prompt block, -1 for padding.
        length_B
            Prompt tokens of each row.
        """
        del position_BQ, length_B, cap_B, mass_BKQ
        return None

    def admit(self, table: PageTable, mass_BKS: Tensor | None) -> None:
        """Set the state of the slots that the prompt fills. `now_B` is the position of the last prompt token."""
        del table, mass_BKS

    # In every decode step -----------------------------------------------------------------------------------

    def rule(self, table: PageTable) -> Rule:
        """Which pages may give way; a page that holds any pinned token is pinned."""
        return Rule(table.prompt_B if self.pins_prompt else torch.zeros_like(table.prompt_B))

    def evictable(self, table: PageTable) -> Tensor:
        """Pages that may give way, bool BKP, as `rule` says; at least one when the table is full."""
        return evictable_pages(table.page_BKP, table.now_B, table.prompt_B, table.page_size, self.rule(table))

    def priority(self, table: PageTable) -> Tensor:
        """Worth of each page, BKP: of the evictable pages the one with the smallest gives way.

        Ties go to the lowest logical page.
        """
        return table.page_BKP

    def moves(self, table: PageTable, slot_BK: Tensor, full_BK: Tensor) -> Moves | None:
        """Tokens to save from the slots that are about to be overwritten (where `full_BK`)."""
        del table, slot_BK, full_BK
        return None

    def select(self, table: PageTable, query_BKGD: Tensor) -> Tensor | None:
        """Page slots to read in this step, BKR; None reads everything resident."""
        del table, query_BKGD
        return None

    def key_shift(self, table: PageTable) -> tuple[int, Tensor] | None:
        """How many of the first token slots are read as if they stood `shift_B` positions later, and that shift."""
        del table
        return None

    def observe(self, table: PageTable, step: Step) -> None:
        """Learn from the step, into `table.state`."""
        del table, step

    def stamps(self, table: PageTable, score_BKP: Tensor) -> Used | None:
        """How the scores of a step stamp the pages, for `observe` or the kernel that does it for all layers."""
        del table, score_BKP
        return None

    def learn(self, table: PageTable) -> Learn:
        """What the kernel that reads the pages shall learn on its way: something for `observe`, or all of it.

        Only asked where attention and appending are one kernel, on a GPU.
        """
        del table
        return Learn("weights" if self.uses_weights else "nothing")

    # Names and JSON -----------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """All switches as JSON-ready values; `policy_from_dict` reads it back."""
        return {"name": self.name, **dataclasses.asdict(self)}

    def spec(self) -> str:
        """Shortest text that `make_policy` turns into this policy, such as ``raas:r=0.25``."""
        changed = [
            f"{f.name}={getattr(self, f.name)}"
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != f.default
        ]
        return ":".join([self.name, *changed])

    def with_options(self, **options: Any) -> Self:
        """Copy with other switches."""
        return dataclasses.replace(self, **options)
