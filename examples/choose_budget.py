"""Choose a budget by measuring: `fidelity` reads given texts with a bounded cache and densely, side by side.

    python examples/choose_budget.py

For a model of your own, load it as in one_line.py and take texts of the kind that it will write: pairs of a
question and a chain of thought, twenty or more of them, of the length that you expect. Here they are three answers
of the built-in model. docs/out-of-memory.md goes through the decisions.
"""

import longthink
from longthink.lab.fidelity.advice import advise, shape_of
from longthink.reasoner import load_reasoner, make_problems

DECODE_BUDGETS = (32, 64, 96)
MOST_KL = 0.05  # nats per token: how far you accept that predictions move
GPU_MEMORY = 24 * 2**30  # bytes, for weights and caches

model, tokenizer = load_reasoner()
texts = []
for problem in make_problems(3, profile="chain", size="s", seed=10):
    inputs = tokenizer(problem.prompt, return_tensors="pt").to(model.device)
    tokens = model.generate(**inputs, max_new_tokens=300, do_sample=False)[0].tolist()
    length = inputs.input_ids.shape[1]
    texts.append((tokens[:length], tokens[length:]))

rows = longthink.fidelity(model, texts, policies=["recall", "recency"], decode_budgets=DECODE_BUDGETS)
for row in rows:
    if row.kl is not None:  # None where no text is longer than the budget
        held = row.kv_bytes / row.dense_kv_bytes
        print(
            f"{row.policy} {row.decode_budget}: KL {row.kl.text(4)} nats per token, {held:.0%} of the bytes held"
        )

# `longthink advise` does the same for a model by its name, from texts in a file.
shape = shape_of(model, [(len(prompt), len(rest)) for prompt, rest in texts])
found = advise(rows, shape, kl=MOST_KL, memory=GPU_MEMORY)
for one in found[:1]:  # the smallest comes first
    print(
        f"take {one.row.policy} with decode_budget={one.row.decode_budget}: {one.requests:,} requests fit, "
        f"dense {one.dense_requests:,} of {shape.tokens} tokens"
    )
if not found:
    print(f"no policy is within {MOST_KL} nats of dense: allow more, or try larger budgets")
