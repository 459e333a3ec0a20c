"""Folders with a PEFT adapter, which is merged into the model that it names."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import longthink
from longthink.models import load_config, load_empty, load_model
from tests.models import build, prompt

peft = pytest.importorskip("peft")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    build("qwen2").save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0").save_pretrained(folder)
    return folder


def save(base, folder, settings):
    """Save an adapter that changes what the model writes, and return the model with it."""
    model = build("qwen2")
    model.name_or_path = model.config._name_or_path = str(base)
    adapted = peft.get_peft_model(model, settings)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if weight.requires_grad and "lora" in name:
                weight.normal_(0, 0.3)
    adapted.save_pretrained(folder)
    return adapted.eval()


def test_a_lora_writes_what_it_writes_with_peft(base, tmp_path):
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    adapted = save(base, tmp_path, settings)
    loaded = load_model(str(tmp_path), device="cpu")
    ids, _ = prompt((9,))
    greedy = dict(max_new_tokens=12, do_sample=False)
    wanted = adapted.generate(input_ids=ids, **greedy)
    assert type(loaded.model) is type(build("qwen2")) and loaded.tokenizer("w3 w4").input_ids == [3, 4]
    assert torch.equal(longthink.generate(loaded.model, ids, budget=64, **greedy), wanted)
    assert not torch.equal(build("qwen2").generate(ids, **greedy), wanted), "the adapter changes nothing"
    assert load_config(str(tmp_path)).model_type == load_empty(str(tmp_path)).config.model_type == "qwen2"


def test_prompt_learning_is_refused(base, tmp_path):
    save(base, tmp_path, peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="PROMPT_TUNING adds vectors that belong to no token"):
        load_model(str(tmp_path))


def test_an_adapter_of_another_shape_is_refused(base, tmp_path):
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    save(base, tmp_path, settings)
    facts = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(facts | {"r": 3}))
    with pytest.raises(ValueError, match="cannot be merged into"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"base_model_name_or_path": null}'])
def test_an_adapter_of_nothing_is_refused(text, tmp_path):
    (tmp_path / "adapter_config.json").write_text(text)
    for load in (load_model, load_config, load_empty):
        with pytest.raises(ValueError, match="names no base model"):
            load(str(tmp_path))


def test_pickled_weights_are_refused(base, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    (tmp_path / "adapter_model.bin").write_bytes(b"anything")
    with pytest.raises(ValueError, match=r"no adapter_model\.safetensors"):
        load_model(str(tmp_path))
