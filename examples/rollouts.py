"""Reinforcement learning with bounded rollouts: a training loop whose `model.generate` has a cache of fixed size.

    python examples/rollouts.py

The loop is the one of GRPO trainers such as TRL's, without their frame: a batch of left-padded prompts, several
samples of each, a reward, the group's mean as baseline, one step of the optimizer. Rollouts are what fills the
memory there, and only they are bounded; the pass with gradients is the model's own.

Tokens are sampled by the model *with* the bounded cache, and gradients are those of the model without it. So
samples are slightly off-policy, as those of an inference engine are, and are weighted in the same way: by the ratio
of both probabilities, cut off at `MOST_WEIGHT`. Watch its mean; far from 1, the budget is too small.

For a model of your own, load it as in one_line.py, and replace `make_problems` and `grade` by prompts and a reward.
In a trainer that calls `model.generate(**inputs, generation_config=...)` itself, wrap that call: pass
`past_key_values=cache` inside `with longthink.make_cache(model, decode_budget=...) as cache`. Gradient
checkpointing must be off meanwhile, as TRL's `unwrap_model_for_generation` makes sure.
"""

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

import longthink
from longthink.reasoner import grade, load_reasoner, make_problems

STEPS, PROBLEMS, SAMPLES = 2, 2, 4
DECODE_BUDGET = 64
MOST_WEIGHT = 2.0


class SampledLogprobs(LogitsProcessor):
    """Keeps the log-probability of each sampled token, and never more than the logits of one step."""

    def __init__(self) -> None:
        self.last_BV: Tensor | None = None
        self.found: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.take(input_ids)
        self.last_BV = scores.log_softmax(-1)
        return scores

    def take(self, input_ids: Tensor) -> None:
        if self.last_BV is not None:
            self.found.append(self.last_BV.gather(1, input_ids[:, -1:]))


def dense_logprobs(tokens: Tensor, mask: Tensor, count: int) -> Tensor:
    """Log-probabilities of the last `count` tokens, with gradients: one ordinary pass, without a cache."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(tokens, attention_mask=mask, position_ids=positions, use_cache=False).logits
    return logits[:, -count - 1 : -1].log_softmax(-1).gather(2, tokens[:, -count:, None]).squeeze(2)


model, tokenizer = load_reasoner()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
sampling = GenerationConfig(
    max_new_tokens=260, do_sample=True, temperature=1.0, top_k=0, num_return_sequences=SAMPLES,
    eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
)  # fmt: skip
torch.manual_seed(0)

for step in range(STEPS):
    problems = make_problems(PROBLEMS, profile="chain", size="s", seed=100 * step, split="train")
    inputs = tokenizer([problem.prompt for problem in problems], padding=True, return_tensors="pt").to(
        model.device
    )
    width = inputs.input_ids.shape[1]

    recorder = SampledLogprobs()
    model.eval()
    with longthink.make_cache(model, decode_budget=DECODE_BUDGET) as cache:
        tokens = model.generate(
            **inputs, generation_config=sampling, past_key_values=cache,
            logits_processor=LogitsProcessorList([recorder]),
        )  # fmt: skip
        recorder.take(tokens)
    answers = tokens[:, width:]
    ended = (answers == tokenizer.eos_token_id).long().cumsum(1)
    own = (ended - (answers == tokenizer.eos_token_id).long() == 0).long()  # not the padding behind the end

    texts = tokenizer.batch_decode(answers)
    graded = [grade(problems[i // SAMPLES], text) for i, text in enumerate(texts)]
    reward = torch.tensor(graded, dtype=torch.float32, device=model.device).view(PROBLEMS, SAMPLES)
    advantage = (reward - reward.mean(1, keepdim=True)).view(-1, 1)

    model.train()
    mask = torch.cat([inputs.attention_mask.repeat_interleave(SAMPLES, 0), own], 1)
    logprobs = dense_logprobs(tokens, mask, answers.shape[1])
    weight = (logprobs.detach() - torch.cat(recorder.found, 1)).exp()
    loss = -(advantage * weight.clamp(max=MOST_WEIGHT) * logprobs * own).sum() / own.sum()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    mean = (weight * own).sum() / own.sum()
    print(
        f"step {step}: {len(texts)} rollouts of up to {answers.shape[1]} tokens, reward {reward.mean():.2f}, "
        f"weight {mean:.3f}, keys and values {cache.kv_bytes:,} bytes (dense: {cache.dense_kv_bytes:,})"
    )
