"""`DecodeStep`: decodes one token for every row of a `PagedCache`, compiled or eagerly.

Both run the same two functions: `_open_pages`, in steps in which a row begins a page, and `_forward`, the model with
the tensor part of the cache in it. Counting tokens stays on the host, outside of both.

`_StaticCache` is the cache as the compiler sees it: it shares the slots of a `PagedCache`, but nothing in it changes
from step to step except tensors, or every token would be compiled anew.

Shape suffixes: B batch rows, V vocabulary.
"""

from __future__ import annotations

import logging
import shutil
import weakref
from collections.abc import Callable, Hashable
from typing import Any, Literal

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch.compiler import nested_compile_region
from transformers import PreTrainedModel

from longthink.accelerators import group_layers
from longthink.cache import LayerCache
from longthink.config import check_choice
from longthink.errors import UnsupportedFeatureError
from longthink.hf.binding import outside_inference
from longthink.hf.cache import PagedCache
from longthink.hf.linears import few_rows_backend
from longthink.hf.placement import device_of, is_spread
from longthink.hf.support import scales_by_columns, shares_keys
from longthink.hf.view import ViewLayer, ViewWindow, view_of
from longthink.kernels import HAS_TRITON, LogitRule
from longthink.kernels.compiled import compile_isolated, is_compile_disabled, without_guards
from longthink.policies import grows, policy_spec

Compile = Literal["auto"] | bool

PAYS_FROM = 8192
"""New tokens from which compiling pays off; `benchmarks/2026-11-21-step.md` has the measurement."""

COMPILING = (
    "compiling the decode step of policy %r: this takes about a minute, once per process for this model, policy, "
    "budget and batch size; compile=False (--compile off) starts at once"
)
"""Logged before the first step of a shape; the logger ``longthink`` shows or silences it."""

_log = logging.getLogger(__name__)


class _StaticLayer(ViewLayer):
    slots: LayerCache

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        valid: Tensor | None,
        scaling: float | None,
        rule: LogitRule,
        seen: Tensor | None,
    ) -> Tensor:
        """Append one token for every row and return its attention output, B x H x 1 x D."""
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        new = query[:, :, 0], key[:, :, 0], value[:, :, 0]
        return self.slots.step(new, scaling)[:, :, None]

    def open_pages(self) -> Tensor:
        # Returns a tensor because the compiler drops regions whose result is unused.
        self.slots.open_pages(evicts=not grows(self.slots.policy))
        return self.slots.next_position_B


class _SharedLayer(_StaticLayer):
    """A layer compiled once for all layers of the same kind: on CPUs, where compiling is slow.

    The compiler does not see what such a region writes to, so nothing outside may read a layer's tensors.
    """

    attend = nested_compile_region(_StaticLayer.attend)
    open_pages = nested_compile_region(_StaticLayer.open_pages)


class _SharedWindow(ViewWindow):
    """Likewise for windows."""

    attend = nested_compile_region(ViewWindow.attend)


class _StaticCache:
    def __init__(self, cache: PagedCache, device: torch.device) -> None:
        kind = _SharedLayer if device.type == "cpu" else _StaticLayer
        self.layers = [kind(layer.slots) for layer in cache.paged]
        self.view = view_of(cache, self.layers, _SharedWindow if device.type == "cpu" else ViewWindow)
        self.groups = group_layers([layer.slots for layer in cache.paged])
        grouped = [slots for group in self.groups for slots in group.layers]
        self.ungrouped = [layer for layer in self.layers if layer.slots not in grouped]


def _forward(model: PreTrainedModel, cache: _StaticCache, token_B1: Tensor, position_B1: Tensor) -> Tensor:
    out = model(token_B1, position_ids=position_B1, past_key_values=cache.view, use_cache=True)
    return out.logits[:, -1]


def _open_pages(cache: _StaticCache, full: list[list[Tensor]]) -> list[Tensor]:
    """Open pages: in grouped layers those that one kernel has chosen for all, in the others layer by layer."""
    for group, full_LBK in zip(cache.groups, full, strict=True):
        group.save_tokens(full_LBK)
    return [layer.open_pages() for layer in cache.ungrouped]


_Programs = dict[Callable[..., Any], Any]
"""The two functions compiled, for one model and one shape of its cache."""

_programs: weakref.WeakKeyDictionary[PreTrainedModel, dict[Hashable, _Programs]] = weakref.WeakKeyDictionary()
"""Programs that have run, by model and `_key`."""


def _new_programs(device: torch.device) -> _Programs:
    options: dict[str, Any] = {"mode": "reduce-overhead"} if device.type == "cuda" else {}
    if device.type == "cpu":
        options = {"backend": few_rows_backend}
    # Sizes that vary are marked. With dynamic=None the compiler would generalise from earlier programs: after one for
    # another batch size, this one would be made for any.
    return {
        function: compile_isolated(function, dynamic=False, **options) for function in (_forward, _open_pages)
    }


def _key(cache: PagedCache, rows: int) -> Hashable:
    """What a program depends on: policy and budget fix all shapes but those that depend on a prompt, which vary."""
    return *cache.settings, rows


def check_compile(compile: Compile) -> None:
    """Raise `ValueError` unless it is ``auto``, True or False, and refuse True where torch's compiler is disabled."""
    if not isinstance(compile, bool):
        check_choice("compile", compile, ("auto", True, False))
    elif compile and is_compile_disabled():
        raise UnsupportedFeatureError(
            "compile=True cannot be used while TORCHDYNAMO_DISABLE=1 or TORCH_COMPILE_DISABLE=1 disables torch's "
            "compiler: pass compile=False or 'auto'"
        )


