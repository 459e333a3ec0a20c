"""The rows of a result store, each with everything needed to repeat and to judge it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, fields
from typing import Any, ClassVar


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The configuration of a sample; samples with equal setups may be averaged.

    Attributes
    ----------
    policy, switches
        Shortest text that specifies the policy, such as ``raas:r=0.25``; all its switches as JSON.
    budget, decode_budget
        Tokens kept per layer: in total, or on top of the prompt; both None if everything is kept.
    seed
        Seed of sampling and of random policies.
    temperature, top_p, top_k
        How tokens were chosen; temperature 0 is greedy.
    """

    model: str
    revision: str | None
    dtype: str
    policy: str
    switches: str
    budget: int | None
    decode_budget: int | None
    task: str
    seed: int
    temperature: float
    top_p: float | None
    top_k: int | None
    max_new_tokens: int

    @property
    def config_hash(self) -> str:
        """First 16 hex digits of the SHA-256 of the setup's fields."""
        text = json.dumps({field.name: getattr(self, field.name) for field in fields(Setup)}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class Sample(Setup):
    """One answer of one model to one problem.

    Attributes
    ----------
    config, problem, sample
        The key: `Setup.config_hash`, the problem within its task, and which of several samples, from 0.
    text, answer, gold
        What the model wrote after the prompt, the answer found in it (None: none), and the right one.
    finish
        ``stop`` (end token), ``length`` (token limit), ``no_room`` (the prompt does not fit in the budget or the
        model's context) or ``nan`` (the model produced NaN).
    ms_per_token_early, ms_per_token_late
        Mean wall-clock time between two tokens, over the first and the last quarter of the row (milliseconds; None
        below 8 tokens), in a batch of `rows`.
    seconds
        Wall-clock time from the prompt to the last token (job completion time).
    kv_bytes_peak, dense_kv_bytes
        Largest number of bytes allocated for keys and values, divided by the rows that share them; bytes that all
        tokens of this row would take.
    evicted
        Tokens of this row not resident at the end, summed over layers and KV heads.
    versions, hardware, created
        JSON, JSON, UTC time in ISO 8601.
    """

    table: ClassVar[str] = "samples"
    key: ClassVar[tuple[str, ...]] = ("config", "problem", "sample")

    config: str
    problem: str
    sample: int
    prompt_tokens: int
    generated_tokens: int
    text: str
    answer: str | None
    gold: str
    correct: bool
    finish: str
    ms_per_token_early: float | None
    ms_per_token_late: float | None
    seconds: float
    rows: int
    kv_bytes_peak: int
    dense_kv_bytes: int
    evicted: int
    versions: str
    hardware: str
    created: str


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Time and memory of one cache at one decode length.

    Attributes
    ----------
    run, decode_tokens
        The key: one run is one curve over the number of decoded tokens (those of a peer may have been prefilled).
    kind
        ``jct`` (time), ``memory``, ``peers`` (time beside other libraries) or ``batch`` (the same for batches).
    system
        A policy such as ``raas``, a dense baseline of transformers such as ``hf dynamic``, or a peer such as
        ``openvino f32 eviction``.
    ms_per_token, ms_per_token_low, ms_per_token_high
        Median and quartiles of the time of a step around this length (milliseconds; CPU time on CPU, wall-clock time
        elsewhere).
    seconds
        Time to decode this many tokens, prompt included (job completion time).
    kv_bytes, metadata_bytes
        Bytes allocated for keys and values, and for positions, bounds and stamps.
    rss_bytes, device_bytes
        Resident set size (None: not read) and bytes allocated on the accelerator (None on CPU).
    fast_forwarded
        Whether the cache was filled with random keys up to this length instead of by decoding.
    threads
        CPU threads of a step.
    """

    table: ClassVar[str] = "measurements"
    key: ClassVar[tuple[str, ...]] = ("run", "decode_tokens")

    run: str
    kind: str
    system: str
    model: str
    dtype: str
    budget: int | None
    decode_budget: int | None
    rows: int
    prompt_tokens: int
    decode_tokens: int
    ms_per_token: float | None
    ms_per_token_low: float | None
    ms_per_token_high: float | None
    seconds: float | None
    kv_bytes: int
    metadata_bytes: int
    rss_bytes: int | None
    device_bytes: int | None
    fast_forwarded: bool
    threads: int
    versions: str
    hardware: str
    created: str


Record = Sample | Measurement


def to_row(record: Setup | Measurement) -> dict[str, Any]:
    """Return the fields of a record, or of a setup, by name and in order."""
    return {field.name: getattr(record, field.name) for field in fields(record)}
