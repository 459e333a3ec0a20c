"""Models whose weights accelerate keeps in main memory or on disk, and brings in for each layer."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import longthink
from longthink.hf.step import DecodeStep
from tests.models import build, prompt

pytest.importorskip("accelerate")

IDS = prompt((20,))[0]
GREEDY = dict(max_new_tokens=12, do_sample=False)
SPLIT = {
    "model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
    "model.rotary_emb": "cpu", "lm_head": "disk",
}  # fmt: skip


@pytest.fixture(scope="module")
def plain():
    return build("qwen3")


@pytest.fixture(scope="module", params=[SPLIT, {"": "disk"}], ids=["split", "disk"])
def offloaded(request, plain, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    plain.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(
        folder, device_map=request.param, offload_folder=folder / "offloaded"
    )
    assert any(parameter.is_meta for parameter in model.parameters())
    model.generation_config.eos_token_id = None
    return model


def test_tokens_are_those_of_the_model_in_memory(plain, offloaded):
    expected = longthink.generate(plain, IDS, decode_budget=32, **GREEDY)
    assert torch.equal(longthink.generate(offloaded, IDS, decode_budget=32, **GREEDY), expected)
    assert torch.equal(longthink.generate(offloaded, IDS.tolist(), decode_budget=32, **GREEDY), expected)
    with longthink.make_cache(offloaded, decode_budget=32) as cache:
        assert torch.equal(offloaded.generate(IDS, past_key_values=cache, **GREEDY), expected)


def test_the_engine_serves_it(plain, offloaded):
    found = []
    for model in (plain, offloaded):
        with longthink.Engine(model, seats=1, decode_budget=32) as engine:
            found.append(engine.submit(IDS[0].tolist(), max_new_tokens=12).result().tokens)
    assert found[0] == found[1]


def test_its_steps_are_not_compiled(offloaded):
    with pytest.raises(longthink.UnsupportedFeatureError, match="accelerate moves the model's weights"):
        longthink.generate(offloaded, IDS, decode_budget=32, compile=True, **GREEDY)
    with longthink.make_cache(offloaded, decode_budget=32) as cache:
        offloaded(IDS, past_key_values=cache)
        step = DecodeStep(offloaded, cache, tokens=1_000_000)
        assert not step.compiled and step(IDS[:, -1:]).isfinite().all()


def test_its_cache_is_saved_and_copied(offloaded, tmp_path):
    with longthink.make_cache(offloaded, decode_budget=32) as cache:
        offloaded(IDS, past_key_values=cache)
        cache.save(tmp_path / "cache")
    with longthink.load_cache(offloaded, tmp_path / "cache") as again:
        assert again.columns == IDS.shape[1]
