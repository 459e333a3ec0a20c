"""``longthink generate``: text from a prompt, with a bounded cache."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from longthink.cli.chat import Conversation, chat, read_questions
from longthink.cli.decode import Decoded, catch_interrupt, decode
from longthink.cli.errors import EXIT_INTERRUPTED
from longthink.cli.models import load_model
from longthink.cli.options import BudgetOptions, ModelOptions, ProblemOptions, SamplingOptions, Switch
from longthink.cli.progress import progress
from longthink.cli.prompts import check_words, encode_prompt, read_prompt
from longthink.cli.terminal import note, shares_place, write_json, write_text
from longthink.cli.text import size_text
from longthink.config import DEFAULT_POLICY, Budget, check_int
from longthink.environment import versions
from longthink.models import REASONER, Loaded
from longthink.reasoner import Problem, grade, make_problem

if TYPE_CHECKING:
    from torch import Tensor

    from longthink.hf import PagedCache
    from longthink.policies import Policy

DECODE_BUDGET = 1024  # tokens kept on top of the prompt if no budget is given
DECODE_BUDGET_BUILTIN = 256  # the same for the built-in model, whose texts are shorter
MAX_NEW_TOKENS = 2048  # default limit of new tokens, except for the built-in model


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class GenerateOptions(ProblemOptions, SamplingOptions, BudgetOptions, ModelOptions):
    """Options of ``longthink generate``."""

    file: Annotated[str | None, Parameter(allow_leading_hyphen=True)] = None
    """Read the prompt from this UTF-8 text file (- is standard input)."""
    raw: Switch = False
    """Pass the prompt to the model as it is, without the chat template."""
    policy: str = DEFAULT_POLICY
    """What the cache keeps, with options after colons, such as raas:r=0.25; see "longthink policies"."""
    kv_dtype: str | None = None
    """Format to store keys and values in: bfloat16, float16 or float32; by default the model's own."""
    kv_bits: str | None = None
    """Bits of pages that have left the recent window: 8, 4, 3, 2, or keys/values such as 4/2 (docs/precision.md)."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the decode step, which takes about a minute; auto: if so many tokens are requested that it pays."""
    prefill_chunk_size: int | None = None
    """Prefill the prompt in chunks of this many tokens, for prompts that do not fit in memory at once."""
    chat: Switch = False
    """Hold a conversation: one line of standard input is one question, until Ctrl-D."""
    json: Switch = False
    """Print one JSON document instead of the text."""


_DEFAULTS = GenerateOptions()


@dataclass(frozen=True, kw_only=True)
class _Run:
    loaded: Loaded
    policy: Policy
    budget: dict[str, Any]
    options: GenerateOptions
    inputs: dict[str, Tensor] = field(default_factory=dict)
    problem: Problem | None = None

    @property
    def stored(self) -> dict[str, Any]:
        """Budget and format of the cache."""
        return self.budget | {"kv_dtype": self.options.kv_dtype, "kv_bits": self.options.kv_bits}


def generate(prompt: str | None = None, /, *, options: GenerateOptions = _DEFAULTS) -> int:
    """Generate text with a bounded KV cache.

    The text goes to standard output; a line with tokens, speed and memory follows on standard error. Ctrl-C ends the
    text.

    Parameters
    ----------
    prompt
        The prompt, or - for standard input, which is also read if something is piped in. Without a prompt the
        built-in model gets a problem of its own kind (profile, size, seed).
    """
    if options.chat:
        return _chat(prompt, options)
    text = read_prompt(prompt, options.file)
    if text is None and options.model != REASONER:
        raise ValueError(
            'there is no prompt: pass it as an argument, with --file, or on standard input ("-")'
        )
    run = _with_prompt(_load(options), text)
    from longthink import make_cache

    with make_cache(run.loaded.model, policy=run.policy, **run.stored) as cache:
        if run.problem is not None:
            name = f"profile {options.profile}, size {options.size}, seed {options.seed}"
            note(f"no prompt given: here is a problem ({name})")
            if not options.json:
                write_text(f"{run.problem.prompt}\n\n")
        decoded = _decode(run, cache)
    if options.json:
        write_json(_record(run, decoded, cache))
    else:
        write_text("\n")
        note(closing_line(decoded, cache))
        if (cache.break_even_tokens or 0) > cache.get_seq_length():
            note(
                "the bounded cache is larger than a dense one here because its slots are allocated in full with the "
                f"prompt: it pays off from {cache.break_even_tokens:,} tokens on, prompt included"
            )
        if run.problem is not None and decoded.stopped == "end":
            verdict = "right" if grade(run.problem, decoded.text) else "wrong"
            note(f"the answer is {run.problem.answer}: the model is {verdict}")
    return EXIT_INTERRUPTED if decoded.stopped == "interrupted" else 0


def _chat(prompt: str | None, options: GenerateOptions) -> int:
    if options.json or options.file is not None:
        raise ValueError(
            "--chat reads its questions from standard input and prints text: omit --json and --file"
        )
    questions = read_questions(prompt)
    run = _load(options)
    from longthink import make_cache

    loaded = run.loaded
    conversation = Conversation(loaded.tokenizer, raw=options.raw, builtin=loaded.builtin)
    with make_cache(loaded.model, policy=run.policy, **run.stored) as cache:
        ended = chat(
            questions, conversation, lambda inputs: _decode(replace(run, inputs=inputs), cache), cache
        )
    return EXIT_INTERRUPTED if ended == "interrupted" else 0


