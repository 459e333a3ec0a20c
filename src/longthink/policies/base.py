"""The contract of a policy: which page leaves when the slots are full, and what a policy may learn from a step.

Shape suffixes: B batch rows, K KV heads (1 where one table serves the whole layer), G query heads per KV head,
P page slots, T tokens in a page, S = P * T token slots, D head dim, Q columns of a prompt block, R pages read,
M tokens moved, N first token slots.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from longthink.config import check_choice
from longthink.errors import UndeclaredNeedError
from longthink.kernels import logical_pages

PAGE_SIZES = (1, 4, 8, 16, 32)
NEEDS = ("weights", "key_bounds", "prompt_mass", "vectors")


@dataclass(eq=False)
class PageTable:
    """What one layer's slots hold: the whole of a policy's world.

    A policy reads what it has declared in `Policy.needs`, and writes only into the tensors of `state`, in place.

    Attributes
    ----------
    page_size
        Tokens in a page (T).
    position_BKS
        Logical position of the token in each token slot, int32, -1 where there is none.
    now_B
        Logical position of the token that is being decoded, int64; after the prompt, that of the token to come.
    prompt_B
        Tokens of each row's first prompt, int64.
    cap_B, cap
        Page slots that each row may fill (or, where the cache grows, read), int64; and the largest of them.
    user_BKP
        Pages that hold a token of a prompt, the first or that of a later turn, int8; None where there is one turn only.
    state
        The policy's own tensors, from `Policy.init_state`. Dimension 2 counts page slots or token slots; the
        cache zeroes an entry when its slot is opened anew, moves token entries with their tokens, and takes rows
        apart and together along dimension 0.
    """

    page_size: int
    position_BKS: Tensor
    now_B: Tensor
    prompt_B: Tensor
    cap_B: Tensor
    cap: int
    state: dict[str, Tensor] = field(default_factory=dict)
    vectors: tuple[Tensor, Tensor] | None = None
    key_bounds: tuple[Tensor, Tensor] | None = None
    user_BKP: Tensor | None = None

    @property
    def page_BKP(self) -> Tensor:
        """Logical page in each slot (position // page_size), int32, -1 where the slot is empty."""
        return logical_pages(self.position_BKS, self.page_size)

    @property
    def prompt_BKP(self) -> Tensor:
        """Pages that hold a token of a prompt, of whichever turn, bool."""
        if self.user_BKP is None:
            return (self.page_BKP >= 0) & holds_first(self, self.prompt_B)
        return self.user_BKP > 0

    @property
    def prompt_pages_B(self) -> Tensor:
        """Number of those pages, the same in every table of a row whose policy keeps them all."""
        if self.user_BKP is None:
            return (self.prompt_B + self.page_size - 1).div(self.page_size, rounding_mode="floor")
        return self.user_BKP[:, 0].sum(-1)

    @property
    def resident_BKS(self) -> Tensor:
        """True where a token slot holds a token."""
        return self.position_BKS >= 0

    @property
    def keys_BKSD(self) -> Tensor:
        """Keys of all KV heads in the token slots; only if `needs` has "vectors"."""
        return self._vectors()[0]

    @property
    def values_BKSD(self) -> Tensor:
        """Values of all KV heads in the token slots; only if `needs` has "vectors"."""
        return self._vectors()[1]

    @property
    def kmin_BKPD(self) -> Tensor:
        """Elementwise minimum of the keys of each page; only if `needs` has "key_bounds"."""
        return self._key_bounds()[0]

    @property
    def kmax_BKPD(self) -> Tensor:
        """Elementwise maximum of the keys of each page; only if `needs` has "key_bounds"."""
        return self._key_bounds()[1]

    def _vectors(self) -> tuple[Tensor, Tensor]:
        if self.vectors is None:
            raise UndeclaredNeedError("vectors", "keys and values")
        return self.vectors

    def _key_bounds(self) -> tuple[Tensor, Tensor]:
        if self.key_bounds is None:
            raise UndeclaredNeedError("key_bounds", "the bounds of keys")
        return self.key_bounds


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
    queries_BKGD, attention_BKGS
        What `query_BKGD` and `weights_BKGS` give, None where it is not declared.
    scaling
        Factor on q.k before the softmax.
    over_ranks
        Gives the largest of each number over all processes that hold some heads of the layer, if there are several.
    """

    queries_BKGD: Tensor | None
    attention_BKGS: Tensor | None
    scaling: float
    over_ranks: Callable[[Tensor], Tensor] | None = None

    @property
    def query_BKGD(self) -> Tensor:
        """Queries of the new token, grouped by KV head; only if `Policy.needs` has "vectors" or "key_bounds"."""
        if self.queries_BKGD is None:
            raise UndeclaredNeedError("vectors", "queries")
        return self.queries_BKGD

    @property
    def weights_BKGS(self) -> Tensor:
        """Exact softmax attention over the token slots; only if `Policy.needs` has "weights"."""
        if self.attention_BKGS is None:
            raise UndeclaredNeedError("weights", "attention weights")
        return self.attention_BKGS

    def max_over_heads(self, score_BKP: Tensor) -> Tensor:
        """Largest score over all KV heads of the layer, B1P: for policies with one table per layer."""
        score_B1P = score_BKP.amax(1, keepdim=True)
        return score_B1P if self.over_ranks is None else self.over_ranks(score_B1P)


class Moves(NamedTuple):
    """Tokens that change place before a slot is overwritten; a pair with source == target moves nothing.

    Attributes
    ----------
    source_BKM, target_BKM
        Token slots. The sources become empty unless they are overwritten themselves.
    """

    source_BKM: Tensor
    target_BKM: Tensor


class PolicyInfo(NamedTuple):
    """What tables and documents say of a policy: cost of a step, memory, what it keeps, where it comes from."""

    time: str
    memory: str
    keeps: str
    source: str


@dataclass(frozen=True, kw_only=True)
class Policy(ABC):
    """Base of all policies: a frozen set of options and pure functions over a `PageTable`.

    A subclass overrides what it needs; the defaults keep the prompt and evict the oldest page. State lives in
    the table, never in the policy object, so one policy object serves any number of layers and caches. What only
    some policies want is a protocol that they also implement: `TrimsPrompt`, `SavesTokens`, `SelectsPages`,
    `ShiftsKeys`, `SharesTable`.

    In a decode step, when the new token opens a page and all slots are full, the page that is not `protected` and has
    the least `worth` is evicted. The token is written, attention runs, and `observe` learns.
    """

    name: ClassVar[str]
    """Name under which the policy is registered; that of the class until it is."""
    info: ClassVar[PolicyInfo] = PolicyInfo("", "", "", "")
    bounds: ClassVar[Literal["memory", "reads", "nothing"]] = "memory"
    """What the budget bounds: the tokens held, or only the tokens read in a step, or nothing (no budget is given).
    Unless it is memory, slots are added as the text grows."""

    page_size: int = 16

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        # A subclass is another policy: without a name of its own it must not pass for the one it inherits from.
        if "name" not in cls.__dict__:
            cls.name = cls.__name__

    def __post_init__(self) -> None:
        check_choice("page_size", self.page_size, PAGE_SIZES)

    @property
    def needs(self) -> frozenset[str]:
        """What the cache shall provide: any of "weights" (attention weights for `observe`), "key_bounds" (elementwise
        minimum and maximum of each page's keys), "prompt_mass" (attention mass of the prompt's columns for `trim` and
        `admit`), "vectors" (keys and values in the table). Queries come with "key_bounds" and with "vectors". What is
        not declared is not there.
        """
        return frozenset()

    def pins_prompt(self) -> bool:
        """Whether all prompt pages stay; then the prompt must fit in the budget.

        A method, unlike `needs`: it is asked inside compiled steps, where a compiler takes ``super().property`` for
        the property itself, which is always true.
        """
        return True

    def for_layer(self, layer_idx: int) -> Policy:
        """Return the policy that serves this layer."""
        del layer_idx
        return self

    def required_pages(self, prompt: int) -> int:
        """Fewest page slots with which a row with this many prompt tokens can be decoded."""
        return -(-prompt // self.page_size) + 1 if self.pins_prompt() else 1

    def init_state(self, shape: Shape, device: torch.device) -> dict[str, Tensor]:
        """Zeroed tensors that the policy needs, B x K x (P or S) x anything."""
        del shape, device
        return {}

    def admit(self, table: PageTable, mass_BKS: Tensor | None) -> None:
        """Set the state of the slots that the prompt fills.

        Parameters
        ----------
        mass_BKS
            Attention that each prompt token got from the prompt, summed over queries and the heads of its group;
            None unless "prompt_mass" is needed.
        """
        del table, mass_BKS

    def protected(self, table: PageTable) -> Tensor:
        """Pages that must not leave, bool BKP; of a full table, at least one resident page is not protected."""
        if not self.pins_prompt():
            return torch.zeros_like(table.page_BKP, dtype=torch.bool)
        return table.prompt_BKP

    def worth(self, table: PageTable) -> Tensor:
        """Worth of each page, BKP: the one with the least leaves, a tie going to the lowest logical page."""
        return table.page_BKP

    def observe(self, table: PageTable, step: Step) -> None:
        """Learn from the step, into `table.state`."""
        del table, step


def holds_first(table: PageTable, tokens_B: Tensor) -> Tensor:
    """Pages that hold any of the first tokens of the text, bool BKP."""
    return table.page_BKP * table.page_size < tokens_B[:, None, None]


def reads_vectors(needs: frozenset[str]) -> bool:
    """Whether a policy with these needs may look at queries, keys or values, beyond the attention weights."""
    return "vectors" in needs or "key_bounds" in needs


def needs_budget(policy: Policy) -> bool:
    """Whether a budget must be given: unless the policy bounds nothing."""
    return policy.bounds != "nothing"


def grows(policy: Policy) -> bool:
    """Whether slots are added as the text grows: unless memory is bounded."""
    return policy.bounds != "memory"


# What only some policies want ---------------------------------------------------------------------------------


@runtime_checkable
class TrimsPrompt(Protocol):
    """A policy that may evict prompt tokens as soon as the prompt has been read."""

    def trim(
        self, position_BQ: Tensor, length_B: Tensor, cap_B: Tensor, mass_BKQ: Tensor | None
    ) -> Tensor | None:
        """Mark the prompt tokens to keep, bool BKQ in whole pages; None keeps all.

        Parameters
        ----------
        position_BQ
            Logical position of each column of the prompt block, -1 for padding.
        length_B
            Prompt tokens of each row.
        cap_B
            Page slots that each row may fill.
        mass_BKQ
            As in `Policy.admit`, of the columns.
        """
        ...


@runtime_checkable
class SavesTokens(Protocol):
    """A policy that saves tokens from a page before it is overwritten."""

    def moves(self, table: PageTable, slot_BK: Tensor, full_BK: Tensor) -> Moves | None:
        """Tokens to save from the slots that are about to be overwritten (where `full_BK`); None for none."""
        ...


@runtime_checkable
class SelectsPages(Protocol):
    """A policy that reads some of the pages it holds."""

    def select(self, table: PageTable, query_BKGD: Tensor) -> Tensor | None:
        """Page slots to read in this step, BKR, negative to read nothing; None reads everything resident."""
        ...


@runtime_checkable
class ShiftsKeys(Protocol):
    """A policy that reads the first tokens as if they stood at later positions."""

    def shifted_tokens(self) -> int:
        """How many of the first token slots are read at shifted positions; 0 for none."""
        ...

    def shift_keys(self, table: PageTable, keys_BKND: Tensor, inv_freq_D: Tensor) -> Tensor:
        """Return those keys as this step reads them, given as they were written (rotated by RoPE).

        Parameters
        ----------
        inv_freq_D
            Rotation per position of each of the D / 2 frequency pairs.
        """
        ...


@runtime_checkable
class SharesTable(Protocol):
    """A policy that may keep one page table for the whole layer."""

    def tables(self, kv_heads: int) -> int:
        """Page tables of a layer: one per KV head, or 1."""
        ...


def page_tables(policy: Policy, kv_heads: int) -> int:
    """Page tables that a layer has: one per KV head, or 1 for the whole layer."""
    return policy.tables(kv_heads) if isinstance(policy, SharesTable) else kv_heads
