"""`generate`: the one changed line."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from longthink.config import DEFAULT_POLICY, check_int
from longthink.errors import NonFiniteError, UnsupportedFeatureError
from longthink.hf.cache import PagedCache, make_cache
from longthink.hf.loop import NEEDS_LIBRARY, StepLoop
from longthink.hf.step import Compile, check_compile, compiles
from longthink.policies import Policy, make_policy, policy_spec

# Options of `model.generate` that a bounded cache cannot serve, and the values that leave them off.
_REFUSED = {
    "assistant_model": "assisted decoding takes tokens back",
    "prompt_lookup_num_tokens": "assisted decoding takes tokens back",
    "assistant_early_exit": "assisted decoding takes tokens back",
    "penalty_alpha": "contrastive search takes tokens back",
    "dola_layers": "DoLa decoding is not supported",
    "custom_generate": "custom decoding loops are not supported",
    "cache_implementation": "longthink is the cache",
    "output_attentions": "attention weights of evicted tokens do not exist; see cache.resident_positions",
}


class _NonFiniteGuard(LogitsProcessor):
    """Stops generation at the first NaN: its tokens would be noise that looks like an answer."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # The largest of numbers among which there is a NaN is NaN.
        if scores.max().isnan():
            raise NonFiniteError(
                f"the model's logits are NaN after {input_ids.shape[1]} tokens: its weights or inputs are damaged, "
                "or the dtype is too narrow"
            )
        return scores


def generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    policy: str | Policy = DEFAULT_POLICY,
    budget: int | None = None,
    decode_budget: int | None = None,
    kv_dtype: str | None = None,
    compile: Compile = "auto",
    prefill_chunk_size: int | None = None,
    **generate_kwargs: Any,
) -> Any:
    """Like ``model.generate(input_ids, ...)``, with a KV cache that stays within a budget.

    Parameters
    ----------
    model
        A decoder-only transformers model with full attention.
    input_ids, attention_mask
        Prompt tokens, left-padded for batches, and their padding mask.
    policy
        What to keep: a policy, its name, or a text such as ``raas:r=0.25``.
    budget, decode_budget
        Tokens to keep in each layer and row: prompt included, or on top of the prompt. Exactly one of the two,
        and none for ``dense``.
    kv_dtype
        Format that keys and values are kept in; see `make_cache`.
    compile
        Whether the decode step is compiled into one program. That takes about a minute, once for each model, policy,
        budget and number of rows, and makes each token cheaper. ``auto`` compiles from `longthink.hf.PAYS_FROM` new
        tokens on, or where the program is there already, and goes on eagerly where compiling fails.
    prefill_chunk_size
        Columns of the prompt to read at once; None reads it in one go. The tokens are the same but for rounding, and
        the memory beside the cache follows the piece, not the prompt.
    **generate_kwargs
        Anything that ``model.generate`` takes: ``max_new_tokens``, ``do_sample``, ``streamer``, ... With
        ``past_key_values=`` the cache of an earlier call goes on (a second turn); then no budget is given.

    Returns
    -------
    Tensor or ModelOutput
        What ``model.generate`` returns. With ``return_dict_in_generate=True`` its `past_key_values` is the cache.

    Raises
    ------
    BudgetError
        If the prompt does not fit, or the budget does not suit the policy.
    UnsupportedModelError, UnsupportedFeatureError
        If the model, or a way of decoding, would be served wrongly; or with ``compile=True`` cannot be compiled.
    NonFiniteError
        If the model produces NaN.
    ValueError
        If an argument is out of range.
    """
    check_compile(compile)
    _check_options(model, generate_kwargs)
    pieces = _piece_size(model, input_ids, prefill_chunk_size, generate_kwargs)
    cache = generate_kwargs.pop("past_key_values", None)
    if cache is None:
        cache = make_cache(
            model, policy=policy, budget=budget, decode_budget=decode_budget, kv_dtype=kv_dtype
        )
    else:
        _check_live_cache(cache, policy, budget, decode_budget, kv_dtype)
    guards = LogitsProcessorList([_NonFiniteGuard(), *generate_kwargs.pop("logits_processor", [])])
    if _compiles(model, cache, len(input_ids), compile, generate_kwargs):
        generate_kwargs["custom_generate"] = StepLoop(compile, generate_kwargs.get("streamer"))
    with cache, nullcontext() if pieces is None else cache.expect_prompt(input_ids.shape[1]):
        return model.generate(
            input_ids,
            attention_mask=attention_mask,
            past_key_values=cache,
            logits_processor=guards,
            prefill_chunk_size=pieces,
            **generate_kwargs,
        )


def _compiles(
    model: PreTrainedModel, cache: PagedCache, rows: int, compile: Compile, options: dict[str, Any]
) -> bool:
    """Whether our own loop decodes, with a compiled step."""

    def option(name: str) -> Any:
        config = options.get("generation_config") or model.generation_config
        return options.get(name, getattr(config, name, None))

    needs_library = [name for name in NEEDS_LIBRARY if option(name) not in (None, False, 1)]
    if needs_library and compile is True:
        raise UnsupportedFeatureError(
            f"compile=True cannot be used with {needs_library[0]}={option(needs_library[0])!r}: give compile='auto'"
        )
    if needs_library:
        return False
    rows *= option("num_return_sequences") or 1
    tokens = option("max_new_tokens") or option("max_length")
    return compiles(model, cache, compile, rows=rows, tokens=tokens)


def _check_options(model: PreTrainedModel, options: dict[str, Any]) -> None:
    config = options.get("generation_config") or getattr(model, "generation_config", None)
    for option, reason in _REFUSED.items():
        value = options.get(option, getattr(config, option, None))
        if value is not None and value is not False:
            raise UnsupportedFeatureError(f"{option}={value!r} cannot be used with a bounded cache: {reason}")
    if options.get("use_cache", getattr(config, "use_cache", True)) is False:
        raise UnsupportedFeatureError("use_cache=False cannot be used with longthink: it is a cache")


def _piece_size(
    model: PreTrainedModel, input_ids: Any, given: int | None, options: dict[str, Any]
) -> int | None:
    config = options.get("generation_config") or getattr(model, "generation_config", None)
    size = getattr(config, "prefill_chunk_size", None) if given is None else given
    if size is None:
        return None
    check_int("prefill_chunk_size", size, 1)
    if not isinstance(input_ids, Tensor) or "inputs_embeds" in options:
        raise UnsupportedFeatureError(f"prefill_chunk_size={size} needs the prompt as input_ids")
    return size


def _check_live_cache(
    cache: Any,
    policy: str | Policy,
    budget: int | None,
    decode_budget: int | None,
    kv_dtype: str | None,
) -> None:
    if not isinstance(cache, PagedCache):
        raise UnsupportedFeatureError(
            f"past_key_values={type(cache).__name__} is no longthink cache: take the one that an earlier call with "
            "return_dict_in_generate=True returned, or make_cache(...)"
        )
    if budget is not None or decode_budget is not None:
        raise ValueError("past_key_values has its own budget: give neither budget nor decode_budget with it")
    if kv_dtype not in (None, cache.kv_dtype):
        raise ValueError(f"past_key_values has kv_dtype={cache.kv_dtype!r}, not {kv_dtype!r}")
    if policy != DEFAULT_POLICY and make_policy(policy) != cache.policy:
        raise ValueError(
            f"past_key_values has policy {policy_spec(cache.policy)!r}, not {policy_spec(make_policy(policy))!r}"
        )
