"""Unsupported settings, in vLLM configurations made from real options and real model folders."""

import pytest
from transformers import DeepseekV2Config, Gemma3TextConfig, JambaConfig, Llama4TextConfig, WhisperConfig
from vllm.config import KVTransferConfig
from vllm.engine.arg_utils import EngineArgs

from longthink.errors import UnsupportedFeatureError, UnsupportedModelError
from longthink.vllm.checks import check_config, check_layer
from tests.vllm.conftest import SIZES

pytestmark = pytest.mark.slow

OPTIONS = {"longthink": {"policy": "raas", "decode_budget": 256, "max_prompt_tokens": 128}}


def configure(model, **options):
    """The VllmConfig that a server would make from these options."""
    fixed = dict(dtype="float32", enforce_eager=True, max_model_len=2048, skip_tokenizer_init=True)
    fixed |= dict(block_size=16, attention_backend="CUSTOM", additional_config=OPTIONS)
    return EngineArgs(model=str(model), **fixed | options).create_engine_config()


def test_plain_configuration_passes(qwen2):
    check_config(configure(qwen2))


NGRAM = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
CONNECTOR = KVTransferConfig(kv_connector="ExampleConnector", kv_role="kv_both")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"speculative_config": NGRAM}, "speculative decoding"),
        ({"kv_transfer_config": CONNECTOR}, "KV connectors"),
        ({"kv_offloading_size": 1.0}, "KV connectors and KV offloading"),
        ({"tensor_parallel_size": 4, "decode_context_parallel_size": 2}, "decode_context_parallel_size=2"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype='fp8"),
        ({"kv_sharing_fast_prefill": True}, "KV sharing"),
        ({"enable_prompt_embeds": True}, "prompts given as embeddings"),
        ({"attention_backend": None}, "the attention backend chosen by vLLM: set --attention-backend CUSTOM"),
        ({"runner": "pooling", "convert": "embed"}, "models that do not generate"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refused_option(qwen2, options, message):
    with pytest.raises(UnsupportedFeatureError, match="cannot bound") as refusal:
        check_config(configure(qwen2, **options))
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        # On a CPU vLLM turns dual-batch overlap off and refuses prefill context parallelism, so these are set on the
        # finished configuration.
        ("enable_dbo", True, "dual-batch overlap"),
        ("prefill_context_parallel_size", 2, "prefill_context_parallel_size=2"),
    ],
)
def test_refused_option_of_gpus(qwen2, field, value, message):
    config = configure(qwen2)
    setattr(config.parallel_config, field, value)
    with pytest.raises(UnsupportedFeatureError, match=message):
        check_config(config)


def test_all_reasons_are_named_at_once(qwen2):
    with pytest.raises(UnsupportedFeatureError) as refusal:
        check_config(configure(qwen2, speculative_config=NGRAM, enable_prompt_embeds=True))
    assert "speculative decoding" in str(refusal.value)
    assert "prompts given as embeddings" in str(refusal.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_size": None}, "block_size=128 is not one of .*: give --block-size 16"),  # vLLM's default
        ({"additional_config": {}}, "without its options"),
        ({"additional_config": {"longthink": OPTIONS["longthink"] | {"buget": 1}}}, "no option 'buget'"),
        ({"additional_config": {"longthink": OPTIONS["longthink"] | {"policy": "h2o"}}}, "h2o"),
    ],
    ids=["block_size", "no options", "unknown option", "policy"],
)
def test_wrong_options_of_the_plugin(qwen2, changes, message):
    with pytest.raises(ValueError, match=message):
        check_config(configure(qwen2, **changes))


MLA = dict(kv_lora_rank=32, q_lora_rank=None, qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=16)


@pytest.mark.parametrize(
    ("config", "architecture", "message"),
    [
        (DeepseekV2Config(**SIZES | MLA), "DeepseekV2ForCausalLM", "MLA"),
        (
            Gemma3TextConfig(**SIZES, sliding_window=64),
            "Gemma3ForCausalLM",
            "layers of type sliding_attention",
        ),
        (JambaConfig(**SIZES, use_mamba_kernels=False), "JambaForCausalLM", "recurrent state"),
        (Llama4TextConfig(**SIZES, attention_chunk_size=64), "Llama4ForCausalLM", "chunked_attention"),
        (WhisperConfig(d_model=64), "WhisperForConditionalGeneration", "encoder-decoder"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.endswith("LM") else "",
)
def test_refused_model(tmp_path, config, architecture, message):
    config.architectures = [architecture]
    config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedFeatureError, match=message):
        check_config(configure(tmp_path, max_model_len=256))


PLAIN = dict(
    alibi_slopes=None,
    sliding_window=None,
    kv_cache_dtype="auto",
    logits_soft_cap=None,
    attn_type="decoder",
    kv_sharing_target_layer_name=None,
)


def test_plain_layer_passes():
    check_layer(**PLAIN, sinks=None)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ({"alibi_slopes": [0.5, 0.25]}, "ALiBi"),
        ({"sliding_window": 4096}, "sliding-window layers (of 4096 tokens)"),
        ({"kv_cache_dtype": "fp8_e4m3"}, "kv_cache_dtype='fp8_e4m3'"),
        ({"logits_soft_cap": 30.0}, "soft-capping"),
        ({"attn_type": "encoder_only"}, "'encoder_only'"),
        ({"attn_type": "encoder_decoder"}, "'encoder_decoder'"),
        ({"kv_sharing_target_layer_name": "model.layers.0"}, "share their KV cache"),
        ({"sinks": object()}, "attention sinks"),
        ({"of_tomorrow": 1}, "of_tomorrow"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refused_layer(what, message):
    with pytest.raises(UnsupportedModelError) as refusal:
        check_layer(**PLAIN | what)
    assert message in str(refusal.value)
