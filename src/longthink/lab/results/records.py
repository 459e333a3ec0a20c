"""The rows of a result store. A row says everything needed to repeat and to judge it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, fields
from typing import Any, ClassVar


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a sample is measured under; samples of equal setups may be averaged.

    Attributes
    ----------
    policy
        Shortest text that makes the policy, such as ``raas:r=0.25``.
    switches
        All switches of the policy, as JSON.
    budget, decode_budget
        Tokens kept per layer: in all, or on top of the prompt; both None where everything is kept.
    task
        Name of the problem set, such as ``gsm8k`` or ``reasoner/l/chain``.
    seed
        Seed of sampling (and of random policies); with greedy decoding it changes nothing else.
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
    config
        `Setup.config_hash`.
    problem
        Identifier of the problem within its task.
    sample
        Which of several samples of this problem, from 0.
    text, answer, gold
        What the model wrote after the prompt, the answer found in it (None: none), and the right one.
    finish
        ``stop`` (end token), ``length`` (cut off), ``no_room`` (the prompt does not fit in the budget or the model's
        context) or ``nan`` (the model's numbers broke).
    ms_per_token_early, ms_per_token_late
        Mean wall-clock time between two tokens of this row, over the first and the last quarter of its tokens
        (milliseconds; None below 8 tokens), with `rows` rows decoded side by side.
    seconds
        Wall-clock time from the prompt to the last token (job completion time).
    kv_bytes_peak
        Largest number of bytes allocated for keys and values, divided by the rows that share them.
    dense_kv_bytes
        Bytes that keys and values of all tokens of this row would take.
    evicted
        Tokens of this row seen and no longer resident at the end, summed over layers and KV heads.
    versions, hardware
        JSON objects.
    created
        UTC time, ISO 8601.
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
    run
        Identifier of the run that this point belongs to; one run is one curve.
    kind
        ``jct`` (time), ``memory``, ``peers`` (time beside other libraries) or ``batch`` (the same, of rows side by
        side).
    system
        What was measured: a policy's text such as ``raas``, a dense baseline of transformers, such as
        ``hf dynamic`` or ``hf static``, or a peer such as ``openvino f32 eviction``.
    decode_tokens
        Tokens decoded so far, prompt not counted; those of a peer may have been read as a prompt.
    ms_per_token
        Median time of a step around this length (milliseconds, CPU time on CPU, wall-clock time elsewhere).
    ms_per_token_low, ms_per_token_high
        Lower and upper quartile of the same (milliseconds).
    seconds
        Time to decode this many tokens, the prompt included (job completion time).
    kv_bytes, metadata_bytes
        Bytes allocated for keys and values, and for positions, representatives and stamps.
    rss_bytes
        Resident set size of the process, None where it was not read.
    device_bytes
        Bytes that the accelerator's allocator has handed out, None on CPU.
    fast_forwarded
        Whether the cache was filled with made-up keys up to this length instead of by decoding.
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
