"""Models whose weights are quantised by torchao, where it is installed."""

import pytest
import torch
from transformers import AutoModelForCausalLM, TorchAoConfig

import longthink
from tests.models import build, prompt

quantization = pytest.importorskip("torchao.quantization")

IDS = prompt((9,))[0]
GREEDY = dict(max_new_tokens=16, do_sample=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    build("qwen3", num_hidden_layers=1).save_pretrained(folder)
    settings = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    loaded = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=settings, dtype=torch.float32, device_map="cpu"
    )
    assert type(loaded.model.layers[0].mlp.up_proj.weight.data) is not torch.Tensor
    return loaded


def test_tokens_are_those_of_transformers(model):
    expected = model.generate(IDS, **GREEDY)
    assert torch.equal(longthink.generate(model, IDS, decode_budget=64, compile=False, **GREEDY), expected)
    with longthink.make_cache(model, decode_budget=64) as cache:
        assert torch.equal(model.generate(IDS, past_key_values=cache, **GREEDY), expected)
