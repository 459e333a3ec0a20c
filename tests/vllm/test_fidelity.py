"""Given texts have the log probabilities of the same bounded cache on Hugging Face, as fidelity measures them."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import longthink
from tests.vllm.engines import engine, random_prompts, save_random_model

pytestmark = pytest.mark.slow

PROMPT, LENGTH, BUDGET = 37, 400, 96
TEXTS = random_prompts(LENGTH, LENGTH, LENGTH, seed=2)


def in_vllm(folder, policy):
    """Log probability of each token after the prompt, which a request is made to generate."""
    from vllm import SamplingParams

    forced = {"logits_processors": ["tests.vllm.forced:Forced"], "logprobs_mode": "raw_logprobs"}
    with engine(folder, policy, BUDGET, **forced) as llm:
        sampling = [
            SamplingParams(
                temperature=0,
                max_tokens=LENGTH - PROMPT,
                ignore_eos=True,
                detokenize=False,
                logprobs=0,
                extra_args={"forced": text[PROMPT:]},
            )
            for text in TEXTS
        ]
        prompts = [{"prompt_token_ids": text[:PROMPT]} for text in TEXTS]
        done = [one.outputs[0] for one in llm.generate(prompts, sampling, use_tqdm=False)]
    assert [list(one.token_ids) for one in done] == [text[PROMPT:] for text in TEXTS]
    return torch.tensor(
        [[at[token].logprob for at, token in zip(one.logprobs, one.token_ids, strict=True)] for one in done]
    )


@torch.no_grad()
def on_hugging_face(folder, policy):
    """The same, read token by token."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    budget = {} if policy == "dense" else {"decode_budget": BUDGET}
    found = []
    for text in TEXTS:
        ids = torch.tensor([text])
        with longthink.make_cache(model, policy=policy, **budget) as cache:
            logits = [model(ids[:, :PROMPT], past_key_values=cache).logits[:, -1]]
            logits += [
                model(ids[:, at : at + 1], past_key_values=cache).logits[:, -1]
                for at in range(PROMPT, LENGTH - 1)
            ]
        found.append(torch.cat(logits).log_softmax(-1).gather(1, ids[0, PROMPT:, None])[:, 0])
    return torch.stack(found)


@pytest.mark.parametrize("policy", ["raas:sharing=layer", "recall:page_size=16"])
def test_given_texts_have_the_log_probabilities_of_hugging_face(tmp_path, policy):
    folder = save_random_model(tmp_path)
    served, wanted = in_vllm(folder, policy), on_hugging_face(folder, policy)
    torch.testing.assert_close(served, wanted, atol=1e-3, rtol=1e-3)
    # The cache must matter, or any would pass; and it is full where its first page is evicted.
    dense, room = on_hugging_face(folder, "dense"), -(-PROMPT // 16) * 16 + BUDGET - PROMPT
    assert (served - dense).abs()[:, room + 1 :].mean() > 0.1
    torch.testing.assert_close(served[:, :room], dense[:, :room], atol=1e-3, rtol=1e-3)
