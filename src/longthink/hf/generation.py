"""`generate`: the one changed line."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from longthink.config import DEFAULT_POLICY, brief_repr, check_int
from longthink.errors import NonFiniteError, UnsupportedFeatureError
from longthink.hf.arguments import Tokens, prompt_tensors
from longthink.hf.binding import check_gradient_checkpointing
from longthink.hf.cache import PagedCache, make_cache
from longthink.hf.loop import NEEDS_LIBRARY, DecodeLoop
from longthink.hf.step import Compile, check_compile, compiles
from longthink.hf.support import check_model
from longthink.policies import Policy, make_policy, policy_spec

# Options of `model.generate` that a bounded cache cannot serve; None and False leave them off.
_REFUSED = {
    "assistant_model": "assisted decoding takes tokens back",
    "prompt_lookup_num_tokens": "assisted decoding takes tokens back",
    "assistant_early_exit": "assisted decoding takes tokens back",
    "use_mtp": "assisted decoding takes tokens back",
    "penalty_alpha": "contrastive search takes tokens back",
    "dola_layers": "DoLa decoding is not supported",
    "custom_generate": "custom decoding loops are not supported",
    "cache_implementation": "longthink is the cache",
    "output_attentions": "attention weights of evicted tokens do not exist; see cache.resident_positions",
}
_MODES = ("greedy_search", "sample", "beam_search", "beam_sample")


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
    input_ids: Tokens | None = None,
    attention_mask: Tokens | None = None,
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
        Prompt tokens, left-padded for batches, and their padding mask: tensors or lists, of shape (B, N), or (N,)
        for one row. What a tokenizer returns is taken as well, mask and all; with ``inputs_embeds=`` there may be
        none.
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
        Anything that ``model.generate`` takes: ``max_new_tokens``, ``do_sample``, ``streamer``, ... What is not given
        comes from ``generation_config=``, and then from the model's own generation config, as in transformers. With
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
    check_model(model)
    input_ids, attention_mask = prompt_tensors(input_ids, attention_mask, generate_kwargs, model.device)
    _check_options(model, generate_kwargs)
    pieces = _piece_size(model, input_ids, prefill_chunk_size, generate_kwargs)
    cache = generate_kwargs.pop("past_key_values", None)
    if cache is None:
        cache = make_cache(
            model, policy=policy, budget=budget, decode_budget=decode_budget, kv_dtype=kv_dtype
        )
    else:
        _check_live_cache(model, cache, policy, budget, decode_budget, kv_dtype)
    guards = LogitsProcessorList([_NonFiniteGuard(), *(generate_kwargs.pop("logits_processor", None) or [])])
    given = generate_kwargs.get("inputs_embeds") if input_ids is None else input_ids
    if _compiles(model, cache, 1 if given is None else len(given), compile, generate_kwargs):
        generate_kwargs["custom_generate"] = DecodeLoop(compile, generate_kwargs.get("streamer"))
    columns = 0 if pieces is None or input_ids is None else input_ids.shape[1]
    with cache, cache.begin_chunked_prefill(columns) if columns else nullcontext():
        return model.generate(
            input_ids,
            attention_mask=attention_mask,
            past_key_values=cache,
            logits_processor=guards,
            prefill_chunk_size=pieces,
            **generate_kwargs,
        )


def _settled(model: PreTrainedModel, options: dict[str, Any]) -> tuple[GenerationConfig, dict[str, Any]]:
    """What the library will decode with, and what it is no option of: merged as `model.generate` does it."""
    options = dict(options)
    return model._prepare_generation_config(options.pop("generation_config", None), **options)


def _compiles(
    model: PreTrainedModel, cache: PagedCache, rows: int, compile: Compile, options: dict[str, Any]
) -> bool:
    """Whether our own loop decodes, with a compiled step."""
    config, others = _settled(model, options)
    for name in NEEDS_LIBRARY:
        value = getattr(config, name, None) or others.get(name)
        if value is None or value is False or (name == "num_beams" and value == 1):
            continue
        if compile is True:
            raise UnsupportedFeatureError(
                f"compile=True cannot be used with {name}={brief_repr(value)}: give compile='auto'"
            )
        return False
    rows *= config.num_return_sequences or 1
    return compiles(model, cache, compile, rows=rows, tokens=config.max_new_tokens or config.max_length)


def _check_options(model: PreTrainedModel, options: dict[str, Any]) -> None:
    check_gradient_checkpointing(model)
    for option in ("assistant_model", "custom_generate"):
        _refuse(option, options.get(option))
    config, _ = _settled(model, options)
    for option in _REFUSED:
        _refuse(option, getattr(config, option, None))
    mode = config.get_generation_mode().value
    if mode not in _MODES:
        raise UnsupportedFeatureError(
            f"{mode} cannot be used with a bounded cache: allowed is {', '.join(_MODES)}"
        )
    if config.guidance_scale not in (None, 1):
        raise UnsupportedFeatureError(
            f"guidance_scale={config.guidance_scale!r} cannot be used with a bounded cache: it reads a second text, "
            "with a cache that nothing bounds"
        )
    if config.use_cache is False and options.get("inputs_embeds") is None:
        raise UnsupportedFeatureError(
            "use_cache=False cannot be used with longthink, which is a cache: give use_cache=True, if it comes from "
            "the generation config of the model"
        )


def _refuse(option: str, value: Any) -> None:
    if value is not None and value is not False:
        raise UnsupportedFeatureError(
            f"{option}={brief_repr(value)} cannot be used with a bounded cache: {_REFUSED[option]}"
        )


def _piece_size(
    model: PreTrainedModel, input_ids: Tensor | None, given: int | None, options: dict[str, Any]
) -> int | None:
    size = _settled(model, options)[0].prefill_chunk_size if given is None else given
    if size is None:
        return None
    check_int("prefill_chunk_size", size, 1)
    if input_ids is None or options.get("inputs_embeds") is not None:
        raise UnsupportedFeatureError(f"prefill_chunk_size={size} needs the prompt as input_ids")
    return size


def _check_live_cache(
    model: PreTrainedModel,
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
    cache.binding.check_model(model)
    if budget is not None or decode_budget is not None:
        raise ValueError("past_key_values has its own budget: give neither budget nor decode_budget with it")
    if kv_dtype not in (None, cache.kv_dtype):
        raise ValueError(f"past_key_values has kv_dtype={cache.kv_dtype!r}, not {kv_dtype!r}")
    if policy != DEFAULT_POLICY and make_policy(policy) != cache.policy:
        raise ValueError(
            f"past_key_values has policy {policy_spec(cache.policy)!r}, not {policy_spec(make_policy(policy))!r}"
        )
