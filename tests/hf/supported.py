"""Ways of generating, each of which gives what transformers gives or is refused; docs/supported.md says which.

``python -m tests.hf.supported > docs/supported.md`` writes the page anew.
"""

import copy
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    BatchEncoding,
    GenerationConfig,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
)

import longthink
from tests.models import PAD, build, prompt

TOKENS = 12
POLICY = "raas"
IDS, MASK = prompt((21, 13))
ROW = IDS[:1]

HEAD = """# What is supported

Every line is a test (`tests/hf/test_supported.py`), and this page is written by `python -m tests.hf.supported`.
"Same" means that with an ample budget the tokens are those of transformers with its own cache. What is refused
raises the error shown, before a token is made. For models see the [README](../README.md); for what to look at while
it runs, [verify that it ran](verify.md).

"""


@dataclass(frozen=True)
class Way:
    """A way of generating: what it is, and how it is done with longthink and with transformers alone."""

    title: str
    ours: Callable[[Any], Any]
    theirs: Callable[[Any], Any] | None = None


def options(title: str, *, ids: Any = IDS, mask: Any = MASK, **given: Any) -> Way:
    """`longthink.generate` with options of `model.generate`."""
    given = dict(max_new_tokens=TOKENS, do_sample=False) | given

    def ours(model):
        torch.manual_seed(0)
        return longthink.generate(model, ids, mask, policy=POLICY, decode_budget=64, **copy.copy(given))

    def theirs(model):
        torch.manual_seed(0)
        text = (ids, mask) if isinstance(ids, torch.Tensor) else (IDS, MASK)
        return model.generate(text[0], attention_mask=text[1], **copy.copy(given))

    return Way(title, ours, theirs)


def by_cache(title: str, use: Callable[[Any, Any], Any], theirs: Callable[[Any], Any] | None = None) -> Way:
    """Something done with a cache of `longthink.make_cache`."""

    def ours(model):
        with longthink.make_cache(model, policy=POLICY, decode_budget=64) as cache:
            return use(model, cache)

    return Way(title, ours, theirs)


def greedy(model, ids=IDS, mask=MASK, **given):
    return model.generate(ids, attention_mask=mask, max_new_tokens=TOKENS, do_sample=False, **given)


def turns(model, cache=None, generate=None):
    """Two turns; the second has padding between them, and rows of different lengths."""
    generate = generate or (lambda text, mask: greedy(model, text, mask, past_key_values=cache))
    first = generate(IDS, MASK)
    text = torch.cat([first, torch.tensor([[5, 6, 7, 8], [PAD, PAD, 9, 10]])], 1)
    mask = torch.cat(
        [MASK, torch.ones_like(first[:, MASK.shape[1] :]), torch.tensor([[1] * 4, [0, 0, 1, 1]])], 1
    )
    return generate(text, mask)


def new_tokens_only(model, cache):
    """A second turn that gives what is new, and a mask for all of the text."""
    first = greedy(model, ROW, None, past_key_values=cache)
    new = torch.cat([first[:, -1:], longer(1)[:, -2:]], 1)
    text = greedy(model, new, torch.ones(1, first.shape[1] + 2), past_key_values=cache)
    return torch.cat([first[:, :-1], text], 1)


def without_old_text(model, cache):
    greedy(model, ROW, None, past_key_values=cache)
    return greedy(model, longer(1)[:, -2:], None, past_key_values=cache)


def without_last_token(model, cache):
    """The last token of the answer is neither in the cache nor in the new ids."""
    first = greedy(model, ROW, None, past_key_values=cache)
    mask = torch.ones(1, first.shape[1] + 2)
    return longthink.generate(model, longer(1)[:, -2:], mask, past_key_values=cache, max_new_tokens=TOKENS)


def two_turns_of_one(model):
    first = greedy(model, ROW, None)
    return greedy(model, torch.cat([first, longer(1)[:, -2:]], 1), None)


def longer(number):
    return torch.cat([ROW, torch.tensor([[3 + number, 4]])], 1)