def compiles(
    model: PreTrainedModel, cache: PagedCache, compile: Compile, *, rows: int, tokens: int | None
) -> bool:
    """Whether to compile `rows` rows and `tokens` new tokens (None if unknown): as requested, or if it pays."""
    if isinstance(compile, bool):
        if compile and (reason := uncompilable(cache)):
            raise UnsupportedFeatureError(
                f"compile=True cannot be used: {reason}; pass compile=False or 'auto'"
            )
        return compile
    if uncompilable(cache) is not None:
        return False
    if is_compile_disabled():
        return False
    if _key(cache, rows) in _programs.get(model, {}):
        return True
    return tokens is not None and tokens >= PAYS_FROM and _has_compiler(device_of(model))


def uncompilable(cache: PagedCache) -> str | None:
    """Why decode steps of this cache cannot be compiled; None if they can."""
    if shares_keys(cache.binding.model.config):
        return "the model has layers that read the keys and values of others"
    if scales_by_columns(cache.binding.model.config):
        return "the model scales its queries by the number of columns in its cache, which each step changes"
    if is_spread(cache.binding.model):
        return "accelerate moves the model's weights or inputs between devices, which torch's compiler does not trace"
    if any(layer.expands for layer in cache.paged):
        return "the model computes other keys from those that it gives to a cache"
    return None


def _has_compiler(device: torch.device) -> bool:
    if device.type == "cpu":
        return any(shutil.which(name) for name in ("g++", "clang++", "cl"))
    return HAS_TRITON


class DecodeStep:
    """Decodes one token for every row of a cache that holds the prompts; call it with the last tokens, B x 1.

    Parameters
    ----------
    model, cache
        The model, and its open cache, in which every row has a prompt.
    compile
        True: compiled, or an error. False: eager. ``auto``: compiled if this shape has been compiled before or
        `tokens` is at least `PAYS_FROM`; eager if compiling fails.
    tokens
        Number of tokens to decode, for ``auto``; None if unknown.

    Raises
    ------
    ValueError
        If `compile` is none of these.
    UnsupportedFeatureError
        When called: if `compile` is True and the policy or the model cannot be compiled.
    CacheStateError
        If the cache is for another model; when called, if it is closed or a step was interrupted.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: PagedCache,
        *,
        compile: Compile = "auto",
        tokens: int | None = None,
    ) -> None:
        check_compile(compile)
        cache.binding.check_model(model)
        self._model = model
        self._cache = cache
        self._compile = compile
        self._static = _StaticCache(cache, device_of(model))
        self.compiled = compiles(model, cache, compile, rows=cache.rows, tokens=tokens)
        """Whether steps are compiled."""
        self._programs: _Programs | None = None
        self._unguarded: dict[Callable[..., Any], tuple[Hashable, Callable[..., Any] | None]] = {}
        self._key = _key(cache, cache.rows)
        if self.compiled:
            self._programs = _programs.get(model, {}).get(self._key)
            if self._programs is None:
                self._programs = _new_programs(device_of(model))
                if tokens != 1:  # the only token comes from the prefill: no step follows
                    _log.warning(COMPILING, policy_spec(cache.policy))
            cache.prepare_compile()

    @torch.no_grad()
    @outside_inference
    def __call__(self, token_B1: Tensor) -> Tensor:
        """Logits after these tokens, B x V."""
        if token_B1.is_inference():
            # Programs are compiled for ordinary tensors.
            token_B1 = token_B1.clone()
        opens, static = self._cache.begin_step(len(token_B1)), self._static
        try:
            for group in static.groups:
                group.refresh()
            if opens:
                self._run(_open_pages, static, [group.choose_slots() for group in static.groups])
            position_B1 = self._cache.paged[0].slots.next_position_B[:, None]
            logits_BV: Tensor = self._run(_forward, self._model, static, token_B1, position_B1)
            for group in static.groups:
                group.stamp_pages()
        finally:
            for group in static.groups:
                group.release()
        self._cache.end_step()
        return logits_BV

    def _run(self, function: Callable[..., Any], *args: Any) -> Any:
        if self._programs is None:
            return function(*args)
        # Of all that guards check, only the sizes of the slots can change between two steps.
        sizes = self._cache.sizes
        known, unguarded = self._unguarded.get(function, (None, None))
        if unguarded is not None and known == sizes:
            return unguarded(*args)
        program = self._programs[function]
        try:
            result = program(*args)
        except TorchDynamoException as error:
            # The compiler failed before anything ran, so the same step can run eagerly.
            _programs.get(self._model, {}).pop(self._key, None)
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            problem = (
                f"the decode step of policy {policy_spec(self._cache.policy)!r} cannot be compiled ({reason})"
            )
            if self._compile is True:
                raise UnsupportedFeatureError(f"{problem}: pass compile=False or 'auto'") from error
            _log.warning("%s: decoding eagerly", problem)
            self._programs, self.compiled = None, False
            return function(*args)
        _programs.setdefault(self._model, {}).setdefault(self._key, self._programs)
        # On CUDA the guards stay: the compiler must see where a step begins, to replay its graphs.
        if device_of(self._model).type == "cpu":
            self._unguarded[function] = sizes, without_guards(program)
        return result
