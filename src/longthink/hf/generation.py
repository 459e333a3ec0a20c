"""`generate`: ``model.generate`` with a bounded cache, and the checks that transformers does not make."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import transformers
from packaging.version import Version
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from longthink.cache import with_pages
from longthink.config import DEFAULT_POLICY, KvBits, brief_repr, check_int
from longthink.errors import NonFiniteError, UnsupportedFeatureError
from longthink.hf.arguments import Tokens, prompt_tensors
from longthink.hf.cache import PagedCache, make_cache
from longthink.hf.guard import check_limit, check_mask_columns, check_run, output_columns
from longthink.hf.loop import NEEDS_LIBRARY, DecodeLoop
from longthink.hf.placement import device_of
from longthink.hf.refusals import REFUSED, refusal
from longthink.hf.step import Compile, check_compile, compiles
from longthink.hf.support import check_model, text_limit
from longthink.policies import Policy, make_policy, policy_spec

CHUNKS_LATER_TURNS = Version(transformers.__version__) >= Version("5.21")
"""Whether transformers splits only what is new."""
_MODES = ("greedy_search", "sample", "beam_search", "beam_sample")


class _NonFiniteGuard(LogitsProcessor):
    """Stops generation at the first NaN: the tokens after it would be noise that looks like an answer."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # max() propagates NaN.
        if scores.max().isnan():
            raise NonFiniteError(
                f"the model's logits are NaN after {input_ids.shape[1]} tokens: its weights or inputs are damaged, "
                "or the dtype is too narrow"
            )
        return scores


def generate(
    model: PreTrainedModel,
    input_ids: Tokens | None = None,
    attention_mask: Tokens | None = None,
    *,
    policy: str | Policy = DEFAULT_POLICY,
    budget: int | None = None,
    decode_budget: int | None = None,
    kv_dtype: str | None = None,
    kv_bits: KvBits | int | str | None = None,
    compile: Compile = "auto",
    prefill_chunk_size: int | None = None,
    **generate_kwargs: Any,
) -> Any:
    """Call ``model.generate(input_ids, ...)`` with a KV cache that stays within a budget.

    Parameters
    ----------
    model
        A decoder-only transformers model with full attention.
    input_ids, attention_mask
        Prompt tokens, left-padded for batches, and their padding mask: tensors or lists of shape (B, N), or (N,)
        for one row. The output of a tokenizer works too, including its mask; omit both with ``inputs_embeds=``.
    policy
        What to keep: a policy, its name, or a spec such as ``raas:r=0.25``.
    budget, decode_budget
        Tokens to keep per layer and row: including the prompt, or on top of it. Give exactly one; neither for
        ``dense``.
    kv_dtype, kv_bits
        Format that keys and values are stored in, and bits of those outside the recent window; see `make_cache`.
    compile
        Whether to compile the decode step. Compiling takes about a minute, once for each model, policy, budget and
        number of rows, is announced by the logger ``longthink``, and makes each token cheaper. ``auto`` compiles from
        `longthink.hf.PAYS_FROM` new tokens on, or if this shape has been compiled before; it decodes eagerly if
        compiling fails.
    prefill_chunk_size
        Columns of the prompt to prefill at a time; None for all at once. Tokens are the same up to rounding, and the
        memory needed besides the cache depends on the chunk, not on the prompt.
    **generate_kwargs
        Arguments of ``model.generate``: ``max_new_tokens``, ``do_sample``, ``streamer``, ... Defaults come from
        ``generation_config=``, then from the model's own generation config, as in transformers. With
        ``past_key_values=`` the cache of an earlier call is continued (a second turn); then give no budget.

    Returns
    -------
    Tensor or ModelOutput
        What ``model.generate`` returns. With ``return_dict_in_generate=True`` its `past_key_values` is the cache.

    Raises
    ------
    BudgetError
        If the prompt does not fit, or the budget does not suit the policy.
    UnsupportedModelError, UnsupportedFeatureError
        If the model or a way of decoding is not supported, or cannot be compiled with ``compile=True``.
    NonFiniteError
        If the model produces NaN.
    CacheStateError
        If the model did not use the cache in all steps; see ``docs/verify.md``.
    ValueError
        If an argument is out of range.
    """
    check_compile(compile)
    check_model(model)
    input_ids, attention_mask = prompt_tensors(input_ids, attention_mask, generate_kwargs, device_of(model))
    config, others = _merge_options(model, generate_kwargs)
    _check_options(config, others)
    chunk_size = config.prefill_chunk_size if prefill_chunk_size is None else prefill_chunk_size
    if chunk_size is not None:
        check_int("prefill_chunk_size", chunk_size, 1)
        if input_ids is None or others.get("inputs_embeds") is not None:
            raise UnsupportedFeatureError(f"prefill_chunk_size={chunk_size} needs the prompt as input_ids")
    prompt = input_ids if others.get("inputs_embeds") is None else others["inputs_embeds"]
    columns = 0 if prompt is None else prompt.shape[1]
    check_limit(text_limit(model), _longest(config, columns))
    cache = generate_kwargs.pop("past_key_values", None)
    if cache is None:
        cache = make_cache(
            model,
            policy=policy,
            budget=budget,
            decode_budget=decode_budget,
            kv_dtype=kv_dtype,
            kv_bits=kv_bits,
        )
    else:
        _check_live_cache(model, cache, policy, budget, decode_budget)
        _check_live_format(cache, kv_dtype, KvBits.parse(kv_bits))
    guards = LogitsProcessorList([_NonFiniteGuard(), *(generate_kwargs.pop("logits_processor", None) or [])])
    rows = (1 if prompt is None else len(prompt)) * (config.num_return_sequences or 1)
    if _compiles(model, cache, rows, compile, generate_kwargs):
        generate_kwargs["custom_generate"] = DecodeLoop(compile, generate_kwargs.get("streamer"))
    new = 0 if prompt is None else _new_columns(cache, columns, attention_mask)
    announced = _announced(cache, new, chunk_size, attention_mask)
    with cache, cache.begin_chunked_prefill(announced) if announced else nullcontext():
        output = model.generate(
            input_ids,
            attention_mask=attention_mask,
            past_key_values=cache,
            logits_processor=guards,
            prefill_chunk_size=chunk_size,
            **generate_kwargs,
        )
        check_run(cache, output_columns(output, input_ids, prompt))
        return output


