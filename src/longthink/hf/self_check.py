"""A numerical self-check: once per kind of model, its logits through a cache of ours against those without us.

It finds models whose attention is something else than what `longthink.hf.support` knows: bidirectional, differential,
with more than one key per token, and so on. ``LONGTHINK_SELF_CHECK=0`` in the environment turns it off.

Shape suffixes: B rows, N columns, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from longthink.errors import LongthinkError, UnsupportedModelError
from longthink.hf.binding import hides_use_cache
from longthink.hf.placement import device_of
from longthink.hf.probe import undisturbed
from longthink.hf.support import text_tokens

if TYPE_CHECKING:
    from longthink.hf.cache import PagedCache

VARIABLE = "LONGTHINK_SELF_CHECK"
_COLUMNS, _PADDING, _STEPS = 20, 7, 3
_TOLERANCE = {torch.float64: 1e-2, torch.float32: 1e-2, torch.float16: 0.1}
_COARSE_TOLERANCE = 0.25
"""For bfloat16 and narrower formats."""
_SECONDS = 1.0
_PASSES, _BATCHED = 3, 20
"""Passes over the text that its comparison is reckoned to cost, and that of a batch with its steps."""

_log = logging.getLogger(__name__)
_lock = threading.RLock()


@dataclass(frozen=True)
class _Passed:
    """What the check has found out about a kind of model besides."""

    hides_use_cache: bool = False


_passed: dict[Hashable, _Passed] = {}


def self_check(model: PreTrainedModel, dense_cache: Callable[[], PagedCache]) -> None:
    """Compare the model with and without a cache of ours on a short text, once per class, configuration and dtype.

    Parameters
    ----------
    dense_cache
        Creates a cache for the model that evicts nothing.

    Raises
    ------
    UnsupportedModelError
        If the logits differ by more than rounding; the message says by how much.
    """
    if os.environ.get(VARIABLE) == "0":
        return
    key = _key(model)
    with _lock:
        if key not in _passed:
            # Only results are kept: a model that is refused is checked, and refused, again.
            _passed[key] = _check(model, dense_cache)
        if _passed[key].hides_use_cache:
            hides_use_cache.add(model)


def _key(model: PreTrainedModel) -> Hashable:
    config = json.dumps(model.config.to_dict(), sort_keys=True, default=repr)
    causal = all(getattr(part, "is_causal", True) is not False for part in model.modules())
    kind = type(model).__module__, type(model).__qualname__
    return kind, hashlib.sha256(config.encode()).digest(), causal, model.dtype, device_of(model).type


def _too_large(model: PreTrainedModel) -> str | None:
    """Why even a short text takes long, judged by where the weights are."""
    devices = {parameter.device.type for parameter in model.parameters()}
    placed = set(map(str, (getattr(model, "hf_device_map", None) or {}).values()))
    if placed & {"cpu", "disk"} and len(placed) > 1:
        return "some of its weights are loaded for every forward pass"
    if "meta" in devices:
        return "some of its weights are not in memory"
    if devices == {"cpu"} and _PASSES * (seconds := _expected_seconds(model)) > _SECONDS:
        return f"one pass would take some {seconds:.1f} s"
    return None


@torch.no_grad()
def _expected_seconds(model: PreTrainedModel) -> float:
    """Time of a pass over the text on a CPU, from that of a product with the model's largest matrix."""
    matrices = [weight for weight in model.parameters() if weight.dim() == 2 and weight.is_floating_point()]
    if not matrices:
        return 0.0
    largest = max(matrices, key=Tensor.numel)
    columns = largest.new_zeros(_COLUMNS, largest.shape[1])
    took = list[float]()
    for _ in range(2):  # the first product of a process starts threads
        start = time.perf_counter()
        torch.nn.functional.linear(columns, largest)
        took.append(time.perf_counter() - start)
    return min(took) * sum(weight.numel() for weight in model.parameters()) / largest.numel()


