"""Traces of models that see: image tokens are told apart from text."""

import pytest

from longthink.config import Budget
from longthink.lab.analyze.lives import read_lives
from longthink.lab.analyze.recorder import Prompt, record
from longthink.lab.analyze.rules import Rules
from longthink.lab.analyze.shares import share_table
from longthink.lab.analyze.whatif import what_if
from longthink.policies import make_policy
from tests.analyze.making import Words, dense
from tests.vision import IMAGE, build_vision, inputs_with, picture


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_classes_are_split_by_modality(tmp_path, name):
    inputs = inputs_with(picture(84, 112))
    prompt = Prompt(task="seen", problem="0", inputs=inputs, max_new_tokens=24)
    (trace,) = record(build_vision(name), Words(), [prompt], tmp_path / "t", top=0).traces()
    images = (inputs["input_ids"][0] == IMAGE).nonzero().flatten().tolist()
    assert list(trace.header.image) == images and len(images) == 12
    assert dense(trace).sum(2) == pytest.approx(1, abs=5e-3)
    lives = read_lives(trace, Rules(use=0.05, local=4, gap=8))
    found = {(one.part, one.name): one.share for one in share_table([lives]) if one.scope == "model"}
    for part, pages in (
        ("image", images),
        ("text", [p for p in range(trace.header.prompt_tokens) if p not in images]),
    ):
        classes = lives.classes_MP[:, pages]
        assert found[part, "lazy"] == pytest.approx((classes == 0).mean())
    assert len(trace.header.texts) == trace.header.prompt_tokens + 24
    (kept,) = what_if(trace, [make_policy("recency")], [Budget(decode_budget=8)], clairvoyant=False)
    assert 0 < kept.recall < 1
