"""Folders with a PEFT adapter, which is merged into the model that it names."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import longthink
from longthink.cli import main
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


def test_an_adapter_is_named_beside_its_model(base, tmp_path):
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    adapted = save("made/elsewhere", tmp_path, settings)
    loaded = load_model(str(base), adapter=str(tmp_path), device="cpu")
    ids, _ = prompt((9,))
    assert torch.equal(loaded.model(ids).logits.argmax(-1), adapted(ids).logits.argmax(-1))
    assert (loaded.name, loaded.adapter) == (str(base), str(tmp_path)) and loaded.tokenizer(
        "w3"
    ).input_ids == [3]
    assert loaded.describe()["adapter"] == str(tmp_path) and "adapter" not in load_model(str(base)).describe()


@pytest.mark.parametrize(
    ("layers", "why"), [(1, "the model has no place for .*layers.1"), (3, "it has no weights for .*layers.2")]
)
def test_an_adapter_of_other_layers_says_which_model_it_is_for(layers, why, base, tmp_path):
    save("made/elsewhere", tmp_path / "adapter", peft.LoraConfig(target_modules=["q_proj"]))
    build("qwen2", num_hidden_layers=layers).save_pretrained(tmp_path / "other")
    for file in base.glob("token*"):
        (tmp_path / "other" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match=rf"cannot be merged into .*made for 'made/elsewhere'\): {why}"):
        load_model(str(tmp_path / "other"), adapter=str(tmp_path / "adapter"))


@pytest.mark.parametrize("names", [("a",), ("a", "b"), ("a", "b", "c")])
def test_adapters_that_name_each_other_are_refused(names, tmp_path):
    for name, base_name in zip(names, names[1:] + names[:1], strict=True):
        (tmp_path / name).mkdir()
        facts = {"base_model_name_or_path": str(tmp_path / base_name)}
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(facts))
    for load in (load_model, load_config, load_empty):
        with pytest.raises(ValueError, match="go round in a circle"):
            load(str(tmp_path / "a"))


def test_an_adapter_that_is_not_there_is_refused(base, tmp_path):
    with pytest.raises(ValueError, match=r"adapter folder .* has no adapter_config\.json"):
        load_model(str(base), adapter=str(tmp_path))
    with pytest.raises(ValueError, match=r"adapter '\./none': there is no such folder"):
        load_model(str(base), adapter="./none")
    with pytest.raises(OSError, match=r"adapter 'made/elsewhere': it is not on this machine"):
        load_model(str(base), adapter="made/elsewhere")


def test_generate_takes_an_adapter(base, tmp_path, capsys):
    save(base, tmp_path, peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
    command = [
        "generate",
        "w3 w4 w5",
        "--raw",
        "--max-new-tokens",
        "8",
        "--device",
        "cpu",
        "--model",
        str(base),
    ]
    texts = []
    for more in ([], ["--adapter", str(tmp_path)]):
        assert main([*command, *more]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] != texts[1]
