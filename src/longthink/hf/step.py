"""`DecodeStep`: one more token for every row of a `PagedCache`, by a compiled program or eagerly.

The same two functions run in both cases: `_open_pages` opens pages, in the steps that need one, and `_forward` is the model
with the tensor part of the cache in it. What counts tokens stays on the host, outside of both.

Shape suffixes: B batch rows, V vocabulary.
"""

from __future__ import annotations

import importlib.util
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
from longthink.hf.attention import mark
from longthink.hf.binding import outside_inference
from longthink.hf.cache import PagedCache
from longthink.hf.linears import few_rows_backend
from longthink.kernels.compiled import compile_isolated, is_compile_disabled, without_guards
from longthink.policies import grows, policy_spec

Compile = Literal["auto"] | bool

PAYS_FROM = 8192
"""New tokens from which compiling pays for itself; `benchmarks/2026-11-21-step.md` has the measurement."""

_log = logging.getLogger(__name__)


class _StaticLayer:
    """A layer whose step has begun: what the attention function finds on the keys."""

    def __init__(self, slots: LayerCache) -> None:
        self.slots = slots

    def check_call(self, module: torch.nn.Module, dropout: float, use_cache: bool | None) -> None:
        """Nothing to refuse: the prompt came through a `PagedLayer`, which has looked."""

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None, scaling: float | None
    ) -> Tensor:
        """Attention output of one new token, B x H x 1 x D; all rows take part."""
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        new = query[:, :, 0], key[:, :, 0], value[:, :, 0]
        return self.slots.step(new, scaling)[:, :, None]

    def open_pages(self) -> Tensor:
        """Open the pages of the step that has begun, and return a tensor."""
        self.slots.open_pages(evicts=not grows(self.slots.policy))
        return self.slots.next_position_B


class _SharedLayer(_StaticLayer):
    """A layer that is compiled for one of its kind, and used by all: on CPUs, where a program takes long to make.

    The compiler does not see what such a region writes to. So outside of regions nothing may be read of a layer's
    tensors, and a region whose result nobody uses would be left out.
    """

    attend = nested_compile_region(_StaticLayer.attend)
    open_pages = nested_compile_region(_StaticLayer.open_pages)


class _StaticCache:
    """What the model sees of a cache while it decodes: nothing that changes from step to step but tensors."""

    is_compileable = True

    def __init__(self, cache: PagedCache, device: torch.device) -> None:
        kind = _SharedLayer if device.type == "cpu" else _StaticLayer
        self.layers = [kind(layer.slots) for layer in cache.layers]
        self.groups = group_layers([layer.slots for layer in cache.layers])
        grouped = [slots for group in self.groups for slots in group.layers]
        self.ungrouped = [layer for layer in self.layers if layer.slots not in grouped]

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return mark(key, self.layers[layer_idx]), value

    # Masks and positions of the library are made for a text of one token; the real positions are given.

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return query_length, 0


def _forward(model: PreTrainedModel, cache: _StaticCache, token_B1: Tensor, position_B1: Tensor) -> Tensor:
    """Logits after one more token of every row, B x V."""
    out = model(token_B1, position_ids=position_B1, past_key_values=cache, use_cache=True)
    return out.logits[:, -1]


def _open_pages(cache: _StaticCache, full: list[list[Tensor]]) -> list[Tensor]:
    """Open the pages of the step that has begun, as far as no kernel has done it for all layers of a group."""
    for group, full_LBK in zip(cache.groups, full, strict=True):
        group.save_tokens(full_LBK)
    return [layer.open_pages() for layer in cache.ungrouped]


class _Programs:
    """The two functions compiled, for one model and one shape of its cache."""

    def __init__(self, device: torch.device) -> None:
        how: dict[str, Any] = {"mode": "reduce-overhead"} if device.type == "cuda" else {}
        if device.type == "cpu":
            how = {"backend": few_rows_backend}
        # Sizes that may change are marked. The compiler would guess more from programs made before: those for other
        # numbers of rows, and then this one would be for any.
        self.by_function = {
            function: compile_isolated(function, dynamic=False, **how) for function in (_forward, _open_pages)
        }


_programs: weakref.WeakKeyDictionary[PreTrainedModel, dict[Hashable, _Programs]] = weakref.WeakKeyDictionary()


def _key(cache: PagedCache, rows: int) -> Hashable:
    """What a program is made for: policy and budget say all shapes, as what depends on a prompt is dynamic."""
    return cache.policy, cache.budget, cache.kv_dtype, rows


