"""streaming_llm on every form of RoPE: each step equals the model on just the tokens that are kept."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import longthink
from longthink.hf.rotation import rotations
from tests.models import TINY, build
from tests.vision import build_vision

SIZES = TINY | dict(num_hidden_layers=1, head_dim=16)
MODELS = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": None},
    "olmo2": {},
    "granite": {},
    "smollm3 with RoPE": {"no_rope_layers": [1]},
    "smollm3 without": {"no_rope_layers": [0]},
    "cohere": {},
    "cohere2": {"layer_types": ["full_attention"]},
    "ernie4_5": {},
    "helium": {},
    "nanochat": {},
    "glm": {},
    "glm4": {},
    "phi3": {"sliding_window": None},
    "phi": {},
    "gpt_neox": {},
    "llama yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 128,
        }
    },
}


def tiny(name: str, **more):
    """Random model of a kind, with weights that make attention matter."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[name.split()[0]](**SIZES | MODELS[name] | more)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_a_step_equals_the_model_on_the_tokens_kept(name):
    model = tiny(name)
    text = torch.randint(3, 90, (1, 60), generator=torch.Generator().manual_seed(1))
    with longthink.make_cache(model, policy="streaming_llm", budget=24) as cache, torch.no_grad():
        model(text[:, :37], past_key_values=cache)
        for i in range(37, 60):
            logits = model(text[:, i : i + 1], past_key_values=cache).logits[0, -1]
            kept = cache.resident_positions(0)[0][0]
            alone = model(text[:, kept], use_cache=False).logits[0, -1]
            assert len(kept) == 24
            torch.testing.assert_close(logits, alone, rtol=0, atol=1e-3 * alone.std().item())


def test_layers_may_differ():
    model = tiny("smollm3 with RoPE", num_hidden_layers=3, no_rope_layers=[1, 0, 1])
    found = rotations(model, [0, 1, 2])
    assert [bool(found[i].inv_freq_D.any()) for i in range(3)] == [True, False, True]


@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("llama", None),
        ("cohere", [*range(0, 16, 2), *range(1, 16, 2)]),
        ("glm", [0, 2, 4, 6, 8, 9, 10, 11, 1, 3, 5, 7, 12, 13, 14, 15]),
    ],
)
def test_the_layout_is_found(name, order):
    more = {"partial_rotary_factor": 0.5} if name == "glm" else {}
    rotation = rotations(tiny(name, **more), [0])[0]
    assert (rotation.order_D if order is None else rotation.order_D.tolist()) == order
    keys = torch.randn(2, 16)
    assert torch.equal(rotation.unpaired(rotation.paired(keys)), keys)


def test_backward_rotation_is_found():
    assert (rotations(tiny("nanochat"), [0])[0].inv_freq_D < 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "cohere", "nanochat", "smollm3 without"])
def test_rounding_does_not_matter(name, dtype):
    exact, rounded = rotations(tiny(name), [0])[0], rotations(tiny(name).to(dtype), [0])[0]
    torch.testing.assert_close(rounded.inv_freq_D.float(), exact.inv_freq_D.float(), rtol=0.01, atol=0)
    assert (exact.order_D is None) == (rounded.order_D is None)


