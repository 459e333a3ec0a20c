"""What the plugin cannot serve right is refused when vLLM starts: all reasons at once, and what to do about each.

`check_config` reads vLLM's whole configuration, in the front end before an engine is started and again in the engine.
`check_layer` reads what only the model's attention layers say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from longthink.errors import UnsupportedFeatureError, UnsupportedModelError
from longthink.vllm.config import KEY, PluginOptions, layer_policies
from longthink.vllm.versions import installed, supported_range

if TYPE_CHECKING:
    from vllm.config import VllmConfig

KV_DTYPES = ("auto", "float16", "bfloat16")


def check_version() -> None:
    """Refuse a vLLM that the plugin was not tested with.

    Raises
    ------
    UnsupportedFeatureError
        Names the version and the supported range.
    """
    vllm = installed()
    if vllm is None or not vllm.in_range:
        found = "none that pip knows of" if vllm is None else f"{vllm.distribution} {vllm.version}"
        raise UnsupportedFeatureError(f"longthink supports vllm{supported_range()}, and here is {found}")


def options_of(config: VllmConfig) -> PluginOptions | None:
    """Return the plugin's options in a configuration, or None where nobody asks for a bounded cache.

    Raises
    ------
    ValueError
        If an option is unknown, missing or out of range.
    """
    additional = config.additional_config
    if not isinstance(additional, Mapping) or KEY not in additional:
        return None
    return PluginOptions.from_additional_config(additional)


def check_config(config: VllmConfig) -> None:
    """Refuse a configuration with which a bounded cache would be served wrongly, or not at all.

    Raises
    ------
    UnsupportedFeatureError
        Names everything that is in the way, and what to do about it.
    ValueError
        If the plugin's own options are wrong, or do not go with the block size.
    """
    check_version()
    _refuse(UnsupportedFeatureError, (way(config) for way in _CONFIG))
    options = PluginOptions.from_additional_config(config.additional_config)
    policy = options.make_policy(config.cache_config.block_size)
    layer_policies(policy, range(getattr(config.model_config.hf_text_config, "num_hidden_layers", 1)))


def check_layer(
    *,
    alibi_slopes: Any = None,
    sliding_window: Any = None,
    kv_cache_dtype: str = "auto",
    logits_soft_cap: float | None = None,
    attn_type: str = "decoder",
    kv_sharing_target_layer_name: str | None = None,
    **extra: Any,
) -> None:
    """Refuse an attention layer that is more than plain causal softmax attention over its own keys.

    Parameters are those of vLLM's ``AttentionImpl``; whatever it does not name must be None.

    Raises
    ------
    UnsupportedModelError
        Names what the layer has.
    """
    sinks = extra.pop("sinks", None)
    unknown = sorted(name for name, value in extra.items() if value is not None)
    _refuse(
        UnsupportedModelError,
        (
            "layers with ALiBi positions" if alibi_slopes is not None else None,
            f"sliding-window layers (of {sliding_window} tokens)" if sliding_window is not None else None,
            _kv_dtype(kv_cache_dtype),
            f"logit soft-capping in attention ({logits_soft_cap})" if logits_soft_cap else None,
            f"attention of type {attn_type!r}" if attn_type != "decoder" else None,
            "layers that share their KV cache" if kv_sharing_target_layer_name is not None else None,
            "attention sinks" if sinks is not None else None,
            f"attention layers with {', '.join(unknown)}" if unknown else None,
        ),
    )


def _refuse(error: type[Exception], reasons: Iterable[str | None]) -> None:
    found = [reason for reason in reasons if reason is not None]
    if found:
        raise error("longthink cannot bound the KV cache with: " + "; ".join(found))


def _speculative(config: VllmConfig) -> str | None:
    if config.speculative_config is None:
        return None
    return "speculative decoding (drafts that are rejected would already have evicted pages): leave it off"


def _connector(config: VllmConfig) -> str | None:
    if config.kv_transfer_config is None:
        return None
    return "KV connectors and KV offloading (pages do not stay where the block table says): leave them off"


def _context_parallel(config: VllmConfig) -> str | None:
    parallel = config.parallel_config
    for side in ("prefill", "decode"):
        size = getattr(parallel, f"{side}_context_parallel_size")
        if size > 1:
            return f"{side} context parallelism ({side}_context_parallel_size={size}): set it to 1"
    return None


def _dual_batch(config: VllmConfig) -> str | None:
    return "dual-batch overlap: leave it off" if config.parallel_config.use_ubatching else None


def _kv_dtype(dtype: str) -> str | None:
    if dtype in KV_DTYPES:
        return None
    return f"quantized keys and values (kv_cache_dtype={dtype!r}): allowed is {', '.join(KV_DTYPES)}"


def _fast_prefill(config: VllmConfig) -> str | None:
    return "KV sharing (kv_sharing_fast_prefill)" if config.cache_config.kv_sharing_fast_prefill else None


def _prompt_embeddings(config: VllmConfig) -> str | None:
    if not config.model_config.enable_prompt_embeds:
        return None
    return "prompts given as embeddings (enable_prompt_embeds): leave it off"


def _model(config: VllmConfig) -> str | None:
    model = config.model_config
    if model.runner_type != "generate":
        return f"models that do not generate (runner {model.runner_type!r})"
    if model.is_encoder_decoder:
        return "encoder-decoder models (cross-attention)"
    if model.use_mla:
        return "multi-head latent attention (MLA)"
    if model.is_attention_free or model.is_hybrid:
        return "layers with a recurrent state beside or instead of attention"
    if model.is_mm_prefix_lm:
        return "attention in both directions over the prompt"
    text = model.hf_text_config
    foreign = sorted(set(getattr(text, "layer_types", None) or ()) - {"full_attention"})
    if foreign:
        return f"layers of type {', '.join(foreign)}"
    if getattr(text, "attention_chunk_size", None):
        return f"chunked attention (attention_chunk_size={text.attention_chunk_size})"
    return None


def _backend(config: VllmConfig) -> str | None:
    backend = config.attention_config.backend
    if backend is not None and backend.name == "CUSTOM":
        return None
    chosen = "vLLM's own choice" if backend is None else backend.name
    return f"the attention backend {chosen}: set --attention-backend CUSTOM"


_CONFIG: tuple[Callable[[VllmConfig], str | None], ...] = (
    _model,
    _speculative,
    _connector,
    _context_parallel,
    _dual_batch,
    lambda config: _kv_dtype(config.cache_config.cache_dtype),
    _fast_prefill,
    _prompt_embeddings,
    _backend,
)
