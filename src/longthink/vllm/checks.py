"""Refuses what the plugin cannot serve correctly, when vLLM starts, naming all reasons at once.

`check_config` checks vLLM's configuration: in the front end before an engine starts, and again in the engine.
`check_layer` checks what only the attention layers of the model show.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from longthink.errors import UnsupportedFeatureError, UnsupportedModelError
from longthink.vllm.config import KEY, PluginOptions, layer_policies
from longthink.vllm.versions import installed, supported_range

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

KV_DTYPES = ("auto", "float16", "bfloat16")


def get_options(config: VllmConfig) -> PluginOptions | None:
    """Options of the plugin in a configuration; None if it does not enable longthink."""
    additional = config.additional_config
    if not isinstance(additional, Mapping) or KEY not in additional:
        return None
    return PluginOptions.from_additional_config(additional)


def check_config(config: VllmConfig) -> None:
    """Refuse a configuration that longthink does not support, naming every unsupported setting and the remedy."""
    vllm = installed()
    if vllm is None or not vllm.in_range:
        found = "no installed distribution" if vllm is None else f"{vllm.distribution} {vllm.version}"
        raise UnsupportedFeatureError(f"longthink supports vllm{supported_range()}, found {found}")
    _refuse(UnsupportedFeatureError, _unsupported_settings(config))
    options = PluginOptions.from_additional_config(config.additional_config)
    policy = options.make_policy(config.cache_config.block_size)
    layer_policies(policy, range(getattr(config.model_config.hf_text_config, "num_hidden_layers", 1)))


def check_layer(
    *,
    alibi_slopes: Any = None, sliding_window: Any = None, kv_cache_dtype: str = "auto",
    logits_soft_cap: float | None = None, attn_type: str = "decoder",
    kv_sharing_target_layer_name: str | None = None, **extra: Any,
) -> None:  # fmt: skip
    """Refuse an attention layer that is more than causal softmax attention over its own keys.

    Parameters are those of vLLM's ``AttentionImpl``; parameters unknown to the plugin must be None.
    """
    sinks = extra.pop("sinks", None)
    unknown = sorted(name for name, value in extra.items() if value is not None)
    features = {
        "layers with ALiBi positions": alibi_slopes is not None,
        f"sliding-window layers (of {sliding_window} tokens)": sliding_window is not None,
        _quantized(kv_cache_dtype): kv_cache_dtype not in KV_DTYPES,
        f"logit soft-capping in attention ({logits_soft_cap})": bool(logits_soft_cap),
        f"attention of type {attn_type!r}": attn_type != "decoder",
        "layers that share their KV cache": kv_sharing_target_layer_name is not None,
        "attention sinks": sinks is not None,
        f"attention layers with {', '.join(unknown)}": bool(unknown),
    }
    _refuse(UnsupportedModelError, (feature for feature, present in features.items() if present))


def _refuse(error: type[Exception], reasons: Iterable[str]) -> None:
    if found := "; ".join(reasons):
        raise error(f"longthink cannot bound the KV cache with: {found}")


def _unsupported_settings(config: VllmConfig) -> Iterator[str]:
    yield from _unsupported_model(config.model_config)
    if config.speculative_config is not None:
        yield "speculative decoding (rejected drafts would already have evicted pages): leave it off"
    if config.kv_transfer_config is not None:
        yield "KV connectors and KV offloading (decode blocks change in place): leave them off"
    for phase in ("prefill", "decode"):
        name = f"{phase}_context_parallel_size"
        if (size := getattr(config.parallel_config, name)) > 1:
            yield f"{phase} context parallelism ({name}={size}): set it to 1"
    if config.parallel_config.use_ubatching:
        yield "dual-batch overlap: leave it off"
    if config.cache_config.cache_dtype not in KV_DTYPES:
        yield _quantized(config.cache_config.cache_dtype)
    if config.cache_config.kv_sharing_fast_prefill:
        yield "KV sharing (kv_sharing_fast_prefill): leave it off"
    if config.model_config.enable_prompt_embeds:
        yield "prompts given as embeddings (enable_prompt_embeds): leave it off"
    if config.use_v2_model_runner and not _checks_requests():
        yield "the second model runner of vLLM 0.30, which cannot check requests: set VLLM_USE_V2_MODEL_RUNNER=0"
    backend = config.attention_config.backend
    if backend is None or backend.name != "CUSTOM":
        chosen = "chosen by vLLM" if backend is None else backend.name
        yield f"the attention backend {chosen}: set --attention-backend CUSTOM"


def _checks_requests() -> bool:
    """Whether vLLM's second model runner allows the checks of `longthink.vllm.requests`."""
    from longthink.vllm.compat import second_logits_processor

    return bool(second_logits_processor())


def _quantized(dtype: str) -> str:
    return f"quantized keys and values (kv_cache_dtype={dtype!r}): allowed are {', '.join(KV_DTYPES)}"


def _unsupported_model(model: ModelConfig) -> Iterator[str]:
    text = model.hf_text_config
    if model.runner_type != "generate":
        yield f"models that do not generate (runner {model.runner_type!r})"
    elif model.is_encoder_decoder:
        yield "encoder-decoder models (cross-attention)"
    elif model.use_mla:
        yield "multi-head latent attention (MLA)"
    elif model.is_attention_free or model.is_hybrid:
        yield "layers with a recurrent state"
    elif model.is_mm_prefix_lm:
        yield "bidirectional attention over the prompt"
    elif foreign := sorted(set(getattr(text, "layer_types", None) or ()) - {"full_attention"}):
        yield f"layers of type {', '.join(foreign)}"
    elif getattr(text, "attention_chunk_size", None):
        yield f"chunked attention (attention_chunk_size={text.attention_chunk_size})"