def _load(options: GenerateOptions) -> _Run:
    from longthink.policies import make_policy

    if options.prefill_chunk_size is not None:
        check_int("prefill_chunk_size", options.prefill_chunk_size, 1)
    policy = make_policy(options.policy)
    budget = _budget(options, policy)
    return _Run(loaded=load_model(options), policy=policy, budget=budget, options=options)


def _with_prompt(run: _Run, text: str | None) -> _Run:
    """The run with a prompt, a problem of the built-in model where there is no text."""
    options, tokenizer, problem = run.options, run.loaded.tokenizer, None
    if text is None:
        problem = make_problem(seed=options.seed, profile=options.profile, size=options.size)
        text = problem.prompt
    inputs = encode_prompt(tokenizer, text, raw=options.raw)
    if run.loaded.builtin:
        check_words(tokenizer, text)
    return replace(run, inputs=inputs, problem=problem)


def _budget(options: GenerateOptions, policy: Policy) -> dict[str, Any]:
    from longthink.policies import needs_budget

    chosen = options.given_budget
    if chosen:
        Budget(**chosen)
    elif needs_budget(policy):
        chosen = {"decode_budget": DECODE_BUDGET_BUILTIN if options.model == REASONER else DECODE_BUDGET}
        note(
            f"no budget given: keeping {chosen['decode_budget']} tokens on top of the prompt (--decode-budget)"
        )
    return chosen


def _decode(run: _Run, cache: PagedCache) -> Decoded:
    import torch

    options, loaded = run.options, run.loaded
    prompt_tokens = run.inputs["input_ids"].shape[1]
    limit = options.max_new_tokens or MAX_NEW_TOKENS
    if loaded.context is not None:
        room = loaded.context - prompt_tokens
        if loaded.builtin and options.max_new_tokens is None:
            limit = max(room, 1)
        if limit > room:
            note(
                f"{loaded.name} was made for {loaded.context} tokens; this may reach {prompt_tokens + limit}"
            )
    streams = not options.json
    shares_screen = streams and shares_place(sys.stdout, sys.stderr)
    torch.manual_seed(options.seed)
    title = "reading the prompt" if shares_screen else "generating"
    with catch_interrupt() as interrupted, progress(title, total=None, unit="tokens") as task:

        def on_text(text: str) -> None:
            if shares_screen:
                task.hide()
            if streams:
                write_text(text)

        return decode(
            loaded.model, loaded.tokenizer, run.inputs, cache, on_text=on_text, on_step=task.advance_to,
            interrupted=interrupted, max_new_tokens=limit,
            compile={"auto": "auto", "on": True, "off": False}[options.compile],
            prefill_chunk_size=options.prefill_chunk_size, **options.generate_kwargs(),
        )  # fmt: skip


def closing_line(decoded: Decoded, cache: PagedCache) -> str:
    ends = {"end": "", "length": " (token limit reached)", "interrupted": " (interrupted)"}
    return " · ".join(
        [
            f"{len(decoded.tokens)} tokens{ends[decoded.stopped]}",
            f"{decoded.tokens_per_s:.1f} tokens/s",
            f"KV cache {_sizes(cache)}, dense would be {size_text(cache.dense_kv_bytes)}",
            f"{cache.num_evicted:,} evictions",
        ]
    )


def _sizes(cache: PagedCache) -> str:
    """Bytes of the cache, and where not all layers are bounded by the budget, those of each kind."""
    parts = {kind: size_text(held) for kind, held in cache.kv_bytes_parts.items() if held}
    shown = f" ({', '.join(f'{kind} {size}' for kind, size in parts.items())})" if len(parts) > 1 else ""
    return f"{size_text(cache.kv_bytes)}{shown}"


def _record(run: _Run, decoded: Decoded, cache: PagedCache) -> dict[str, Any]:
    options, problem = run.options, run.problem
    held = cache.summary()
    sampling = {name: getattr(options, name) for name in ("temperature", "top_p", "top_k", "seed")}
    record: dict[str, Any] = {
        "text": decoded.text,
        "stopped": decoded.stopped,
        "tokens": {"prompt": run.inputs["input_ids"].shape[1], "generated": len(decoded.tokens)},
        "timing": {
            "load_s": run.loaded.seconds,
            "prompt_s": decoded.prompt_s,
            "decode_s": decoded.decode_s,
            "tokens_per_s": decoded.tokens_per_s,
        },
        "bytes": {
            name: held[name] for name in ("kv_bytes", "kv_bytes_parts", "dense_kv_bytes", "metadata_bytes")
        },
        "evictions": held["num_evicted"],
        "policy": held["policy"],
        "budget": held["budget"],
        "decode_budget": held["decode_budget"],
        "sampling": sampling,
        "model": run.loaded.describe(),
        "versions": versions(),
    }
    if problem is not None:
        record["problem"] = {
            "profile": options.profile,
            "size": options.size,
            "seed": options.seed,
            "prompt": problem.prompt,
            "answer": problem.answer,
            "right": grade(problem, decoded.text),
        }
    return record
