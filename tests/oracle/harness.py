"""Drive a `LayerCache` and one oracle per row with the same inputs and compare them at every step.

Shapes: B rows, H query heads, K KV heads, Q new columns, N tokens so far, D head dimension.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import pytest
import torch

from longthink.cache import LayerCache, Rotation
from longthink.config import Budget
from longthink.errors import BudgetError
from longthink.policies import make_policy
from tests.oracle.base import Heads, Limit, RowOracle, Setting
from tests.oracle.lazy_eviction import LazyEvictionOracle
from tests.oracle.milestone import MilestoneOracle
from tests.oracle.pages import QuestOracle, RaasOracle, RandomOracle, WindowOracle
from tests.oracle.recall import RecallOracle
from tests.oracle.single_tokens import KeyDiffOracle, RKVOracle, SnapKVOracle, TovaOracle
from tests.oracle.tokens import DenseOracle, H2OOracle, StreamingOracle
from tests.oracle.tri_attention import TriAttentionOracle, frequencies
from tests.oracle.vase import VaseOracle

ORACLES = {
    "dense": DenseOracle,
    "streaming_llm": StreamingOracle,
    "h2o": H2OOracle,
    "lazy_eviction": LazyEvictionOracle,
    "milestone": MilestoneOracle,
    "recall": RecallOracle,
    "quest": QuestOracle,
    "raas": RaasOracle,
    "recency": WindowOracle,
    "fifo": WindowOracle,
    "random": RandomOracle,
    "keydiff": KeyDiffOracle,
    "r_kv": RKVOracle,
    "snapkv": SnapKVOracle,
    "tova": TovaOracle,
    "tri_attention": TriAttentionOracle,
    "vase": VaseOracle,
}
DEFAULT_PAGE_SIZE = {"recency": 1, "fifo": 16}
OUTPUT_TOLERANCE = {"float64": 1e-9, "float32": 1e-5}
TIE_TOLERANCE = {"float64": 1e-11, "float32": 1e-4}
FLOAT32_TOLERANCE = {"h2o": 1e-4, "r_kv": 1e-6, "snapkv": 1e-6, "tova": 1e-6, "vase": 1e-4}
"""What they remember is float32 whatever the inputs are, and H2O and VaSE add up attention."""
ANGLE_TOLERANCE = {"float64": 1e-9, "float32": 1e-5}
"""For cosines of angles up to 65536 radians."""
ROUNDED = (*FLOAT32_TOLERANCE, "tri_attention")
"""Where even random numbers are sometimes so close that rounding decides."""
PADDING_GARBAGE = 1e3

Turn = tuple[tuple[bool, ...], ...]


@dataclass(frozen=True)
class Case:
    """One run: prompts of `prompts[row]` tokens, left padded, in chunks; then decode steps and further turns.

    `then` holds an int for that many decode steps, or a tuple of rows of valid flags for a turn (several columns).
    """

    policy: str
    options: Mapping[str, object] = field(default_factory=dict)
    budget: int | None = None
    decode_budget: int | None = None
    prompts: tuple[int, ...] = (5,)
    chunks: tuple[int, ...] = ()
    then: tuple[int | Turn, ...] = (12,)
    kv_heads: int = 1
    group: int = 1
    dim: int = 4
    scaling: float | None = None
    style: str = "normal"
    dtype: str = "float64"
    seed: int = 0

    def make_layer(self) -> LayerCache:
        policy = replace(make_policy(self.policy), **self.options)
        if self.budget is None and self.decode_budget is None:
            return LayerCache(policy)
        rotation = None
        if self.policy == "tri_attention":
            rotation = Rotation(torch.tensor(frequencies(self.dim), dtype=torch.float64))
        budget = Budget(budget=self.budget, decode_budget=self.decode_budget)
        return LayerCache(policy, budget, rotation=rotation)

    def make_oracle(self) -> RowOracle:
        limit = Limit(self.budget or self.decode_budget or 0, on_top_of_prompt=self.budget is None)
        scaling = self.dim**-0.5 if self.scaling is None else self.scaling
        options = {name: value for name, value in self.options.items() if name != "positions"}
        if self.policy in DEFAULT_PAGE_SIZE:
            options.setdefault("page_size", DEFAULT_PAGE_SIZE[self.policy])
        heads = Heads(self.kv_heads, self.group)
        tolerance = max(FLOAT32_TOLERANCE.get(self.policy, 0.0), TIE_TOLERANCE[self.dtype])
        if self.policy == "tri_attention":
            tolerance = ANGLE_TOLERANCE[self.dtype]
        setting = Setting(limit, heads, scaling, tolerance)
        return ORACLES[self.policy](setting, **options)


class Inputs:
    """Seeded columns of queries, keys and values in one of four styles; only `normal` is free of ties."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.random = torch.Generator().manual_seed(case.seed)
        self.prototypes_ND = self.integers(3, case.dim)

    def integers(self, *shape: int) -> torch.Tensor:
        return torch.randint(-2, 3, shape, generator=self.random).double()

    def vectors(self, shape: tuple[int, ...], *, key: bool) -> torch.Tensor:
        style = self.case.style
        if style == "normal":
            return torch.randn(shape, generator=self.random, dtype=torch.float64)
        if style == "integers" or (style == "duplicates" and not key):
            return self.integers(*shape)
        if style == "duplicates":
            return self.prototypes_ND[torch.randint(0, 3, shape[:-1], generator=self.random)]
        hot = torch.randint(0, shape[-1] + 1, shape[:-1], generator=self.random)
        return 64.0 * torch.nn.functional.one_hot(hot, shape[-1] + 1)[..., 1:].double()

    def columns(self, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        case, rows = self.case, len(self.case.prompts)
        kv_shape = (rows, case.kv_heads, width, case.dim)
        query_BHQD = self.vectors((rows, case.kv_heads * case.group, width, case.dim), key=False)
        key_BKQD = self.vectors(kv_shape, key=True)
        value_BKQD = torch.randn(kv_shape, generator=self.random, dtype=torch.float64)
        dtype = getattr(torch, case.dtype)
        return query_BHQD.to(dtype), key_BKQD.to(dtype), value_BKQD.to(dtype)


@dataclass(frozen=True)
class Call:
    """The arguments of one `attend`; `real_BQ` marks the columns that are tokens.

    Before the first chunk of a prompt, so many columns are announced.
    """

    query_BHQD: torch.Tensor
    key_BKQD: torch.Tensor
    value_BKQD: torch.Tensor
    real_BQ: torch.Tensor
    prefill: bool
    announces: int = 0

    @property
    def is_turn(self) -> bool:
        """Whether the user wrote it behind a text."""
        return not self.prefill and self.real_BQ.shape[1] > 1

    def attend(self, layer: LayerCache, scaling: float | None) -> torch.Tensor:
        if self.announces:
            layer.begin_chunked_prefill(self.announces)
        valid_BQ = None if bool(self.real_BQ.all()) else self.real_BQ
        return layer.attend(self.query_BHQD, self.key_BKQD, self.value_BKQD, valid_BQ, scaling)

    def real_columns(self, row: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        real_Q = self.real_BQ[row]
        return self.query_BHQD[row][:, real_Q], self.key_BKQD[row][:, real_Q], self.value_BKQD[row][:, real_Q]


def valid_flags(case: Case) -> Iterator[tuple[torch.Tensor, bool]]:
    """The valid flags of every call of a case, and whether the call belongs to the prompt."""
    width = max(case.prompts)
    prompt_BQ = torch.tensor([[column >= width - n for column in range(width)] for n in case.prompts])
    for chunk_BQ in prompt_BQ.split(list(case.chunks) or [width], dim=1):
        yield chunk_BQ, True
    one_BQ = torch.ones(len(case.prompts), 1, dtype=torch.bool)
    for part in case.then:
        if isinstance(part, int):
            yield from ((one_BQ, False) for _ in range(part))
        else:
            yield torch.tensor(part), False


def calls(case: Case) -> Iterator[Call]:
    """Every call of a case, with garbage in the columns that are padding."""
    inputs = Inputs(case)
    announced = max(case.prompts) if case.chunks else 0
    for real_BQ, prefill in valid_flags(case):
        columns = inputs.columns(real_BQ.shape[1])
        for tensor in columns:
            tensor.masked_fill_(~real_BQ[:, None, :, None], PADDING_GARBAGE)
        yield Call(*columns, real_BQ, prefill, announced)
        announced = 0


class Row:
    """An oracle with the whole history of keys and values of its row, for shadow attention in float64."""

    def __init__(self, case: Case) -> None:
        self.oracle = case.make_oracle()
        self.scaling = self.oracle.scaling
        self.group = case.group
        self.key_KND = torch.zeros(case.kv_heads, 0, case.dim, dtype=torch.float64)
        self.value_KND = self.key_KND.clone()

    def remember(self, key_KQD: torch.Tensor, value_KQD: torch.Tensor) -> None:
        self.key_KND = torch.cat([self.key_KND, key_KQD.double()], dim=1)
        self.value_KND = torch.cat([self.value_KND, value_KQD.double()], dim=1)
        self.oracle.see_values(value_KQD.tolist())

    def keys_read(self, key_ND: torch.Tensor, kept_N: torch.Tensor) -> torch.Tensor:
        """Keys as attention reads them: as they were given."""
        return key_ND[kept_N]

    def shadow(self, query_HD: torch.Tensor, positions: list[list[int]]) -> torch.Tensor:
        """Dense attention masked to `positions` of each KV head."""
        outputs = []
        for head, query_D in enumerate(query_HD.double()):
            kept = torch.tensor(positions[head // self.group])
            key_ND = self.keys_read(self.key_KND[head // self.group], kept)
            weights_N = torch.softmax(key_ND @ query_D * self.scaling, dim=0)
            outputs.append(weights_N @ self.value_KND[head // self.group, kept])
        return torch.stack(outputs)

    def prefill(
        self, query_HQD: torch.Tensor, key_KQD: torch.Tensor, value_KQD: torch.Tensor
    ) -> torch.Tensor:
        before = self.key_KND.shape[1]
        self.remember(key_KQD, value_KQD)
        self.oracle.prefill(query_HQD.tolist(), key_KQD.tolist())
        seen = [[list(range(before + i + 1))] * key_KQD.shape[0] for i in range(key_KQD.shape[1])]
        columns = [self.shadow(query_HQD[:, i], positions) for i, positions in enumerate(seen)]
        return torch.stack(columns, dim=1)

    def step(
        self, query_HD: torch.Tensor, key_KD: torch.Tensor, value_KD: torch.Tensor, *, by_user: bool = False
    ) -> torch.Tensor:
        self.remember(key_KD[:, None], value_KD[:, None])
        step = self.oracle.turn_step if by_user else self.oracle.step
        step(query_HD.tolist(), key_KD.tolist())
        return self.shadow(query_HD, self.oracle.attended())


class Run:
    """Both sides of a case. `compare` returns how many calls were compared before a doubtful decision."""

    def __init__(self, case: Case, row_type: type[Row] = Row) -> None:
        self.case = case
        self.layer = case.make_layer()
        self.rows = [row_type(case) for _ in case.prompts]

    def compare(self) -> int:
        compared = 0
        for call in calls(self.case):
            if call.is_turn and not self.turn_fits(call):
                with pytest.raises(BudgetError):
                    call.attend(self.layer, self.case.scaling)
                self.check_state()
                compared += 1
                continue
            out_BHQD = call.attend(self.layer, self.case.scaling)
            expected = [self.expected(call, row) for row in range(len(self.rows))]
            if any(row.oracle.doubtful for row in self.rows):
                break
            if not self.layer.in_chunked_prefill:
                self.check_state()
            tolerance = OUTPUT_TOLERANCE[self.case.dtype]
            for row, expected_HQD in enumerate(expected):
                actual_HQD = out_BHQD[row][:, call.real_BQ[row]].double()
                torch.testing.assert_close(actual_HQD, expected_HQD, atol=tolerance, rtol=tolerance)
            compared += 1
        return compared

    def turn_fits(self, call: Call) -> bool:
        counts = call.real_BQ.sum(1).tolist()
        return all(row.oracle.fits(count) for row, count in zip(self.rows, counts, strict=True))

    def expected(self, call: Call, row: int) -> torch.Tensor:
        query_HQD, key_KQD, value_KQD = call.real_columns(row)
        width = key_KQD.shape[1]
        if not width:
            return torch.zeros_like(query_HQD, dtype=torch.float64)
        if call.prefill:
            return self.rows[row].prefill(query_HQD, key_KQD, value_KQD)
        if call.is_turn:
            self.rows[row].oracle.begin_turn(width)
        columns = [
            self.rows[row].step(query_HQD[:, i], key_KQD[:, i], value_KQD[:, i], by_user=call.is_turn)
            for i in range(width)
        ]
        return torch.stack(columns, dim=1)

    def check_state(self) -> None:
        oracles = [row.oracle for row in self.rows]
        residents = [oracle.residents() for oracle in oracles]
        assert self.layer.resident_positions() == residents
        assert self.layer.length_B.tolist() == [oracle.length for oracle in oracles]
        kept = sum(len(positions) for row in residents for positions in row)
        given = sum(oracle.length for oracle in oracles) * self.case.kv_heads
        assert self.layer.num_evicted == given - kept


def compare(case: Case, row_type: type[Row] = Row) -> int:
    return Run(case, row_type).compare()
