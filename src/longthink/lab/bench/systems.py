"""The systems that are measured: longthink's caches, and the dense caches of transformers.

Each decodes the same model from the same prompt, greedily, one forward pass per token; only the caches differ.

Shape suffixes: B batch rows, N tokens.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from transformers import DynamicCache, PreTrainedModel, StaticCache
from typing_extensions import override

from longthink.cache.forward import fast_forward, random_like
from longthink.config import Budget
from longthink.errors import UnsupportedFeatureError
from longthink.hf import DecodeStep, PagedCache
from longthink.hf.support import check_model
from longthink.lab.bench.plan import Plan
from longthink.policies import Policy, make_policy, needs_budget, policy_spec


class System(ABC):
    name: str
    budget: Budget | None = None
    full_size_at_once: ClassVar[bool] = False
    """Whether the cache is allocated, and read, in its final size from the first token on."""

    def __init__(self, model: PreTrainedModel, prompt_BN: Tensor) -> None:
        self.model = model
        self.prompt_BN = prompt_BN
        self.decoded = -1  # tokens decoded so far; -1 before the prefill
        self.prefill_seconds = 0.0
        self.cache: Any = None
        self._token_B1 = prompt_BN[:, -1:]

    def go_to(self, length: int, *, fast: bool) -> None:
        """Bring the cache to `length` decoded tokens: by decoding or, if `fast`, by filling it with random data."""
        if self.decoded < 0:
            self._prefill(length)
        missing = length - self.decoded
        assert missing >= 0
        if not fast:
            self.decode(missing)
        elif missing:
            seed = torch.Generator(self.prompt_BN.device).manual_seed(length)
            with torch.no_grad():
                self._fill(missing, seed)
            self.decoded += missing

    @torch.no_grad()
    def decode(self, steps: int) -> None:
        for _ in range(steps):
            logits = self._forward(self._token_B1)
            self._token_B1 = logits[:, -1:].argmax(-1)
        self.decoded += steps

    @property
    def kv_bytes(self) -> int:
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers)

    @property
    def metadata_bytes(self) -> int:
        return 0

    @abstractmethod
    def _new_cache(self, length: int) -> Any:
        """Return an empty cache; `length` tokens are decoded before the first measurement."""

    @abstractmethod
    def _fill(self, tokens: int, seed: torch.Generator) -> None:
        pass

    def _forward(self, ids_BN: Tensor) -> Tensor:
        return self.model(input_ids=ids_BN, past_key_values=self.cache, use_cache=True).logits

    @torch.no_grad()
    def _prefill(self, length: int) -> None:
        self.cache = self._new_cache(length)
        now = clock(self.prompt_BN.device)
        started = now()
        logits = self.model(
            input_ids=self.prompt_BN, past_key_values=self.cache, use_cache=True, logits_to_keep=1
        ).logits
        self._token_B1 = logits[:, -1:].argmax(-1)
        self.prefill_seconds = now() - started
        self.decoded = 0


class PagedSystem(System):
    """A policy of longthink, `compiled` as `longthink.generate` compiles it. Compile time is not counted."""

    def __init__(
        self, model: PreTrainedModel, prompt_BN: Tensor, policy: Policy, budget: Budget | None,
        kv_dtype: str | None = None, *, compiled: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(model, prompt_BN)
        self.name = " ".join(filter(None, [policy_spec(policy), kv_dtype, "compiled" if compiled else None]))
        self.policy = policy
        self.budget = budget if needs_budget(policy) else None
        self.kv_dtype = kv_dtype
        self.compiled = compiled
        self._step: DecodeStep | None = None

    @override
    def _new_cache(self, length: int) -> PagedCache:
        return PagedCache(self.model, self.policy, self.budget, len(self.prompt_BN), self.kv_dtype)

    @override
    def _prefill(self, length: int) -> None:
        try:
            super()._prefill(length)
        finally:
            self.cache.close()

    @override
    def decode(self, steps: int) -> None:
        # Attached to the model only while decoding: the caches of transformers need the model unchanged.
        with self.cache:
            super().decode(steps)

    @override
    def _forward(self, ids_BN: Tensor) -> Tensor:
        if not self.compiled:
            return super()._forward(ids_BN)
        if self._step is None:
            self._step = DecodeStep(self.model, self.cache, compile=True)
        return self._step(ids_BN)[:, None]

    @override
    def _fill(self, tokens: int, seed: torch.Generator) -> None:
        heads = self.model.config.get_text_config(decoder=True).num_attention_heads
        for layer in self.cache.paged:
            fast_forward(layer.slots, tokens, heads=heads, generator=seed)
            layer.columns += tokens

    @property
    @override
    def kv_bytes(self) -> int:
        return self.cache.kv_bytes

    @property
    @override
    def metadata_bytes(self) -> int:
        return self.cache.metadata_bytes


class DynamicSystem(System):
    """The default cache of transformers: one `torch.cat` per layer and token."""

    name = "hf dynamic"

    @override
    def _new_cache(self, length: int) -> DynamicCache:
        return DynamicCache(config=self.model.config)

    @override
    def _fill(self, tokens: int, seed: torch.Generator) -> None:
        for layer in self.cache.layers:
            layer.keys, layer.values = (
                torch.cat([old, random_like(old, tokens, seed)], 2) for old in (layer.keys, layer.values)
            )


class StaticSystem(System):
    """The preallocated cache of transformers.

    It has room for `room` tokens after the length passed to `go_to`, or after `whole` decoded tokens; without
    `whole`, each length gets a new cache of exactly the size needed.
    """

    name = "hf static"
    full_size_at_once = True

    def __init__(
        self, model: PreTrainedModel, prompt_BN: Tensor, *, room: int, whole: int | None = None
    ) -> None:
        super().__init__(model, prompt_BN)
        self._room = room
        self._whole = whole

    @override
    def go_to(self, length: int, *, fast: bool) -> None:
        if self._whole is None:
            self.decoded = -1
        super().go_to(length, fast=fast)

    @override
    def _new_cache(self, length: int) -> StaticCache:
        decodes = length if self._whole is None else self._whole
        size = self.prompt_BN.shape[1] + decodes + self._room
        return StaticCache(config=self.model.config, max_cache_len=size)

    @override
    def _fill(self, tokens: int, seed: torch.Generator) -> None:
        old = self.prompt_BN.shape[1] + self.decoded
        for layer in self.cache.layers:
            for tensor in (layer.keys, layer.values):
                tensor[:, :, old : old + tokens] = random_like(tensor[:, :, :old], tokens, seed)
            layer.cumulative_length.fill_(old + tokens)


class CompiledSystem(StaticSystem):
    """The same with the model compiled as in transformers' `generate`. Compile time is not counted."""

    name = "hf static compiled"

    @override
    def _new_cache(self, length: int) -> StaticCache:
        # Each cache is compiled for anew; without a reset the compiler hits its recompilation limit.
        torch.compiler.reset()
        return super()._new_cache(length)

    @override
    def _forward(self, ids_BN: Tensor) -> Tensor:
        call = self.model.get_compiled_call(None)
        try:
            return call(input_ids=ids_BN, past_key_values=self.cache, use_cache=True).logits
        except TorchDynamoException as error:
            raise UnsupportedFeatureError(
                f"the model cannot be compiled here ({str(error).strip().splitlines()[0]}): "
                "leave 'compiled' out of the baselines"
            ) from error


def make_systems(model: PreTrainedModel, plan: Plan, *, room: int, whole: int | None = None) -> list[System]:
    """The systems of a plan: the baselines of transformers, then the policies. For `room` and `whole` see
    `StaticSystem`.
    """
    check_model(model)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(0)
    prompt_BN = torch.randint(vocabulary, (plan.rows, plan.prompt), generator=generator).to(model.device)
    systems: list[System] = []
    for name in plan.baselines:
        if name == "dynamic":
            systems.append(DynamicSystem(model, prompt_BN))
        else:
            static = StaticSystem if name == "static" else CompiledSystem
            systems.append(static(model, prompt_BN, room=room, whole=whole))
    for spec in plan.policies:
        for compiled in (False, True) if plan.compile else (False,):
            system = PagedSystem(
                model, prompt_BN, make_policy(spec), plan.budget, plan.kv_dtype, compiled=compiled
            )
            systems.append(system)
    return systems


def clock(device: torch.device) -> Callable[[], float]:
    """Clock of a device: CPU time of the process, or wall-clock time once the device is idle."""
    if device.type == "cpu":
        return time.process_time

    def synchronized() -> float:
        torch.accelerator.synchronize(device)
        return time.perf_counter()

    return synchronized
