"""The tokenizer loses nothing, reads well, and survives saving, loading and streaming."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast, TextStreamer

from longthink.reasoner import PROFILES, Size, make_problem
from longthink.reasoner.vocabulary import SPECIAL, TOKEN_IDS, TOKENS, token_ids
from tools.train_reasoner.export import build_tokenizer, export_model

tokenizer = build_tokenizer()
problems = st.builds(
    make_problem,
    profile=st.sampled_from(sorted(PROFILES)),
    size=st.builds(Size, ops=st.integers(2, 40), checked=st.booleans()),
    seed=st.integers(0, 10**6),
)


@settings(max_examples=50, deadline=None)
@given(problems)
def test_round_trip_of_text_and_ids(problem):
    thought = tokenizer(problem.solution, add_special_tokens=False)["input_ids"]
    assert thought == token_ids(problem.solution)
    assert tokenizer.decode(thought) == problem.solution
    prompt = tokenizer(problem.prompt)["input_ids"]
    assert prompt == [tokenizer.bos_token_id, *token_ids(problem.prompt)]
    assert tokenizer.decode(prompt, skip_special_tokens=True).strip() == problem.prompt
    whole = [*prompt, *thought, tokenizer.eos_token_id]
    assert tokenizer(tokenizer.decode(whole), add_special_tokens=False)["input_ids"] == whole


@settings(max_examples=50)
@given(st.lists(st.sampled_from(TOKENS), min_size=1, max_size=40))
def test_any_tokens_survive_decoding(tokens):
    ids = [TOKEN_IDS[token] for token in tokens]
    assert tokenizer(tokenizer.decode(ids), add_special_tokens=False)["input_ids"] == ids


@given(st.lists(st.sampled_from([" ", "\n", "\t", "  ", " \r\n"]), min_size=30, max_size=30))
def test_any_white_space_will_do(spaces):
    words = "bee: 47 cat: 08 cow= bee +cat ? cow #".split()
    text = "".join(word + space for word, space in zip(words, spaces, strict=False))
    assert tokenizer(text)["input_ids"][1:] == [TOKEN_IDS[word] for word in words]


def test_unknown_words_are_one_unknown_token_each():
    assert tokenizer("bee: 470 what")["input_ids"] == [1, TOKEN_IDS["bee:"], 3, 3]


def test_special_tokens_and_padding():
    assert [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL] == [0, 1, 2, 3]
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    batch = tokenizer(["? bee", "bee: 47 ? bee #"], padding=True)
    assert batch["input_ids"][0] == [0, 0, 0, 1, *token_ids("? bee")]
    assert batch["attention_mask"][0] == [0, 0, 0, 1, 1, 1]


def test_exported_tokenizer_is_the_same(tmp_path, tiny_config):
    export_model(tmp_path, tiny_config, {}, training={})
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    problem = make_problem(profile="chain", size="s", seed=1)
    assert loaded.padding_side == "left"
    assert loaded(problem.prompt)["input_ids"] == tokenizer(problem.prompt)["input_ids"]
    assert loaded.decode(token_ids(problem.solution)) == problem.solution
    assert (loaded.pad_token, loaded.bos_token, loaded.eos_token) == ("<pad>", "<s>", "</s>")


@pytest.mark.parametrize("checked", [False, True])
def test_streaming_prints_the_whole_solution(capsys, checked):
    import torch

    problem = make_problem(profile="chain", size=Size(ops=4, checked=checked), seed=1)
    streamer = TextStreamer(tokenizer)
    for token in [*token_ids(problem.solution), 2]:
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert capsys.readouterr().out.strip() == f"{problem.solution} </s>"