def _new_columns(cache: PagedCache, columns: int, mask_BN: Tensor | None) -> int:
    """How many columns the cache does not hold, of a prompt that is the whole text or what is new; raise for none."""
    if mask_BN is None or mask_BN.shape[-1] <= columns:
        new = columns - cache.columns
    else:
        # The mask tells that the prompt is what is new; transformers drops a mask that hides nothing.
        new = columns
        check_mask_columns(mask_BN.shape[-1], cache.columns, new)
    cache.check_new(new)
    return new


def _announced(cache: PagedCache, new: int, chunk_size: int | None, mask_BN: Tensor | None) -> int:
    """New columns that come in chunks: 0, or all, if there is room for them."""
    if chunk_size is None or not new:
        return 0
    if cache.columns and not CHUNKS_LATER_TURNS:
        raise UnsupportedFeatureError(
            f"prefill_chunk_size={chunk_size} in a later turn needs transformers >= 5.21: "
            f"{transformers.__version__} splits the text from its beginning"
        )
    # Before the first chunk is read: afterwards the conversation would be lost.
    cache.check_room(mask_BN, new)
    return new


def _merge_options(model: PreTrainedModel, kwargs: dict[str, Any]) -> tuple[GenerationConfig, dict[str, Any]]:
    """Decoding options of the call and the model, merged as in `model.generate`, and arguments of the model."""
    options = dict(kwargs)
    config, others = model._prepare_generation_config(options.pop("generation_config", None), **options)
    return config, others


def _longest(config: GenerationConfig, columns: int) -> int:
    """Columns that the model may read: all but the last token of the longest output."""
    longest = columns + config.max_new_tokens if config.max_new_tokens else config.max_length or 0
    return max(columns, longest - 1)


def _compiles(
    model: PreTrainedModel, cache: PagedCache, rows: int, compile: Compile, kwargs: dict[str, Any]
) -> bool:
    """Whether to decode with `DecodeLoop`; raise if it does not support the options and compiling was requested."""
    config, others = _merge_options(model, kwargs)
    for name in NEEDS_LIBRARY:
        value = getattr(config, name, None) or others.get(name)
        if value is None or value is False or (name == "num_beams" and value == 1):
            continue
        if compile is True:
            raise UnsupportedFeatureError(
                f"compile=True cannot be used with {name}={brief_repr(value)}: pass compile='auto'"
            )
        return False
    return compiles(model, cache, compile, rows=rows, tokens=config.max_new_tokens or config.max_length)


def _check_options(config: GenerationConfig, others: dict[str, Any]) -> None:
    for option in REFUSED:
        value = getattr(config, option, others.get(option))
        # A scale of 1 is no guidance.
        if value is not None and value is not False and (option, value) != ("guidance_scale", 1):
            raise refusal(option, value)
    mode = config.get_generation_mode().value
    if mode not in _MODES:
        raise UnsupportedFeatureError(
            f"{mode} cannot be used with a bounded cache: allowed is {', '.join(_MODES)}"
        )
    if config.use_cache is False and others.get("inputs_embeds") is None:
        raise UnsupportedFeatureError(
            "use_cache=False cannot be used with longthink, which is a cache: pass use_cache=True (it may come from "
            "model.generation_config)"
        )


def _check_live_cache(
    model: PreTrainedModel,
    cache: Any,
    policy: str | Policy,
    budget: int | None,
    decode_budget: int | None,
) -> None:
    if not isinstance(cache, PagedCache):
        raise UnsupportedFeatureError(
            f"past_key_values={type(cache).__name__} is not a longthink cache: pass one from make_cache(...), or the "
            "one that an earlier call with return_dict_in_generate=True returned"
        )
    cache.binding.check_model(model)
    if budget is not None or decode_budget is not None:
        raise ValueError("past_key_values has its own budget: pass neither budget nor decode_budget with it")
    given = make_policy(policy)
    if cache.kv_bits is not None:
        given = with_pages(given, cache.kv_bits)
    if policy != DEFAULT_POLICY and given != cache.policy:
        raise ValueError(
            f"past_key_values has policy {policy_spec(cache.policy)!r}, not {policy_spec(given)!r}"
        )


def _check_live_format(cache: PagedCache, kv_dtype: str | None, kv_bits: KvBits | None) -> None:
    if kv_dtype not in (None, cache.kv_dtype):
        raise ValueError(f"past_key_values has kv_dtype={cache.kv_dtype!r}, not {kv_dtype!r}")
    if kv_bits not in (None, cache.kv_bits):
        has = None if cache.kv_bits is None else str(cache.kv_bits)
        raise ValueError(f"past_key_values has kv_bits={has!r}, not {str(kv_bits)!r}")