def reuse(model, cache):
    with torch.no_grad():
        model(ROW, past_key_values=cache, logits_to_keep=1)
    copies = [copy.deepcopy(cache) for _ in range(2)]
    texts = [
        greedy(model, torch.cat([ROW, torch.tensor([[3 + i, 4]])], 1), None, past_key_values=copies[i])
        for i in range(2)
    ]
    return torch.cat(texts)


def hidden_middle(model, cache):
    first = greedy(model, ROW, None, past_key_values=cache)
    text = torch.cat([first, ROW[:, -2:]], 1)
    mask = torch.ones_like(text)
    mask[:, 15:18] = 0
    return greedy(model, text, mask, past_key_values=cache)


def ample(model, ids=IDS, mask=MASK, **given):
    """`longthink.generate`, greedily, with an ample budget."""
    given = dict(max_new_tokens=TOKENS, do_sample=False) | given
    return longthink.generate(model, ids, mask, policy=POLICY, decode_budget=64, **given)


def checkpointing(model):
    model.gradient_checkpointing_enable()
    return ample(model.train())


def dropout(model):
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    return ample(model.train())


def with_4d_mask(model, cache):
    mask = torch.ones(1, 1, 21, 21).tril()
    with torch.no_grad():
        return model(ROW, attention_mask=mask, past_key_values=cache).logits


class Discard:
    """A streamer that shows nothing."""

    def put(self, tokens):
        pass

    def end(self):
        pass


def after_eight(ids, scores, **kwargs):
    return torch.full((len(ids),), ids.shape[1] >= IDS.shape[1] + 8)


in_bfloat16 = torch.autocast("cpu", dtype=torch.bfloat16)


def interrupted(model, cache=None):
    """Ctrl-C in the middle, and then the text so far and something new."""
    seen = []

    def stop(ids, scores):
        seen.append(ids)
        if len(seen) == 6:
            raise KeyboardInterrupt
        return scores

    with suppress(KeyboardInterrupt):
        greedy(model, past_key_values=cache, logits_processor=LogitsProcessorList([stop]))
    text = torch.cat([seen[-1], IDS[:, -3:]], 1)
    return greedy(model, text, torch.cat([MASK, MASK[:, -1:].expand(-1, 8)], 1), past_key_values=cache)


GAPS = torch.tensor([[1] * 10 + [0] * 3 + [1] * 8])
PENALTY = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.3)])
MERGED = GenerationConfig(num_beams=2, max_new_tokens=TOKENS, pad_token_id=PAD)
ENCODED = BatchEncoding(dict(input_ids=IDS, attention_mask=MASK))
DICT = dict(return_dict_in_generate=True)

