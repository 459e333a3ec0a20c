"""Which Hugging Face models are supported, and what a cache needs to know about them."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from longthink.errors import UnsupportedModelError
from longthink.hf.keys import attention_is_replaceable
from longthink.hf.layer_kinds import has_pages, library_layers, window_of
from longthink.hf.placement import device_of
from longthink.hf.probe import undisturbed

# Config fields that, when set, mean attention other than that of each token to all before it.
_UNSUPPORTED_CONFIG = {
    "alibi": "ALiBi positions",
    "add_cross_attention": "cross-attention",
}


def check_model(model: PreTrainedModel) -> None:
    """Raise `UnsupportedModelError` for a model whose output would be wrong; the message names the reason."""
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"model={type(model).__name__} is not a transformers PreTrainedModel{_hint(model)}"
        )
    reason = _unsupported(model)
    if reason is not None:
        raise UnsupportedModelError(f"{type(model).__name__} has {reason}")


def _hint(model: Any) -> str:
    """What to pass instead of a wrapper around a model."""
    if isinstance(getattr(model, "_orig_mod", None), PreTrainedModel):
        return (
            ": pass the original model (model._orig_mod), with compile=True for a compiled decode step; "
            "torch.compile of the whole model would recompile as the text grows"
        )
    if hasattr(model, "active_peft_config"):
        if not model.active_peft_config.is_prompt_learning:
            return ": pass model.get_base_model(), in which the adapters stay active"
        if model.active_peft_config.peft_type in ("PREFIX_TUNING", "CARTRIDGE"):
            return ": prefix tuning fills the cache with vectors that belong to no token, which a policy cannot count"
        return ": call model.generate(..., past_key_values=make_cache(model.get_base_model(), ...))"
    if isinstance(getattr(model, "module", None), PreTrainedModel):
        return ": pass the wrapped model (model.module)"
    return ""


_DENSE = "use transformers' own cache, which keeps all of the text"


def _unsupported(model: PreTrainedModel) -> str | None:
    """Why a model cannot be served, and what to do instead."""
    if reason := unsupported_config(model.config):
        return reason
    if not model.can_generate():
        return "no language-model head to generate with: load it as a causal language model"
    if not attention_is_replaceable(model):
        return f"attention code that transformers cannot replace, so no other cache can serve it: {_DENSE}"
    return None


def unsupported_config(config: PreTrainedConfig) -> str | None:
    """Why no model of this configuration can be served, as far as the configuration says, and what to do instead."""
    if config.is_encoder_decoder:
        return f"an encoder and a decoder, and longthink serves decoders only: {_DENSE}"
    text = config.get_text_config(decoder=True)
    for field, reason in _UNSUPPORTED_CONFIG.items():
        if getattr(text, field, None):
            return f"{reason} ({field}={getattr(text, field)!r}), which a bounded cache does not support: {_DENSE}"
    try:
        layers = library_layers(config)
    except UnsupportedModelError as error:
        return f"{error}, whose cache in transformers is of a kind of its own: {_DENSE}"
    if any(map(has_pages, layers)):
        return None
    own = "use transformers' own cache, which does not grow with the text"
    windows = sorted({window for layer in layers if (window := window_of(layer)) is not None})
    if not windows:
        return f"no layer with attention to all of the text, so there is nothing to bound: {own}"
    return (
        f"a window of {', '.join(f'{window:,}' for window in windows)} tokens in every layer with attention, so "
        f"there is nothing to bound: {own}, or a checkpoint without a window (Mistral has none from v0.2 on)"
    )


def scales_by_columns(config: PreTrainedConfig) -> bool:
    """Whether layers scale their queries by the columns in the cache, one number for all rows (Llama 4)."""
    return bool(getattr(config.get_text_config(decoder=True), "attn_temperature_tuning", False))


def shares_keys(config: PreTrainedConfig) -> bool:
    """Whether layers read the keys and values of others (Gemma 3n)."""
    return bool(getattr(config.get_text_config(decoder=True), "num_kv_shared_layers", 0))


def text_tokens(model: PreTrainedModel, count: int) -> Tensor:
    """Token ids that stand for text in any model, shape (count,): evenly spread, without those of special meaning."""
    config = model.config.get_text_config(decoder=True)
    special = set[int]()
    for name, value in [*vars(config).items(), *vars(model.config).items()]:
        if name.endswith(("token_id", "token_index")):
            special.update(value if isinstance(value, list) else [value])
    vocabulary = model.get_input_embeddings().num_embeddings
    plain = [token for token in range(min(vocabulary, 4096)) if token not in special] or [0]
    # A fixed sequence without a short period.
    ids = [plain[(7 + 31 * i * (i + 3)) % len(plain)] for i in range(count)]
    return torch.tensor(ids, device=device_of(model))


_is_limit: weakref.WeakKeyDictionary[PreTrainedModel, dict[int, bool]] = weakref.WeakKeyDictionary()
"""Of each model, lengths that were tried."""


def text_limit(model: PreTrainedModel) -> int | None:
    """Columns of text beyond which keys that are in a cache are of no use to the model; None for models without.

    Such models, with RoPE of type longrope, rotate keys in another way as soon as a text is longer than that; and
    ``model.generate`` then drops the cache.
    """
    config = model.config.get_text_config(decoder=True)
    for parameters in (vars(model.config), vars(config), getattr(config, "rope_parameters", None) or {}):
        limit = parameters.get("original_max_position_embeddings")
        if not isinstance(limit, int):
            continue
        known = _is_limit.setdefault(model, {})
        if limit not in known:
            known[limit] = _drops_cache(model, limit) or _changes_rope(model, limit)
        if known[limit]:
            return limit
    return None


class _FullCache(DynamicCache):
    """A cache that says it holds a text."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self._columns = columns

    def __bool__(self) -> bool:
        return True

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._columns


def _drops_cache(model: PreTrainedModel, limit: int) -> bool:
    cache = _FullCache(limit)
    ids = torch.zeros(1, limit + 1, dtype=torch.int64, device=device_of(model))
    try:
        inputs = model.prepare_inputs_for_generation(
            ids, past_key_values=cache, next_sequence_length=1, use_cache=True, is_first_iteration=False
        )
    except Exception:
        return True
    return inputs.get("past_key_values") is not cache


def _changes_rope(model: PreTrainedModel, limit: int) -> bool:
    """Whether the angles of position 1 depend on whether a position beyond the limit is there."""
    for module in model.modules():
        frequencies = getattr(module, "inv_freq", None)
        if not isinstance(frequencies, Tensor) or getattr(module, "rope_type", "default") in (
            "default",
            "dynamic",
        ):
            continue
        device = frequencies.device
        short, long = (torch.tensor([[1, last]], device=device) for last in (2, limit))
        with undisturbed(model):
            try:
                cosines = [module(torch.zeros(1, 2, 1, device=device), ids)[0][:, 0] for ids in (short, long)]
            except Exception:
                return True
        if not torch.equal(*cosines):
            return True
    return False
