"""The scores of a text, against a slow reading of it, token by token and number by number."""

import math

import pytest
import torch
from transformers import DynamicCache

import longthink
from longthink.config import Budget
from longthink.hf import DecodeStep, make_cache
from longthink.lab.evaluate import forced
from longthink.lab.fidelity.measure import LOST, NOTHING, SURE, measure
from longthink.lab.fidelity.texts import Encoded
from longthink.models import load_model
from longthink.policies import Dense, RaaS, Recency, StreamingLLM
from tests.models import build

DECODED = (30, 22, 41)


@pytest.fixture(scope="module")
def model():
    model = build("llama").double()
    with torch.no_grad():
        # Confident predictions, some of which a window loses.
        model.lm_head.weight.mul_(6)
    return model


@pytest.fixture(scope="module")
def texts(model):
    """What the model writes by itself, so that it is sure of most tokens."""
    found = []
    for i, count in enumerate(DECODED):
        ids = torch.randint(3, 90, (1, 9 + 5 * i), generator=torch.Generator().manual_seed(i))
        out = model.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False)[0].tolist()
        found.append(Encoded(tuple(out[: ids.shape[1]]), tuple(out[ids.shape[1] :])))
    return found


def slow(model, text, policy=None, **budget):
    """Log probabilities of every token of the vocabulary, a list for each token of a text, and the cache."""
    prompt = torch.tensor([text.prompt])
    if policy is None:
        cache = DynamicCache()
        logits = [model(prompt, past_key_values=cache).logits[0, -1]]
        for token in text.decoded[:-1]:
            logits.append(model(torch.tensor([[token]]), past_key_values=cache).logits[0, -1])
    else:
        with make_cache(model, policy=policy, **budget) as cache, torch.no_grad():
            logits = [model(prompt, past_key_values=cache).logits[0, -1]]
            step = DecodeStep(model, cache, compile=False)
            logits += [step(torch.tensor([[token]]))[0] for token in text.decoded[:-1]]
    return [one.detach().float().log_softmax(-1).tolist() for one in logits], cache


@pytest.mark.parametrize(
    "policy, budget, firsts",
    [
        (RaaS(page_size=4), {"decode_budget": 16}, (16, 16, 16)),
        (StreamingLLM(), {"budget": 72}, (63, 58, 53)),
        (StreamingLLM(), {"budget": 40}, (31, 26, 21)),
        (Dense(), {}, (0, 0, 0)),
    ],
    ids=["decode budget", "nothing scored", "budget", "dense"],
)
def test_scores_are_those_of_a_slow_reading(model, texts, policy, budget, firsts):
    bound = Budget(**budget) if budget else None
    (column,) = measure(model, texts, [policy], bound)
    for text, first, scores in zip(texts, firsts, column, strict=True):
        steps = range(first, len(text.decoded))
        assert scores.tokens == len(steps)
        if not steps:
            assert scores == NOTHING
            continue
        dense, _ = slow(model, text)
        held, cache = slow(model, text, policy, **budget)
        window = slow(model, text, Recency(), **budget)[0] if budget else dense
        token = text.decoded
        far = [
            t for t in steps
            if math.exp(dense[t][token[t]]) >= SURE
            and math.exp(window[t][token[t]] - dense[t][token[t]]) <= LOST
        ]  # fmt: skip
        for chosen, prefix in ((list(steps), ""), (far, "long_")):
            found = {
                name: getattr(scores, prefix + name)
                for name in ("tokens", "nll_dense", "nll", "kl", "differs")
            }
            wanted = {
                "tokens": len(chosen),
                "nll_dense": -sum(dense[t][token[t]] for t in chosen),
                "nll": -sum(held[t][token[t]] for t in chosen),
                "kl": sum(
                    math.exp(p) * (p - q) for t in chosen for p, q in zip(dense[t], held[t], strict=True)
                ),
                "differs": sum(dense[t].index(max(dense[t])) != held[t].index(max(held[t])) for t in chosen),
            }
            assert found == pytest.approx(wanted, rel=1e-3, abs=2e-4)
        assert scores.evicted == cache.num_evicted
        assert scores.dense_kv_bytes == cache.dense_kv_bytes
        held_tokens = sum(len(head) for layer in range(2) for head in cache.resident_positions(layer)[0])
        assert scores.kv_bytes == pytest.approx(
            held_tokens * 2 * 8 * cache.layers[0].slots.store.keys_BKSD.shape[-1]
        )


def test_long_range_tokens_are_found(model, texts):
    """Otherwise the test above says little about them."""
    (column,) = measure(model, texts, [RaaS(page_size=4)], Budget(decode_budget=16))
    assert sum(scores.long_tokens for scores in column) >= 3


@pytest.mark.slow
def test_neither_the_company_nor_the_size_of_blocks_matters(model, texts, monkeypatch):
    bound = Budget(decode_budget=12)
    policies = [RaaS(page_size=4), StreamingLLM(), Recency()]
    together = measure(model, texts, policies, bound)
    monkeypatch.setattr(forced, "LOGITS_AT_ONCE", 1)
    for policy, column in zip(policies, together, strict=True):
        for text, scores in zip(texts, column, strict=True):
            ((alone,),) = measure(model, [text], [policy], bound)
            assert alone == pytest.approx(scores, rel=1e-4, abs=1e-4)


def test_a_text_without_room_or_without_tokens_is_not_scored_and_keeps_no_other_back(model, texts):
    long = Encoded(tuple(range(3, 56)), texts[0].decoded)
    empty, policies = Encoded(texts[0].prompt, ()), [Recency(), RaaS(page_size=16), StreamingLLM()]
    together = [long, texts[2], empty]
    window, paged, sinks = measure(model, together, policies, Budget(budget=52))
    for column in (
        window,
        paged,
        sinks,
    ):  # the window defines the long-range tokens, so without it nothing counts
        assert column[0] == column[2] == NOTHING and column[1].tokens > 0
    window, paged, _ = measure(model, together, policies, Budget(budget=56))
    assert paged[0] == NOTHING and window[0].tokens == 27


def test_the_function_takes_tokens_and_summarises(model, texts):
    found = longthink.fidelity(
        model, texts, policies=["raas:page_size=4", "recency", "dense"], decode_budgets=[12], rows=2
    )
    assert [(row.policy, row.decode_budget, row.texts) for row in found] == [
        ("raas:page_size=4", 12, 3), ("recency", 12, 3), ("dense", None, 3),
    ]  # fmt: skip
    (column,) = measure(model, texts, [RaaS(page_size=4)], Budget(decode_budget=12))
    assert found[0].kl.mean == pytest.approx(
        sum(s.kl for s in column) / sum(s.tokens for s in column), rel=1e-3
    )
    assert found[2].kl.mean == pytest.approx(0, abs=1e-5)
    assert set(found[0].versus) >= {"kl", "loss", "differs"} and not found[1].versus


def test_the_function_takes_text_with_a_tokenizer_only():
    loaded = load_model("reasoner", device="cpu")
    plain = "ant = 3 bee = 4 ant + bee " * 8
    with pytest.raises(ValueError, match="give the model's tokenizer"):
        longthink.fidelity(loaded.model, [plain], policies=["raas"], decode_budgets=[16])
    with pytest.raises(ValueError, match="texts is empty"):
        longthink.fidelity(loaded.model, [], policies=["raas"], decode_budgets=[16])
    for text in (plain, (plain[:26], plain)):
        (row,) = longthink.fidelity(
            loaded.model, [text], policies=["raas"], decode_budgets=[16], tokenizer=loaded.tokenizer
        )
        assert row.tokens > 0