def check_compile(compile: Compile) -> None:
    """Raise `ValueError` unless it is ``auto``, True or False, and for True also if no compiler may run."""
    if not isinstance(compile, bool):
        check_choice("compile", compile, ("auto", True, False))
    elif compile and is_compile_disabled():
        raise UnsupportedFeatureError(
            "compile=True cannot be used while TORCHDYNAMO_DISABLE=1 or TORCH_COMPILE_DISABLE=1 switches torch's "
            "compiler off: give compile=False or 'auto'"
        )


def compiles(
    model: PreTrainedModel, cache: PagedCache, compile: Compile, *, rows: int, tokens: int | None
) -> bool:
    """Whether decoding shall be compiled: as asked for, or, with ``auto``, where it pays.

    Parameters
    ----------
    rows, tokens
        Rows and new tokens that are asked for; None where nobody knows how many.

    """
    if isinstance(compile, bool):
        return compile
    if is_compile_disabled():
        return False
    if _key(cache, rows) in _programs.get(model, {}):
        return True
    return tokens is not None and tokens >= PAYS_FROM and _has_compiler(model.device)


def _has_compiler(device: torch.device) -> bool:
    if device.type == "cpu":
        return any(shutil.which(name) for name in ("g++", "clang++", "cl"))
    return importlib.util.find_spec("triton") is not None


class DecodeStep:
    """One more token for every row of a cache that holds the prompts; call it with the tokens, B x 1.

    Parameters
    ----------
    model, cache
        The model, and its open cache, in which every row has a prompt.
    compile
        True: compiled, or an error. False: eager. ``auto``: compiled if a program of this shape is there already, or
        `tokens` are so many that compiling pays, and eager where the compiler fails.
    tokens
        Tokens that will be decoded, for ``auto``; None if nobody knows.

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
        self._asked = compile
        self._view = _StaticCache(cache, model.device)
        rows = cache.rows
        self.compiled = compiles(model, cache, compile, rows=rows, tokens=tokens)
        """Whether steps are compiled."""
        self._programs: _Programs | None = None
        self._bare: dict[Callable[..., Any], tuple[Hashable, Callable[..., Any] | None]] = {}
        self._key = _key(cache, rows)
        if self.compiled:
            of_model, key = _programs.setdefault(model, {}), self._key
            if key not in of_model:
                _log.warning(
                    "compiling the decode step of policy %r: its first tokens take about a minute longer, "
                    "later calls of this shape do not (compile=False decodes at once)",
                    policy_spec(cache.policy),
                )
                of_model[key] = _Programs(model.device)
            self._programs = of_model[key]
            for layer in cache.layers:
                layer.slots.prepare_compile()

    @torch.no_grad()
    @outside_inference
    def __call__(self, token_B1: Tensor) -> Tensor:
        """Logits after these tokens, B x V."""
        if token_B1.is_inference():
            # Programs are made for ordinary tensors, as all others of a step are.
            token_B1 = token_B1.clone()
        opens, view = self._cache.begin_step(len(token_B1)), self._view
        try:
            for group in view.groups:
                group.refresh()
            if opens:
                self._run(_open_pages, view, [group.choose_slots() for group in view.groups])
            position_B1 = self._cache.layers[0].slots.next_position_B[:, None]
            logits_BV: Tensor = self._run(_forward, self._model, view, token_B1, position_B1)
            for group in view.groups:
                group.stamp_pages()
        finally:
            for group in view.groups:
                group.release()
        self._cache.end_step()
        return logits_BV

    def _run(self, function: Callable[..., Any], *args: Any) -> Any:
        if self._programs is None:
            return function(*args)
        # Nothing that guards look at changes between two steps but the sizes of the slots.
        sizes = self._cache.sizes
        known, bare = self._bare.get(function, (None, None))
        if bare is not None and known == sizes:
            return bare(*args)
        program = self._programs.by_function[function]
        try:
            result = program(*args)
            # On CUDA the compiler has to see where a step begins, to replay its graphs.
            if self._model.device.type == "cpu":
                self._bare[function] = sizes, without_guards(program)
            return result
        except TorchDynamoException as error:
            # Nobody shall take it for a program that is there already.
            _programs.get(self._model, {}).pop(self._key, None)
            # The compiler has failed before anything ran: the same step can go on without it.
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            what = (
                f"the decode step of policy {policy_spec(self._cache.policy)!r} cannot be compiled ({reason})"
            )
            if self._asked is True:
                raise UnsupportedFeatureError(f"{what}: give compile=False or 'auto'") from error
            _log.warning("%s: it runs without", what)
        self._programs, self.compiled = None, False
        return function(*args)
