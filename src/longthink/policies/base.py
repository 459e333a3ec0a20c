"""The contract of a policy: which page to evict when the slots are full, and what it may learn from a decode step.

Shape suffixes: B batch rows, K KV heads (1 where one table serves the whole layer), G query heads per KV head,
P page slots, T tokens in a page, S = P * T token slots, D head dim, Q columns of a prompt block, R pages read,
M tokens moved, N first token slots, F frequency pairs, H query heads.
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
from longthink.kernels.rotation import Rotation

PAGE_SIZES = (1, 4, 8, 16, 32)
NEEDS = ("weights", "key_bounds", "prompt_mass", "query_stats", "calibration", "vectors")


@dataclass(eq=False)
class PageTable:
    """What one layer's slots hold; all that a policy sees of a cache.

    A policy reads what it has declared in `Policy.needs` and writes only to the tensors of `state`, in place.

    Attributes
    ----------
    page_size
        Tokens in a page (T).
    position_BKS
        Logical position of the token in each token slot, int32, -1 where it is empty.
    now_B
        Logical position of the token being decoded, int64; after prefill, of the first token to decode.
    prompt_B
        Tokens of each row's first prompt, int64.
    cap_B, cap
        Page slots that each row may fill (or read, where the cache grows), int64; and their maximum.
    user_BKP
        Pages that hold a token of any turn's prompt, int8; None where there can be one turn only (vLLM).
    query_means_BN, key_rotation
        Read them as `query_stats_BH3F` and `rotation`; None where not declared.
    unpack
        What gives keys and values of all slots where pages are at few bits; None elsewhere.
    state
        The policy's own tensors, from `Policy.init_state`. Dimension 2 counts page slots or token slots. The cache
        zeroes an entry when its page is opened, moves token entries with their tokens, and selects rows along
        dimension 0.
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
    query_means_BN: Tensor | None = None
    key_rotation: Rotation | None = None
    unpack: Callable[[], tuple[Tensor, Tensor]] | None = None

    @property
    def page_BKP(self) -> Tensor:
        """Logical page in each slot (position // page_size), int32, -1 where the slot is empty."""
        return logical_pages(self.position_BKS, self.page_size)

    @property
    def prompt_BKP(self) -> Tensor:
        """Pages that hold a token of any turn's prompt, bool."""
        if self.user_BKP is None:
            return (self.page_BKP >= 0) & holds_first(self, self.prompt_B)
        return self.user_BKP > 0

    @property
    def prompt_pages_B(self) -> Tensor:
        """Number of prompt pages, shape B; the same for all KV heads where the policy pins the prompt."""
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

    @property
    def query_stats_BH3F(self) -> Tensor:
        """Means over the prompt's queries before RoPE, see `kernels.rotation.query_sums`; needs "query_stats"."""
        if self.query_means_BN is None:
            raise UndeclaredNeedError("query_stats", "means of queries")
        return self.query_means_BN.unflatten(1, (-1, 3, len(self.rotation.inv_freq_D)))

    @property
    def rotation(self) -> Rotation:
        """How keys carry positions; only if `needs` has "query_stats"."""
        if self.key_rotation is None:
            raise UndeclaredNeedError("query_stats", "the rotation of keys")
        return self.key_rotation

    def _vectors(self) -> tuple[Tensor, Tensor]:
        if self.unpack is not None:
            return self.unpack()
        if self.vectors is None:
            raise UndeclaredNeedError("vectors", "keys and values")
        return self.vectors

    def _key_bounds(self) -> tuple[Tensor, Tensor]:
        if self.key_bounds is None:
            raise UndeclaredNeedError("key_bounds", "the bounds of keys")
        return self.key_bounds


class Shape(NamedTuple):
    """Sizes of a page table: rows, page tables, page slots, page size."""

    B: int
    K: int
    P: int
    T: int


