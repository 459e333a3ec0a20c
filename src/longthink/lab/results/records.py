"""The rows of a result store, each with everything needed to repeat and to judge it."""

import hashlib
import json
from dataclasses import dataclass, fields
from typing import Any, ClassVar

_LATER_FIELDS = ("kv_dtype", "kv_bits")


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The configuration of a sample; samples with equal setups may be averaged. Columns: docs/store.md."""

    model: str
    revision: str | None
    dtype: str
    policy: str  # shortest text, such as ``raas:r=0.25``
    switches: str  # all of its switches, as JSON
    budget: int | None  # tokens kept per layer
    decode_budget: int | None  # the same on top of the prompt; both None if everything is kept
    task: str
    seed: int
    temperature: float  # 0 is greedy
    top_p: float | None
    top_k: int | None
    max_new_tokens: int
    kv_dtype: str | None = None  # format of keys and values; None for the model's
    kv_bits: str | None = None  # bits of packed pages; None if none are

    @property
    def config_hash(self) -> str:
        return _hash(self, Setup)


@dataclass(frozen=True, kw_only=True)
class Sample(Setup):
    table: ClassVar[str] = "samples"
    key: ClassVar[tuple[str, ...]] = ("config", "problem", "sample")
    config: str  # `Setup.config_hash`
    problem: str
    sample: int  # which of several, from 0
    prompt_tokens: int
    generated_tokens: int
    text: str
    answer: str | None  # None: none found
    gold: str
    correct: bool
    finish: str  # ``stop``, ``length``, ``no_room`` (for the prompt) or ``nan`` (from the model)
    ms_per_token_early: float | None  # wall-clock mean of the first quarter; None below 8 tokens
    ms_per_token_late: float | None
    seconds: float  # from the prompt to the last token
    rows: int
    kv_bytes_peak: int  # allocated for keys and values, per row
    dense_kv_bytes: int  # that all tokens of this row would take
    evicted: int  # not resident at the end, summed over layers and KV heads
    versions: str  # JSON
    hardware: str  # JSON
    created: str  # UTC, ISO 8601


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The configuration of a fidelity measurement: one policy at one budget over texts of one source."""

    model: str
    revision: str | None
    dtype: str
    policy: str
    switches: str
    budget: int | None
    decode_budget: int | None
    source: str  # name of the file of texts, or ``answers of TASK``
    max_tokens: int | None  # texts are cut there
    sure: float  # thresholds of long-range tokens: docs/fidelity.md
    lost: float
    kv_dtype: str | None = None  # format of keys and values; None for the model's
    kv_bits: str | None = None  # bits of packed pages; None if none are

    @property
    def config_hash(self) -> str:
        return _hash(self, Reading)


@dataclass(frozen=True, kw_only=True)
class Fidelity(Reading):
    """Predictions under a cache beside those of the dense model on one text: sums over its scored tokens, in nats."""

    table: ClassVar[str] = "fidelity"
    key: ClassVar[tuple[str, ...]] = ("config", "text")
    config: str  # `Reading.config_hash`
    text: str  # identifier
    prompt_tokens: int
    decoded_tokens: int
    tokens: int  # scored: behind the budget; 0 if the text is too short, or its prompt has no room
    nll_dense: float  # negative log-likelihood of the text under the dense model
    nll: float  # and under the cache
    kl: float  # divergence of the cache's next-token distribution from the dense one
    differs: int  # tokens whose most likely next token is another one
    long_tokens: int  # long-range tokens among them, and the same sums over those
    long_nll_dense: float
    long_nll: float
    long_kl: float
    long_differs: int
    evicted: int  # at the end, summed over layers and KV heads
    kv_bytes: int  # keys and values resident at the end
    dense_kv_bytes: int
    seconds: float  # of the unit of work that it was part of, divided by texts and policies
    versions: str
    hardware: str
    created: str


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Time and memory of one cache at one decode length; times are CPU time on CPU, wall-clock elsewhere."""

    table: ClassVar[str] = "measurements"
    key: ClassVar[tuple[str, ...]] = ("run", "decode_tokens")
    run: str  # one curve over decoded tokens (those of a peer may have been prefilled)
    kind: str  # ``jct``, ``memory``, ``peers`` (beside other libraries) or ``batch`` (the same for batches)
    system: str  # a policy, a dense cache such as ``hf dynamic``, or a peer such as ``openvino f32 eviction``
    model: str
    dtype: str
    budget: int | None
    decode_budget: int | None
    rows: int
    prompt_tokens: int
    decode_tokens: int
    ms_per_token: float | None  # median of the steps around this length
    ms_per_token_low: float | None  # quartiles
    ms_per_token_high: float | None
    seconds: float | None  # job completion time, prompt included
    kv_bytes: int
    metadata_bytes: int  # positions, bounds and stamps
    rss_bytes: int | None  # None: not read
    device_bytes: int | None  # None on CPU
    fast_forwarded: bool  # whether the cache was filled with random keys up to this length
    threads: int
    versions: str
    hardware: str
    created: str


Record = Sample | Fidelity | Measurement


def _hash(record: Any, setup: type) -> str:
    # Rows from before the later fields keep their hashes.
    values = {field.name: getattr(record, field.name) for field in fields(setup)}
    text = json.dumps(
        {x: y for x, y in values.items() if y is not None or x not in _LATER_FIELDS}, sort_keys=True
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def to_row(record: Setup | Reading | Measurement) -> dict[str, Any]:
    return {field.name: getattr(record, field.name) for field in fields(record)}
