"""The training forward is transformers' Qwen2; the initial weights can look things up before any training."""

import random

import pytest
import torch
from transformers import Qwen2ForCausalLM

from longthink.reasoner.vocabulary import BRIEF, FORMS, NAMES, TOKEN_IDS, token_ids
from tools.train_reasoner.architecture import forward, model_config, rope_table
from tools.train_reasoner.config import TrainConfig
from tools.train_reasoner.export import export_model
from tools.train_reasoner.initial import BASIS, embedding_map, initial_weights
from tools.train_reasoner.trainer import materialise


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """The initial weights of the recipe, and the model that transformers makes of their export."""
    config, folder = TrainConfig(), tmp_path_factory.mktemp("untrained")
    weights = materialise(initial_weights(model_config(config), seed=0))
    export_model(folder, config, weights, training={})
    model, report = Qwen2ForCausalLM.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    return weights, model.eval()


def test_forward_is_llama(untrained):
    weights, model = untrained
    generator = torch.Generator().manual_seed(0)
    # Far from the special structure of the initial weights, biases and norms included.
    weights = {k: w + 0.1 * torch.randn(w.shape, generator=generator) for k, w in weights.items()}
    model.load_state_dict({k: w.clone() for k, w in weights.items()}, strict=False)
    ids_BT = torch.randint(0, 642, (2, 300), generator=generator)
    # A gap in the second row, as training has them.
    positions_BT = torch.arange(300).repeat(2, 1)
    positions_BT[1, 100:] += 2500
    tables = rope_table(32, torch.float32)
    with torch.no_grad():
        expected = model(ids_BT, position_ids=positions_BT).logits
        actual = forward(weights, model_config(TrainConfig()), ids_BT, positions_BT, *tables)
    # The angle of a far position has few fp32 digits behind the point, and the library rounds it elsewhere.
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


def recall_text(rng, facts):
    names = rng.sample(NAMES, facts)
    asked = rng.choices(names, k=10)
    words = [word for name in names for word in (f"{name}:", f"{rng.randrange(100):02d}")]
    tail = [word for name in asked for word in (rng.choice(FORMS[:3]).format(name), "00")]
    return [TOKEN_IDS["<s>"], *token_ids(" ".join([*words, BRIEF, *tail]))], names, asked


def test_initial_heads_look_back_and_look_up():
    """Fresh weights: layer 0 looks one and two tokens back, layer 1 finds the value of a name."""
    config = TrainConfig()
    for seed in (0, 1):
        rng = random.Random(seed)
        weights = materialise(initial_weights(model_config(config), seed=seed))
        model = Qwen2ForCausalLM._from_config(model_config(config), attn_implementation="eager").eval()
        model.load_state_dict(weights, strict=False)
        found = []
        for _ in range(5):
            ids, names, asked = recall_text(rng, 12)
            with torch.no_grad():
                first, second, *_ = model(torch.tensor([ids]), output_attentions=True).attentions
            for head in (0, 1):
                assert first[0, head].diagonal(-(head + 1)).mean() > 0.8
            start = 2 + 2 * len(names)
            found += [second[0, 0, start + 2 * i, 2 + 2 * names.index(name)] for i, name in enumerate(asked)]
        assert torch.stack(found).mean() > 0.6, "the tokens after `name:` get most of the attention"


def test_forms_of_a_name_share_its_vector():
    basis = initial_weights(model_config(TrainConfig()), seed=0)[BASIS]
    embedding = embedding_map() @ basis
    rows = {form: torch.stack([embedding[TOKEN_IDS[form.format(name)]] for name in NAMES]) for form in FORMS}
    offsets = [rows[form] - rows["{}"] for form in FORMS[1:]]
    for offset in offsets:
        torch.testing.assert_close(offset, offset[:1].expand_as(offset), rtol=0, atol=1e-5)
        assert offset.norm() > 1
    assert embedding_map().sum(1).tolist() == [1.0] * 122 + [2.0] * 520
