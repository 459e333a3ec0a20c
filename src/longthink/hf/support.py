"""Which Hugging Face models a paged cache serves right, and what it must know about them."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from longthink.errors import UnsupportedModelError

# Fields of a model's config that, when set, mean attention of another kind than plain softmax over all keys.
_FOREIGN_CONFIG = {
    "kv_lora_rank": "multi-head latent attention (MLA)",
    "attn_logit_softcapping": "logit soft-capping in attention",
    "attention_chunk_size": "chunked attention",
    "num_kv_shared_layers": "layers that share their KV cache",
    "alibi": "ALiBi positions",
    "add_cross_attention": "cross-attention",
}
_FOREIGN_MODULE = {"sinks": "attention sinks", "sliding_window": "sliding-window layers"}
_TURNING_ROPE = ("dynamic", "longrope")


def check_model(model: PreTrainedModel) -> None:
    """Refuse a model that would be served wrongly.

    Raises
    ------
    UnsupportedModelError
        Names what the model has that is not supported.
    """
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"model={type(model).__name__} is not a transformers PreTrainedModel{_instead(model)}"
        )
    reason = _unsupported(model)
    if reason is not None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has {reason}, which a bounded page cache cannot serve right; supported are "
            "decoder-only models with full softmax attention, such as Qwen2, Qwen3, Qwen3-MoE, Llama and Mistral"
        )


def _instead(model: Any) -> str:
    """Say what to write where something stands around a model."""
    if isinstance(getattr(model, "_orig_mod", None), PreTrainedModel):
        return (
            ": give the model that was compiled (model._orig_mod), and compile=True for a compiled decode step; "
            "torch.compile around the whole model would compile anew as the text grows"
        )
    if hasattr(model, "active_peft_config"):
        if not model.active_peft_config.is_prompt_learning:
            return ": give model.get_base_model(), in which the adapters stay active"
        if model.active_peft_config.peft_type in ("PREFIX_TUNING", "CARTRIDGE"):
            return ": prefix tuning fills the cache with vectors of no token, which a policy cannot count"
        return ": call model.generate(..., past_key_values=make_cache(model.get_base_model(), ...))"
    if isinstance(getattr(model, "module", None), PreTrainedModel):
        return ": give the model inside (model.module)"
    return ""


def _unsupported(model: PreTrainedModel) -> str | None:
    if model.config.is_encoder_decoder:
        return "an encoder and a decoder"
    if not model.can_generate():
        return "no language-model head to generate with"
    config = model.config.get_text_config(decoder=True)
    for field, reason in _FOREIGN_CONFIG.items():
        if getattr(config, field, None):
            return f"{reason} ({field}={getattr(config, field)!r})"
    foreign = sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention"})
    if foreign:
        return f"layers of type {', '.join(foreign)}"
    for name, module in model.named_modules():
        for attribute, reason in _FOREIGN_MODULE.items():
            if hasattr(module, "layer_idx") and getattr(module, attribute, None) is not None:
                return f"{reason} (in {name})"
    if getattr(config, "sliding_window", None) and getattr(config, "layer_types", None) is None:
        return f"sliding-window layers (sliding_window={config.sliding_window})"
    if not model._supports_attention_backend:
        return "attention code that cannot be replaced"
    return None


def rope_frequencies(model: PreTrainedModel) -> Tensor | None:
    """Rotation per position of each frequency pair, or None where keys cannot be turned afterwards."""
    config = model.config.get_text_config(decoder=True)
    if "mrope_section" in (getattr(config, "rope_parameters", None) or {}):
        return None  # image tokens count positions in three directions: a place in the cache is no position
    for module in model.modules():
        if hasattr(module, "inv_freq"):
            head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            turns = getattr(module, "rope_type", "default") in _TURNING_ROPE
            return None if turns or 2 * len(module.inv_freq) != head_dim else module.inv_freq
    return None