@pytest.mark.parametrize("factor", [1.001, 0.9])
def test_other_rotations_are_refused_with_the_layer(factor, monkeypatch):
    model = tiny("llama", num_hidden_layers=2)
    projection = model.model.layers[1].self_attn.k_proj
    rotary, compute = model.model.rotary_emb, model.model.rotary_emb.forward
    # The module's frequencies are not those that it uses.
    monkeypatch.setattr(rotary, "forward", lambda x, position_ids: compute(x, factor * position_ids))
    with pytest.raises(
        longthink.UnsupportedModelError, match=r"layer 0 of LlamaForCausalLM.*positions=logical"
    ):
        longthink.make_cache(model, policy="streaming_llm", budget=24)
    longthink.make_cache(model, policy="streaming_llm:positions=logical", budget=24).close()
    longthink.make_cache(model, policy="raas", budget=64).close()
    assert projection.weight.grad is None


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_that_depend_on_the_length_are_refused(kind):
    parameters = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64}
    if kind == "longrope":
        parameters |= {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    model = tiny("llama", rope_parameters=parameters, max_position_embeddings=128)
    with pytest.raises(longthink.UnsupportedModelError, match="depend on the length"):
        longthink.make_cache(model, policy="streaming_llm", budget=24)


def test_positions_of_images_are_refused():
    with pytest.raises(longthink.UnsupportedModelError, match="three-dimensional"):
        longthink.make_cache(build_vision("qwen2_vl"), policy="streaming_llm", budget=24)


def test_learned_positions_are_refused():
    torch.manual_seed(0)
    config = CONFIG_MAPPING["gpt2"](vocab_size=96, n_embd=32, n_layer=1, n_head=2, n_positions=128)
    with pytest.raises(longthink.UnsupportedModelError, match=r"layer 0 of GPT2|GPT2LMHeadModel has"):
        longthink.make_cache(AutoModelForCausalLM.from_config(config), policy="streaming_llm", budget=24)


def test_the_probe_runs_once_and_leaves_the_model_as_it_was():
    model = build("qwen2").train()
    model.model.layers[0].eval()
    modes = [part.training for part in model.modules()]
    weights, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    calls = []
    handle = model.register_forward_hook(lambda *args: calls.append(1))
    rotations(model, [0])
    rotations(model, [1])
    handle.remove()
    assert len(calls) == 1
    assert [part.training for part in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", ["glm", "smollm3 without"])
def test_features_that_are_not_rotated_are_refused_where_positions_must_be_taken_out(name):
    """TriAttention is defined for frequencies: nothing says what it would be for the other features."""
    model = tiny(name, **({"partial_rotary_factor": 0.5} if name == "glm" else {}))
    with pytest.raises(longthink.UnsupportedModelError, match="leaves features of the keys as they are"):
        longthink.make_cache(model, policy="tri_attention", budget=24)


def test_keys_that_no_rotation_describes_are_refused_by_name():
    with pytest.raises(
        longthink.UnsupportedModelError, match="depends on how keys carry positions cannot serve"
    ):
        longthink.make_cache(build_vision("qwen2_vl"), policy="tri_attention", budget=24)


@pytest.mark.parametrize("name", ["llama", "cohere", "nanochat"])
def test_the_layout_of_the_features_changes_nothing_of_what_tri_attention_keeps(name):
    """Here keys are rotated back and seen from each distance, one at a time, as the paper writes it."""
    model = tiny(name).double()
    ids = torch.randint(3, 90, (1, 12), generator=torch.Generator().manual_seed(1))
    with (
        longthink.make_cache(model, policy="tri_attention:window=4", decode_budget=40) as cache,
        torch.no_grad(),
    ):
        model(ids, past_key_values=cache)
        layer = cache.layers[0].slots
        table, rotation = layer.store.table, rotations(model, [0])[0]
        now = 16
        table.now_B.fill_(now)
        assert torch.equal(table.rotation.inv_freq_D, rotation.inv_freq_D)
        mean = table.query_stats_BH3F[0]
        keys = rotation.paired(table.keys_BKSD[0])[:, :12]
        place = torch.arange(12, dtype=torch.float64)
        group = mean.shape[0] // keys.shape[0]
        for head in range(mean.shape[0]):
            real, imaginary = keys[head // group].chunk(2, -1)
            key = torch.complex(real, imaginary) * torch.polar(
                torch.ones(12, rotation.inv_freq_D.numel(), dtype=torch.float64),
                -place[:, None] * rotation.inv_freq_D.double(),
            )
            centre = torch.complex(mean[head, 0], mean[head, 1])
            score = torch.zeros(12, dtype=torch.float64)
            for distance in (now + 2**j for j in range(17)):
                turn = torch.polar(
                    torch.ones_like(key.real), (distance - place)[:, None] * rotation.inv_freq_D.double()
                )
                score += (centre * turn * key.conj()).real.sum(-1) / 17
            score += ((mean[head, 2] - centre.abs()) * key.abs()).sum(-1)
            found = layer.policy.scores(table)[0, head // group, head % group, :12]
            torch.testing.assert_close(found, score, atol=1e-6, rtol=1e-6)