class Step(NamedTuple):
    """What a policy may learn from one decode step.

    Attributes
    ----------
    queries_BKGD, attention_BKGS
        Read them as `query_BKGD` and `weights_BKGS`; None where not declared.
    scaling
        Factor on q.k before the softmax.
    over_ranks
        Elementwise maximum over the tensor-parallel ranks that share the heads of the layer; None without ranks.
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
        """Maximum over all KV heads of the layer, B1P: for policies with one table per layer."""
        score_B1P = score_BKP.amax(1, keepdim=True)
        return score_B1P if self.over_ranks is None else self.over_ranks(score_B1P)


class Moves(NamedTuple):
    """Token slots to copy from and to before a page is overwritten; a pair with source == target moves nothing.

    A source that is not also a target is empty afterwards.
    """

    source_BKM: Tensor
    target_BKM: Tensor


class PolicyInfo(NamedTuple):
    """What listings say about a policy: time of a step, memory, what it keeps, where it comes from."""

    time: str
    memory: str
    keeps: str
    source: str


@dataclass(frozen=True, kw_only=True)
class Policy(ABC):
    """Base of all policies: a frozen set of options and pure functions over a `PageTable`.

    The defaults pin the prompt and evict the oldest page. State lives in the table, never in the policy object, so
    one object serves any number of layers and caches. Optional behaviour is a protocol that a policy also implements:
    `TrimsPrompt`, `SavesTokens`, `SelectsPages`, `ShiftsKeys`, `SharesTable`, `Calibrated`.

    When the new token of a decode step opens a page and all slots are full, the unprotected page with the least
    `worth` is evicted. Then the token is written, attention runs, and `observe` updates the state.
    """

    name: ClassVar[str]
    """Name in the registry; the name of the class until it is registered."""
    info: ClassVar[PolicyInfo] = PolicyInfo("", "", "", "")
    bounds: ClassVar[Literal["memory", "reads", "nothing"]] = "memory"
    """What the budget bounds: the tokens held, only the tokens read in a step, or nothing (there is no budget).
    Unless it is memory, the cache grows with the sequence."""

    page_size: int = 16

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        # A subclass is another policy: it must not inherit the name.
        if "name" not in cls.__dict__:
            cls.name = cls.__name__

    def __post_init__(self) -> None:
        check_choice("page_size", self.page_size, PAGE_SIZES)

    @property
    def needs(self) -> frozenset[str]:
        """What the cache must provide: any of "weights" (attention weights for `observe`), "key_bounds" (elementwise
        minimum and maximum of each page's keys), "prompt_mass" (attention that the prompt's columns received, for
        `trim` and `admit`), "query_stats" (means over the first prompt's queries before RoPE, and the rotation of
        keys), "calibration" (these means from a file: `Calibrated`), "vectors" (keys and values in the table).
        "key_bounds" and "vectors" include queries. Reading what is not declared raises `UndeclaredNeedError`.
        """
        return frozenset()

    def pins_prompt(self) -> bool:
        """Whether no prompt page is ever evicted; then the prompt must fit in the budget.

        A method, unlike `needs`, because compiled steps call it: torch.compile evaluates ``super().property`` to the
        property object, which is always true.
        """
        return True

    def for_layer(self, layer_idx: int) -> Policy:
        """Policy for this layer."""
        del layer_idx
        return self

    def required_pages(self, prompt: int) -> int:
        """Minimum page slots to decode a row with this many prompt tokens."""
        return -(-prompt // self.page_size) + 1 if self.pins_prompt() else 1

    def init_state(self, shape: Shape, device: torch.device) -> dict[str, Tensor]:
        """The policy's state, zero-initialised, B x K x (P or S) x anything."""
        del shape, device
        return {}

    def admit(self, table: PageTable, mass_BKS: Tensor | None) -> None:
        """Initialise the state of the slots that the prompt fills.

        Parameters
        ----------
        mass_BKS
            Attention that each prompt token received from the prompt, summed over queries and the heads of its group;
            None unless `needs` has "prompt_mass".
        """
        del table, mass_BKS

    def protected(self, table: PageTable) -> Tensor:
        """Pages that must not be evicted, bool BKP; at least one page of a full table must be unprotected."""
        if not self.pins_prompt():
            return torch.zeros_like(table.page_BKP, dtype=torch.bool)
        return table.prompt_BKP

    def worth(self, table: PageTable) -> Tensor:
        """Worth of each page, BKP: the page with the least is evicted; a tie evicts the lowest logical page."""
        return table.page_BKP

    def observe(self, table: PageTable, step: Step) -> None:
        """Update `table.state` after the attention of a decode step."""
        del table, step


