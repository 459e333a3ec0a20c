"""A chat of two turns on one bounded cache: what the user writes stays, what the model thought competes for the
budget.

    python examples/chat.py

The built-in model solves problems and knows no chat, so each turn is a problem. For a model of your own, load it as
in one_line.py, and take the words of a turn from its chat template: render the messages so far, and cut off what
the cache has already read (`longthink generate --chat` does that for any model).
"""

import torch

import longthink
from longthink.reasoner import load_reasoner, make_problem

model, tokenizer = load_reasoner()
turns = [make_problem(profile="chain", size="s", seed=seed).prompt for seed in (1, 2)]

text = torch.empty(1, 0, dtype=torch.long, device=model.device)
with longthink.make_cache(model, decode_budget=160) as cache:
    for words in turns:
        question = tokenizer(words, add_special_tokens=not text.numel(), return_tensors="pt").input_ids
        # The whole text so far goes in, as with any cache of transformers; only the new part is read.
        text = torch.cat([text, question.to(text.device)], 1)
        asked = text.shape[1]
        text = model.generate(text, past_key_values=cache, max_new_tokens=300, do_sample=False)
        print(f"> {words}\n{tokenizer.decode(text[0, asked:], skip_special_tokens=True)}")
        held = max(len(head) for head in cache.resident_positions(0)[0])
        print(f"({text.shape[1]} tokens so far; {held} of them held, at most {cache.bound_tokens})\n")