def _check(model: PreTrainedModel, dense_cache: Callable[[], PagedCache]) -> _Passed:
    if reason := _too_large(model):
        _log.info("self-check of %s skipped: %s", type(model).__name__, reason)
        return _Passed()
    with undisturbed(model):
        start = time.perf_counter()
        expected = list[Tensor]()
        try:
            expected.append(_alone(model, DynamicCache(config=model.config)))
            seconds = time.perf_counter() - start
            batched = _BATCHED * seconds <= _SECONDS
            if _PASSES * seconds > _SECONDS:
                _log.info("self-check of %s skipped: one pass takes %.1f s", type(model).__name__, seconds)
                return _Passed()
            expected += _batch(model, DynamicCache(config=model.config)) if batched else []
        except Exception as error:
            if not expected and _runs_alone(model):
                raise UnsupportedModelError(
                    f"{type(model).__name__} takes only a cache of its own kind, so use that one: {error}"
                ) from error
            # Such a model does not run on plain text, so there is nothing to compare with.
            _log.info("self-check of %s skipped: %s: %s", type(model).__name__, type(error).__name__, error)
            return _Passed()
        if not all(part_NV.isfinite().all() for part_NV in expected):
            return _Passed()  # damaged weights are reported when they are used
        with dense_cache() as cache:
            cache.binding.accepts_no_use_cache = True
            found = _found(model, cache, batched=batched)
    distance = max(map(_relative_error, expected, found))
    tolerance = _TOLERANCE.get(model.dtype, _COARSE_TOLERANCE)
    if not distance <= tolerance:
        raise UnsupportedModelError(
            f"{type(model).__name__} computes something else with a longthink cache: with nothing evicted, logits "
            f"of a test text of {_COLUMNS} tokens are off by {distance:.1%} of their spread, where rounding in "
            f"{model.dtype} explains at most {tolerance:.0%}; its attention is of a kind that longthink does not "
            f"support ({VARIABLE}=0 turns this check off)"
        )
    return _Passed(hides_use_cache=cache.binding.saw_no_use_cache)


def _runs_alone(model: PreTrainedModel) -> bool:
    """Whether the model reads a text if it may choose the cache."""
    try:
        model(_text(model)[:1, :_COLUMNS], use_cache=True)
    except Exception:
        return False
    return True


def _text(model: PreTrainedModel) -> Tensor:
    return text_tokens(model, 2 * (_COLUMNS + _STEPS)).view(2, -1)


def _alone(model: PreTrainedModel, cache: Cache) -> Tensor:
    """Logits of one text in one pass, without a mask."""
    logits: Tensor = model(_text(model)[:1, :_COLUMNS], past_key_values=cache, use_cache=True).logits
    return logits[0]


def _batch(model: PreTrainedModel, cache: Cache) -> list[Tensor]:
    """Logits of a batch whose second row has padding on its left: prompts, and steps, of each row."""
    text_BN = _text(model)
    mask_BN = torch.ones_like(text_BN)
    mask_BN[1, :_PADDING] = 0
    found = list[Tensor]()
    for start, end in [(0, _COLUMNS), *((i, i + 1) for i in range(_COLUMNS, _COLUMNS + _STEPS))]:
        mask = mask_BN[:, :end]
        out = model(text_BN[:, start:end], attention_mask=mask, past_key_values=cache, use_cache=True)
        found.append(out.logits)
    prompt_BNV, steps_BNV = found[0], torch.cat(found[1:], 1)
    return [prompt_BNV[0], prompt_BNV[1, _PADDING:], steps_BNV[0], steps_BNV[1]]


def _found(model: PreTrainedModel, cache: PagedCache, *, batched: bool) -> list[Tensor]:
    try:
        found = [_alone(model, cache)]
        cache.reset()
        return found + (_batch(model, cache) if batched else [])
    except UnsupportedModelError:
        raise
    except LongthinkError as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be used with a longthink cache: on a test text, {error}"
        ) from error
    except Exception as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} runs without a longthink cache and fails with one: {type(error).__name__}: "
            f"{error} ({VARIABLE}=0 turns this check off)"
        ) from error


def _relative_error(expected_NV: Tensor, found_NV: Tensor) -> float:
    """Distance of the logits relative to their spread, the median over columns.

    A median, because rounding may make a mixture of experts choose differently for single tokens.
    """
    expected_NV, found_NV = expected_NV.double(), found_NV.double()
    spread_N = (expected_NV - expected_NV.mean(-1, keepdim=True)).norm(dim=-1).clamp(min=1e-12)
    error_N = (found_NV - expected_NV).norm(dim=-1) / spread_N
    # A NaN of ours is as wrong as can be.
    return float(error_N.nan_to_num(torch.inf).median())