def holds_first(table: PageTable, tokens_B: Tensor) -> Tensor:
    """Pages that hold any of the first `tokens_B` positions, bool BKP."""
    return table.page_BKP * table.page_size < tokens_B[:, None, None]


def reads_vectors(needs: frozenset[str]) -> bool:
    """Whether these needs include queries, keys or values."""
    return "vectors" in needs or "key_bounds" in needs


def needs_budget(policy: Policy) -> bool:
    return policy.bounds != "nothing"


def grows(policy: Policy) -> bool:
    """Whether the cache grows with the sequence."""
    return policy.bounds != "memory"


# Optional behaviour ---------------------------------------------------------------------------------------------


@runtime_checkable
class TrimsPrompt(Protocol):
    """A policy that may evict prompt tokens after prefill."""

    def trim(
        self, position_BQ: Tensor, length_B: Tensor, cap_B: Tensor, mass_BKQ: Tensor | None
    ) -> Tensor | None:
        """Prompt tokens to keep, bool BKQ in whole pages; None keeps all.

        Parameters
        ----------
        position_BQ
            Logical position of each column of the prompt block, -1 for padding.
        length_B
            Prompt tokens of each row.
        cap_B
            Page slots that each row may fill.
        mass_BKQ
            As in `Policy.admit`, per column.
        """


@runtime_checkable
class SavesTokens(Protocol):
    """A policy that saves tokens of a page before it is overwritten."""

    def moves(self, table: PageTable, slot_BK: Tensor, full_BK: Tensor) -> Moves | None:
        """Tokens to save from the page slots about to be overwritten (where `full_BK`); None for none."""


@runtime_checkable
class RanksPages(Protocol):
    """A policy of tokens that also ranks pages at few bits; protected are those of a pinned prompt alone."""

    def page_worth(self, table: PageTable) -> Tensor:
        """Worth of each page, BKP, in place of `Policy.worth`."""


@runtime_checkable
class SelectsPages(Protocol):
    """A policy that reads only some of the resident pages."""

    def select(self, table: PageTable, query_BKGD: Tensor) -> Tensor | None:
        """Page slots to read in this step, BKR, negative for none; None reads all resident pages."""


@runtime_checkable
class ShiftsKeys(Protocol):
    """A policy that reads the first tokens at shifted positions."""

    def shifted_tokens(self) -> int:
        """Number of first token slots to shift."""

    def shift_keys(self, table: PageTable, keys_BKND: Tensor, inv_freq_D: Tensor) -> Tensor:
        """Keys to read in this step, from the keys as they were written (rotated by RoPE).

        Keys come in the half-split layout, whatever the model's is: features i and i + D / 2 are a pair, and
        `inv_freq_D` holds the rotation of each pair per position, 0 where there is none.
        """


@runtime_checkable
class SharesTable(Protocol):
    """A policy that may use one page table for the whole layer."""

    def tables(self, kv_heads: int) -> int:
        """Number of page tables: `kv_heads`, or 1."""


@runtime_checkable
class Calibrated(Protocol):
    """A policy whose "query_stats" come from a file, if its needs have "calibration"."""

    def stats_file(self) -> str:
        """Path of a file that ``longthink calibrate`` has written for the model."""