WAYS = [
    options("greedy search, left-padded batch"),
    options("sampling (same seed)", do_sample=True, temperature=0.9, top_k=20),
    options("beam search", num_beams=3),
    options("beam sampling (same seed)", num_beams=2, do_sample=True),
    options("several answers per prompt (same seed)", do_sample=True, num_return_sequences=3),
    options("repetition penalty and other logits processors", logits_processor=PENALTY),
    options("`generation_config=`", generation_config=MERGED),
    options("token ids as lists, the mask too", ids=IDS.tolist(), mask=MASK.tolist()),
    options("what a tokenizer returns (`BatchEncoding`)", ids=ENCODED, mask=None),
    options("a prompt read in chunks (`prefill_chunk_size`)", prefill_chunk_size=8),
    options("a `streamer`", ids=ROW, mask=None, streamer=Discard()),
    options("`stopping_criteria`", stopping_criteria=StoppingCriteriaList([after_eight])),
    options("the end token as `pad_token_id`", eos_token_id=7, pad_token_id=7),
    options("a right-padded batch", ids=IDS.flip(1), mask=MASK.flip(1)),
    options("a mask with gaps in the prompt", ids=ROW, mask=GAPS),
    Way("under `torch.autocast`", in_bfloat16(ample), in_bfloat16(greedy)),
    options("end tokens before the limit", eos_token_id=[7, 11, 19, 23, 42], pad_token_id=PAD),
    Way(
        "`inputs_embeds=`",
        lambda m: ample(m, None, inputs_embeds=m.get_input_embeddings()(IDS)),
        lambda m: greedy(m, None, inputs_embeds=m.get_input_embeddings()(IDS)),
    ),
    by_cache("`make_cache` and `model.generate`", lambda m, c: greedy(m, past_key_values=c), greedy),
    by_cache(
        "a second turn, with padding between the turns",
        turns,
        lambda m: turns(m, generate=lambda text, mask: greedy(m, text, mask)),
    ),
    by_cache(
        "a second turn of new tokens only, with a mask for all of the text", new_tokens_only, two_turns_of_one
    ),
    by_cache("going on after an exception or Ctrl-C between two tokens", interrupted, interrupted),
    by_cache(
        "a prompt read once and continued twice (`copy.deepcopy`)",
        reuse,
        lambda m: torch.cat([greedy(m, longer(i), None) for i in range(2)]),
    ),
    Way("under `torch.inference_mode()`", torch.inference_mode()(ample), greedy),
    options("`output_hidden_states`, `output_scores`", output_hidden_states=True, output_scores=True, **DICT),
    options("`output_attentions`", output_attentions=True, **DICT),
    by_cache(
        "`output_attentions` on a cache",
        lambda m, c: greedy(m, past_key_values=c, output_attentions=True, **DICT),
    ),
    options("`use_cache=False`", use_cache=False),
    options("`guidance_scale`", guidance_scale=1.5),
    by_cache("`guidance_scale` on a cache", lambda m, c: greedy(m, past_key_values=c, guidance_scale=1.5)),
    options("`prompt_lookup_num_tokens`", prompt_lookup_num_tokens=3),
    Way("`assistant_model`", lambda m: ample(m, ROW, None, assistant_model=m)),
    options("contrastive search (`penalty_alpha`)", penalty_alpha=0.6, top_k=4),
    options("DoLa (`dola_layers`)", dola_layers="high"),
    options("`cache_implementation`", cache_implementation="static"),
    options("`custom_generate`", custom_generate="someone/loop"),
    options("constrained beam search (`force_words_ids`)", force_words_ids=[[5]], num_beams=2),
    options("group beam search", num_beams=4, num_beam_groups=2, diversity_penalty=0.5),
    Way("`model.train()` with gradient checkpointing", checkpointing),
    Way("`model.train()` with attention dropout", dropout),
    by_cache(
        "assisted decoding on a cache",
        lambda m, c: greedy(m, ROW, None, past_key_values=c, prompt_lookup_num_tokens=2),
    ),
    by_cache("a 4D attention mask", with_4d_mask),
    by_cache("a mask that hides the middle of a text later", hidden_middle),
    by_cache("a second turn of new tokens only, without a mask for all", without_old_text),
    by_cache("a second turn without the last token of the first", without_last_token),
    by_cache("`cache.crop`", lambda m, c: (greedy(m, past_key_values=c), c.crop(3))),
    by_cache("pickling a cache", lambda m, c: c.__reduce_ex__(2)),
    Way("`torch.compile(model)` as the model", lambda m: ample(torch.compile(m), ROW, None)),
]


def outcome(way: Way, model: Any) -> tuple[str, str]:
    """``same`` or ``refused``, and the message."""
    try:
        found = way.ours(model)
    except (longthink.LongthinkError, ValueError) as error:
        return "refused", f"{type(error).__name__}: {error}"
    expected = way.theirs(model) if way.theirs is not None else None
    found, expected = (getattr(one, "sequences", one) for one in (found, expected))
    return ("same" if expected is not None and torch.equal(found, expected) else "DIFFERENT"), ""


def page() -> str:
    """The page, from what happens."""
    found = [(way.title, *outcome(way, build("qwen2", num_hidden_layers=1))) for way in WAYS]
    lines = ["| way of generating | |", "|---|---|"]
    lines += [f"| {title} | {result} |" for title, result, _ in found if result != "refused"]
    lines += ["", "## Refused", "", "| way of generating | message |", "|---|---|"]
    for title, result, message in found:
        if result == "refused":
            shown = message.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
            lines.append(f"| {title} | {shown} |")
    return HEAD + "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
