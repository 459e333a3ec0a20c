"""`ForcedDecode`: a known text through the decode steps of a cache, many tokens a call (teacher forcing).

The layers of a model see a block of tokens as one matrix, and only attention goes token by token, through the same
decode step as in generation. So the logits are those that decoding would have given, at the cost of a prefill and of
the cache's own small steps.

Shape suffixes: B batch rows, N tokens of a block, V vocabulary, H query heads, K KV heads, D head dim.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from transformers import PreTrainedModel

from longthink.cache import QKV, LayerCache
from longthink.errors import UnsupportedFeatureError
from longthink.hf.binding import outside_inference
from longthink.hf.cache import PagedCache
from longthink.hf.placement import device_of
from longthink.hf.support import shares_keys
from longthink.hf.view import ViewLayer, view_of
from longthink.kernels import LogitRule
from longthink.kernels.compiled import compile_isolated, is_compile_disabled, mark_dynamic
from longthink.policies import grows, policy_spec

_log = logging.getLogger(__name__)

LOGITS_AT_ONCE = 1 << 25
"""Numbers in the logits of a block: they take 128 MiB in float32, a few times."""

PAYS_FROM = 20_000
"""Decode steps of a layer from which compiling them pays: half a millisecond each, against some ten seconds."""

FEW_KINDS = 4
"""Different policies in the layers of a cache up to which each is compiled."""

_programs: dict[Hashable, Callable[..., None]] = {}
"""Compiled decode steps of a layer: they depend on no model, so they serve all layers of all models."""


def compiles(model: PreTrainedModel, tokens: int) -> bool:
    """Whether compiling the decode step of a layer pays for so many tokens."""
    steps = tokens * model.config.get_text_config().num_hidden_layers
    return device_of(model).type == "cpu" and steps >= PAYS_FROM


def block_tokens(model: PreTrainedModel, rows: int) -> int:
    """Tokens of a block whose logits, for so many rows, take `LOGITS_AT_ONCE` numbers at most."""
    return max(16, LOGITS_AT_ONCE // (rows * model.config.get_text_config().vocab_size))


class ForcedDecode:
    """Decodes known tokens for every row of a cache that holds the prompts.

    A row whose text has ended may be given any tokens: rows do not see each other.

    Parameters
    ----------
    model, cache
        The model, and its open cache, in which every row has a prompt.
    compile
        Whether the decode step of a layer is compiled, which takes some seconds per policy and batch size. A step
        that cannot be compiled runs eagerly, and so do policies that differ in every layer, such as `random`.

    Raises
    ------
    CacheStateError
        If the cache is for another model; when called, if it is closed or a step was interrupted.
    """

    def __init__(self, model: PreTrainedModel, cache: PagedCache, *, compile: bool = False) -> None:
        cache.binding.check_model(model)
        if shares_keys(model.config):
            raise UnsupportedFeatureError(
                f"{type(model).__name__} has layers that read the keys and values of others, which change with each "
                "token of a block: decode token by token"
            )
        self._model = model
        self._cache = cache
        kinds = {layer.slots.policy for layer in cache.paged}
        compile = compile and len(kinds) <= FEW_KINDS and not is_compile_disabled()
        self._view = view_of(cache, [_Layer(layer.slots, compile) for layer in cache.paged])

    @torch.no_grad()
    @outside_inference
    def __call__(self, token_BN: Tensor) -> Tensor:
        """Logits after each of these tokens, BNV."""
        rows, tokens = token_BN.shape
        self._cache.begin_block(rows, tokens)
        first_B1 = self._cache.paged[0].slots.next_position_B[:, None]
        out = self._model(
            token_BN, position_ids=first_B1 + torch.arange(tokens, device=token_BN.device),
            past_key_values=self._view, use_cache=True,
        )  # fmt: skip
        self._cache.end_step(tokens)
        logits_BNV: Tensor = out.logits
        return logits_BNV


class _Layer(ViewLayer):
    slots: LayerCache

    def __init__(self, slots: LayerCache, compile: bool) -> None:
        super().__init__(slots)
        self._compile = compile
        if compile:
            slots.prepare_compile()

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
        """Append the tokens of a block one by one and return their attention output, BHND."""
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        # A clone has the same strides for every block, also for one of a single token.
        query, key, value = (
            mark_dynamic(tensor.clone(memory_format=torch.contiguous_format), 2)
            for tensor in (query, key, value)
        )
        out_BHND = mark_dynamic(query.new_empty(*query.shape[:3], value.shape[3]), 2)
        for index in torch.arange(query.shape[2], device=query.device).split(1):
            function = _step if self.slots.begin_step() is None else _open_and_step
            self._run(function, (query, key, value), out_BHND, index, scaling)
        return out_BHND

    def _run(self, function: Callable[..., None], block: QKV, *args: Any) -> None:
        if not self._compile:
            function(self.slots, block, *args)
            return
        query, key, value = block
        heads = query.shape[1], key.shape[1], key.shape[3], value.shape[3]
        form = self.slots.kv_dtype, self.slots.kv_bits
        shape = (len(query), *heads, query.dtype, *form, query.device)
        program = _programs.get(known := (function, self.slots.policy, shape))
        if program is None:
            program = _programs[known] = compile_isolated(function)
        try:
            program(self.slots, block, *args)
        except TorchDynamoException as error:
            # The compiler failed before anything ran, so the same step can run eagerly.
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            _log.warning(
                "the decode step of policy %r cannot be compiled (%s): decoding eagerly",
                policy_spec(self.slots.policy), reason,
            )  # fmt: skip
            _programs[known] = function
            function(self.slots, block, *args)


def _open_and_step(slots: LayerCache, block: QKV, out_BHND: Tensor, index: Tensor, scaling: float) -> None:
    slots.open_pages(evicts=not grows(slots.policy))
    _step(slots, block, out_BHND, index, scaling)


def _step(slots: LayerCache, block: QKV, out_BHND: Tensor, index: Tensor, scaling: float) -> None:
    # The index is a tensor, or every token would be compiled anew.
    query, key, value = (tensor.index_select(2, index)[:, :, 0] for tensor in block)
    out_BHND.index_copy_(2, index, slots.step((query, key, value), scaling)[:, :, None])
