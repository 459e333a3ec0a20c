"""``longthink doctor --model`` says what the configuration of a model gives: there are no weights to load."""

import json

import pytest
from transformers import DeepseekV3Config, GptOssConfig, MistralConfig, T5Config

from longthink.cli.text import size_text

SIZES = dict(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=4)
CONFIGS = {
    "mixed": GptOssConfig(**SIZES, head_dim=16, sliding_window=128, dtype="bfloat16"),
    "latent": DeepseekV3Config(
        **SIZES | {"num_key_value_heads": 4}, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8
    ),
    "windowed": MistralConfig(**SIZES, sliding_window=4096),
    "translator": T5Config(),
}  # fmt: skip


@pytest.fixture
def examined(call, tmp_path):
    def examine(name, *options):
        if name in CONFIGS:
            CONFIGS[name].save_pretrained(tmp_path / name)
            name = str(tmp_path / name)
        return call("doctor", "--model", name, *options)

    return examine


def test_layers_and_bytes_of_a_mixed_model(examined):
    code, out, _ = examined("mixed", "--json")
    report = json.loads(out)
    assert code == 0
    assert report["served"]
    assert report["layers"] == {"bounded": 2, "windowed": 2, "recurrent": 0}
    assert report["windows"] == [128]
    # Two layers of two heads with a key and a value of 16 numbers, of two bytes each.
    token = 2 * 2 * 2 * 16 * 2
    window = 128 * token
    assert report["bytes_per_token"] == token
    assert report["dense_bytes"] == {"32768": 32768 * token + window, "131072": 131072 * token + window}
    assert [row["kv_bytes"] for row in report["budgets"]] == [
        budget * token + window for budget in (1024, 4096, 16384)
    ]
    assert report["budgets"][0]["saved"] == {"32768": 31744 * token, "131072": 130048 * token}


def test_the_same_in_words(examined):
    code, out, _ = examined("mixed")
    text = " ".join(out.split())
    assert code == 0
    assert "served" in text
    assert "2 with full attention, which the budget bounds; 2 with a window of 128 tokens" in text
    assert f"{size_text(31744 * 256)} (96%)" in text


def test_a_bound_that_does_not_pay_says_so(examined):
    code, out, _ = examined("latent")
    text = " ".join(out.split())
    assert code == 0
    if "transformers keeps something smaller" in text:  # newer versions keep latents
        assert "nothing:" in text
    else:
        assert "nothing:" not in text


@pytest.mark.parametrize(
    ("name", "reason"),
    [("windowed", "a window of 4,096 tokens in every layer"), ("translator", "an encoder and a decoder")],
)
def test_what_is_not_served_has_a_reason(examined, name, reason):
    code, out, _ = examined(name)
    assert code == 1
    assert f"not served: it has {reason}" in " ".join(out.split())
    assert json.loads(examined(name, "--json")[1])["reason"].startswith(reason)


def test_the_built_in_model_and_one_that_is_not_there(examined):
    assert "4 with full attention" in examined("reasoner")[1]
    code, _, err = examined("./nowhere")
    assert code == 2
    assert "there is no such folder" in err
