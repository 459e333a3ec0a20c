"""Models of PEFT, where it is installed: adapters work, and what fills the cache itself is refused."""

import pytest
import torch

import longthink
from tests.models import build, prompt

peft = pytest.importorskip("peft")

GREEDY = dict(max_new_tokens=12, do_sample=False)
IDS = prompt((20,))[0]


def adapted(config):
    torch.manual_seed(0)
    model = peft.get_peft_model(build("qwen2", num_hidden_layers=1), config).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            # Adapters begin as the identity.
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def test_adapters_stay_active():
    model = adapted(peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]))
    expected, base = model.generate(input_ids=IDS, **GREEDY), model.get_base_model()
    assert not torch.equal(expected, build("qwen2", num_hidden_layers=1).generate(IDS, **GREEDY))
    assert torch.equal(longthink.generate(base, IDS, decode_budget=64, **GREEDY), expected)
    with longthink.make_cache(base, decode_budget=64) as cache:
        assert torch.equal(model.generate(input_ids=IDS, past_key_values=cache, **GREEDY), expected)
        assert cache.columns == 31
    with pytest.raises(longthink.UnsupportedModelError, match=r"pass model\.get_base_model\(\)"):
        longthink.generate(model, IDS, budget=64)


def test_a_learned_prompt_is_text_and_a_learned_prefix_is_refused():
    learned = dict(task_type="CAUSAL_LM", num_virtual_tokens=5)
    model = adapted(peft.PromptTuningConfig(**learned))
    with longthink.make_cache(model.get_base_model(), decode_budget=64) as cache:
        found = model.generate(input_ids=IDS, past_key_values=cache, **GREEDY)
        assert cache.columns == 36
    assert torch.equal(found, model.generate(input_ids=IDS, **GREEDY))
    model = adapted(peft.PrefixTuningConfig(**learned))
    with longthink.make_cache(model.get_base_model(), budget=64) as cache:
        with pytest.raises(longthink.UnsupportedFeatureError, match="vectors that belong to no token"):
            model.generate(input_ids=IDS, past_key_values=cache, **GREEDY)
