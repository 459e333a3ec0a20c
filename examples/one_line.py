"""One changed line: `model.generate` with a cache that stops growing.

    python examples/one_line.py

For a model of your own, replace `load_reasoner()` and the prompt:

    from transformers import AutoModelForCausalLM, AutoTokenizer

    name = "Qwen/Qwen3-1.7B"
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype="auto", device_map="auto")
    messages = [{"role": "user", "content": "How many primes are there below 100?"}]
    template = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    inputs = tokenizer.apply_chat_template(messages, **template).to(model.device)

and raise the numbers: a decode budget of 1024 and 32768 new tokens, say.
"""

from typing import Any

import longthink
from longthink.reasoner import grade, load_reasoner, make_problem

DECODE_BUDGET = 128  # tokens kept in each layer, on top of the prompt
MAX_NEW_TOKENS = 600

model, tokenizer = load_reasoner()
problem = make_problem(profile="chain", size="m", seed=3)
inputs = tokenizer(problem.prompt, return_tensors="pt").to(model.device)
options: dict[str, Any] = {
    "max_new_tokens": MAX_NEW_TOKENS,
    "do_sample": False,
    "return_dict_in_generate": True,
}

before = model.generate(**inputs, **options)
after = longthink.generate(model, **inputs, decode_budget=DECODE_BUDGET, **options)  # the changed line

cache = after.past_key_values
length = inputs.input_ids.shape[1]
for name, output in (("dense", before), ("bounded", after)):
    text = tokenizer.decode(output.sequences[0, length:])
    print(f"{name}: {output.sequences.shape[1] - length} new tokens, right: {grade(problem, text)}")
print(f"keys and values: {cache.kv_bytes:,} bytes allocated; a dense cache takes {cache.dense_kv_bytes:,}")
print(f"tokens evicted, over layers and heads: {cache.num_evicted:,}")
