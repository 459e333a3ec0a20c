"""The plugin evicts by the rule: its tokens equal those of a list-based reference that shares no code with it."""

import pytest

from tests.vllm.engines import PAGE, engine, on_hugging_face, random_prompts, save_random_model, serve
from tests.vllm.lists import ListedQwen2

pytestmark = pytest.mark.slow
BUDGET, COUNT = 128, 720
(PROMPT,) = random_prompts(21)


def test_tokens_are_those_of_lists(tmp_path):
    folder = save_random_model(tmp_path)
    lists = ListedQwen2(folder, BUDGET, sharing="layer")
    tokens = lists.generate(PROMPT, COUNT)
    for layer in lists.layers:
        held = {position // PAGE for position in layer.oracle.residents()[0]}
        assert len(layer.keys) // PAGE + 1 - len(held) > 30
        assert not layer.oracle.doubtful  # no near tie that rounding could have decided
    assert tokens == on_hugging_face(folder, "raas:sharing=layer", BUDGET, PROMPT, COUNT)
    with engine(folder, "raas:sharing=layer", BUDGET) as llm:
        assert serve(llm, [PROMPT], COUNT) == [tokens]
