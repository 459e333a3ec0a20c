"""``longthink generate --chat``: questions line by line on one cache, which is as large as it says."""

import io
import re
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import longthink
from longthink.cli.chat import Conversation
from longthink.cli.decode import Decoded

OPTIONS = (
    "--policy",
    "raas:page_size=4",
    "--decode-budget",
    "16",
    "--max-new-tokens",
    "30",
    "--temperature",
    "0",
)


def typed(lines):
    """Standard input with these lines, text or bytes."""
    return io.TextIOWrapper(io.BytesIO(lines if isinstance(lines, bytes) else lines.encode()))


@pytest.fixture
def chat(call, monkeypatch):
    def run(model, lines, *options):
        monkeypatch.setattr(sys, "stdin", typed(lines))
        return call("generate", "--chat", "--model", model, *OPTIONS, *options)

    return run


def by_hand(folder, questions, budget):
    """Answers of the same conversation, from `longthink.generate`."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    answers, text = [], torch.zeros(1, 0, dtype=torch.int64)
    with longthink.make_cache(model, policy="raas:page_size=4", **budget) as cache:
        for question in questions:
            # What the template puts around a question, whatever came before.
            new = tokenizer(f"user {question} bot", return_tensors="pt", add_special_tokens=False).input_ids
            asked = torch.cat([text, new], 1)
            text = longthink.generate(model, asked, past_key_values=cache, max_new_tokens=30, do_sample=False)
            answers.append(tokenizer.decode(text[0, asked.shape[1] :], skip_special_tokens=True))
        return answers, cache.bound_tokens


def test_questions_and_answers_on_one_cache(chat, chat_model):
    questions = ["hello there w1", "w5 w6 w7 w8 w9", "w10"]
    code, out, err = chat(chat_model, f"{questions[0]}\n\n{questions[1]}\n{questions[2]}")
    assert code == 0
    answers, bound = by_hand(chat_model, questions, {"decode_budget": 16})
    assert out.splitlines() == answers
    notes = re.findall(r"(\d+) tokens · (\d+) seen · (\d+) held · bound (\d+) tokens per layer", err)
    assert [int(note[0]) for note in notes] == [30, 30, 30]
    held, bounds = ([int(note[i]) for note in notes] for i in (2, 3))
    # With a decode budget the bound grows by what the user writes.
    assert bounds == sorted(set(bounds)) and bounds[-1] == bound
    assert all(have <= most for have, most in zip(held, bounds, strict=True))


def test_the_first_question_may_be_an_argument(chat, chat_model, call, monkeypatch):
    monkeypatch.setattr(sys, "stdin", typed("w2\n"))
    _, out, _ = call("generate", "hello", "--chat", "--model", chat_model, *OPTIONS)
    assert out.splitlines() == by_hand(chat_model, ["hello", "w2"], {"decode_budget": 16})[0]


def test_a_question_that_does_not_fit_is_said_and_the_conversation_goes_on(call, chat_model, monkeypatch):
    long = " ".join(f"w{i}" for i in range(40))
    monkeypatch.setattr(sys, "stdin", typed(f"hello\n{long}\nw3\n"))
    words = [word for word in OPTIONS if word not in ("--decode-budget", "16")]
    code, out, err = call("generate", "--chat", "--model", chat_model, *words, "--budget", "40")
    assert code == 0
    assert out.splitlines() == by_hand(chat_model, ["hello", "w3"], {"budget": 40})[0]
    assert re.search(r"budget=40 holds 10 pages of 4 tokens, but policy 'raas' needs \d+", err)


def test_a_question_that_is_not_utf8_is_said_and_the_conversation_goes_on(chat, chat_model):
    code, out, err = chat(chat_model, b"hello\n\xff\xfe w1\nw3\n")
    assert code == 0
    assert out.splitlines() == by_hand(chat_model, ["hello", "w3"], {"decode_budget": 16})[0]
    assert err.count("the question is not UTF-8 text (byte 0)") == 1


def test_without_standard_input_the_first_question_is_the_only_one(call, chat_model, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    code, out, _ = call("generate", "hello", "--chat", "--model", chat_model, *OPTIONS)
    assert (code, out.splitlines()) == (0, by_hand(chat_model, ["hello"], {"decode_budget": 16})[0])


def test_what_does_not_go_with_a_conversation_is_refused(call, chat_model):
    for more in (("--json",), ("--file", "x")):
        code, _, err = call("generate", "--chat", "--model", chat_model, *more)
        assert code == 2 and "--chat reads its questions from standard input" in err


class Template:
    """A tokenizer whose template leaves earlier answers out."""

    chat_template, eos_token_id = "x", 2

    def apply_chat_template(self, messages, **options):
        return "only the last question"


def test_a_template_that_leaves_answers_out_is_refused():
    conversation = Conversation(Template(), raw=False, builtin=False)
    conversation.answered({"input_ids": torch.tensor([[5, 6]])}, Decoded(tokens=[7]))
    with pytest.raises(ValueError, match="leaves out earlier answers: use --raw"):
        conversation.ask("and then?")
