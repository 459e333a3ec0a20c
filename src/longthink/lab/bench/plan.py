"""What to measure."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from longthink.config import KV_DTYPES, Budget, check_choice, check_int
from longthink.lab.bench.models import RANDOM

BASELINES = ("dynamic", "static", "compiled")
"""The dense caches of transformers: growing, preallocated, and preallocated with a compiled model."""
BLOCK = 32
"""Decode steps that are timed together: a multiple of every page size, so each block opens its share of pages."""

Report = Callable[[int, str], None]
"""Called with the number of blocks or rows done, and the name of the next system."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to measure; model, device and dtype as in `longthink.lab.bench.models.bench_model`."""

    model: str = RANDOM
    device: str = "auto"
    dtype: str = "auto"
    policies: Sequence[str] = ()  # specs such as ``raas:r=0.25``
    baselines: Sequence[str] = BASELINES
    budget: Budget  # of the policies that need one
    lengths: Sequence[int]  # numbers of decoded tokens at which to measure, in rising order
    prompt: int = 128  # tokens of each prompt
    rows: int = 1  # batch size
    repeats: int = 5  # timed blocks per system and length
    threads: int = 1
    compile: bool = False  # measure policies with a compiled decode step as well
    kv_dtype: str | None = None  # of keys and values under a policy; None for the model's own
    fast_forward: bool  # fill caches with random data between the lengths, instead of decoding

    def __post_init__(self) -> None:
        for name in ("prompt", "rows", "repeats", "threads"):
            check_int(name, getattr(self, name), 1)
        if self.kv_dtype is not None:
            check_choice("kv_dtype", self.kv_dtype, KV_DTYPES)
        for name in self.baselines:
            check_choice("baselines", name, BASELINES)
        if not self.policies and not self.baselines:
            raise ValueError("policies and baselines are empty: name at least one")
        if not self.lengths:
            raise ValueError("lengths is empty: name at least one")
        for length, before in zip(self.lengths, [0, *self.lengths], strict=False):
            check_int("lengths", length, 1)
            if length <= before:
                raise ValueError(f"lengths={','.join(map(str, self.lengths))} must rise")

    @property
    def measured_steps(self) -> int:
        """Decode steps at each length, including the warm-up block."""
        return BLOCK * (self.repeats + 1)
