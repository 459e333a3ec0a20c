"""A tiny random model of every decoder-only class that transformers lists for causal language modelling."""

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)

VOCABULARY, WINDOW = 96, 8
LARGEST = 20_000_000
"""Parameters beyond which a model is not tiny: its configuration has sizes of its own that are not set here."""

_SIZES: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    max_position_embeddings=512,
    head_dim=8,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    sliding_window=WINDOW,
    num_experts=4,
    num_local_experts=4,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
)
_LATENT = dict(
    kv_lora_rank=16,
    q_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=16,
    v_head_dim=12,
    head_dim=8,
    num_key_value_heads=4,
    n_shared_experts=1,
    first_k_dense_replace=1,
    n_group=1,
    topk_group=1,
)
_MAMBA = dict(
    mamba_d_state=8,
    mamba_n_heads=4,
    mamba_d_head=16,
    mamba_n_groups=1,
    mamba_expand=2,
    mamba_d_conv=4,
    mamba_chunk_size=8,
)
_HALF_LINEAR = ["linear_attention", "full_attention"] * 2
DROPPED = object()
"""For a size that a configuration does not take."""
OVERRIDES: dict[str, dict[str, Any]] = {
    "axk1": _LATENT,
    "axk2": _LATENT,
    "bamba": _MAMBA | {"attn_layer_indices": [1, 3]},
    "cohere2": {"sliding_window_pattern": 2},
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "cwm": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "dots1": {"n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    "exaone4": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "exaone_moe": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "codegen": {"rotary_dim": 4},
    "falcon": {"head_dim": DROPPED, "alibi": False},
    "falcon_h1": _MAMBA | {"mamba_d_ssm": 64},
    "gemma2": {"query_pre_attn_scalar": 8, "attn_logit_softcapping": 1.0},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "gemma4_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 0,
        "global_head_dim": 16,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": VOCABULARY,
    },
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY, "altup_num_inputs": 2,
        "laurel_rank": 4, "intermediate_size": [48] * 4, "activation_sparsity_pattern": [0.0] * 4,
    },
    "glm4_moe_lite": _LATENT,
    "gptj": {"rotary_dim": 4},
    "gpt_neo": {"attention_types": [[["global"], 4]], "num_layers": 4, "num_heads": 4},
    "gpt_oss": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "granitemoehybrid": _MAMBA | {"layer_types": ["mamba", "attention"] * 2, "shared_intermediate_size": 16},
    "jamba": {
        "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "kimi_linear": _LATENT | {"layer_types": _HALF_LINEAR, "linear_num_heads": 4, "linear_head_dim": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 2},
    "llama4_text": {"attention_chunk_size": WINDOW, "intermediate_size_mlp": 48},
    "longcat_flash": _LATENT | {
        "ffn_hidden_size": 32, "expert_ffn_hidden_size": 16, "zero_expert_num": 1, "moe_topk": 2, "num_layers": 2,
    },
    "minicpm3": _LATENT,
    "minimax": {"layer_types": _HALF_LINEAR, "block_size": 8},
    "mistral": {"sliding_window": None},
    "ministral3": {"sliding_window": None},
    "mixtral": {"sliding_window": None},
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention", "mlp", "attention"], "mamba_num_heads": 4, "mamba_head_dim": 16,
        "ssm_state_size": 8, "n_groups": 1, "chunk_size": 8,
    },
    "olmo3": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "olmo_hybrid": {"layer_types": _HALF_LINEAR},
    "phi3": {"sliding_window": None},
    "phimoe": {"sliding_window": None},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 2},
    "qwen3": {"use_sliding_window": True, "max_window_layers": 2},
    "qwen3_next": {
        "layer_types": _HALF_LINEAR, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_conv_kernel_dim": 4,
        "shared_expert_intermediate_size": 16, "decoder_sparse_step": 1,
    },
    "roc_bert": {},
    "starcoder2": {"sliding_window": None},
    "vaultgemma": {"attn_logit_softcapping": 1.0},
    "youtu": _LATENT,
}  # fmt: skip
for _name in ("qwen3_5_text", "qwen3_5_moe_text"):
    OVERRIDES[_name] = OVERRIDES["qwen3_next"]
OVERRIDES |= {name: {"is_decoder": True} for name in ("bert", "electra", "roberta", "xlm-roberta")}
FAMILIES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


class NotTriedError(Exception):
    """No tiny model of this family was built; the message says why."""


def tiny(family: str, **more: Any) -> PreTrainedModel:
    """A random model with four layers, whose weights are large enough for attention to matter.

    Raises
    ------
    NotTriedError
        If the family has no decoder of text alone, or its sizes cannot be set as those of the others.
    """
    try:
        kind = CONFIG_MAPPING[family]
        # A field that a configuration does not know would be kept, and read by whoever looks for it.
        unknown = [name for name in ("sliding_window", "num_key_value_heads") if not hasattr(kind(), name)]
        given = _SIZES | dict.fromkeys(unknown, DROPPED) | OVERRIDES.get(family, {}) | more
        config = kind(**{name: value for name, value in given.items() if value is not DROPPED})
        if config.is_encoder_decoder:
            raise NotTriedError("an encoder and a decoder")
        if set(config.sub_configs) & {"vision_config", "audio_config"}:
            raise NotTriedError("takes images or sound: its text model stands for it")
        found = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        model_class = found[0] if isinstance(found, tuple) else found
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in model_class(config).parameters())
        if size > LARGEST:
            raise NotTriedError(f"{size / 1e6:,.0f} million parameters with these sizes")
        torch.manual_seed(0)
        model = model_class(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim >= 2:
                    parameter.mul_(4)
                if name.endswith("sinks"):
                    parameter.add_(2)
            model(torch.arange(3, 23)[None])
    except NotTriedError:
        raise
    except Exception as error:
        raise NotTriedError(f"not built with these sizes ({type(error).__name__})") from error
    if getattr(config, "attn_logit_softcapping", None):
        # Older versions of transformers choose SDPA here, which leaves the soft cap out.
        model.set_attn_implementation("eager")
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model
