"""What longthink does with a family: compared with transformers where nothing is evicted, and with a slow reading of
the residents where something is.

Shape suffixes: B rows, Q queries, N keys, H query heads, D head dim, T tokens, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

import longthink
from longthink.errors import LongthinkError
from longthink.hf import DecodeStep
from longthink.hf.forecast import forecast
from longthink.hf.layer_kinds import is_recurrent, window_of
from tests.examples import TIMES
from tests.families.tiny import NotTriedError, tiny

PROMPT, STEPS, PADDING = 21, 12, 6
POLICY = "recency:page_size=4"
UNFORESEEN = ("jetmoe", "mimo_v2_flash")
"""The one repeats the keys that it has given to the cache, the other has more KV heads in windowed layers."""
TOLERANCE = 2e-3
"""Of the distance of logits, relative to their spread."""


@dataclass(frozen=True)
class Outcome:
    """``served``, ``refused`` or ``not tried``, and which layers there are, or why."""

    result: str
    text: str


def outcome(family: str) -> Outcome:
    """What happens to a tiny model of the family; `AssertionError` if a number is wrong."""
    try:
        model = tiny(family)
    except NotTriedError as error:
        return Outcome("not tried", str(error))
    try:
        cache = longthink.make_cache(model, policy=POLICY, decode_budget=64)
    except LongthinkError as error:
        return Outcome("refused", str(error))
    cache.close()
    check(model)
    return Outcome("served", layers(cache))


def layers(cache: Any) -> str:
    """Kinds of layers, as the table shows them."""
    windows = sum(window_of(layer) is not None for layer in cache.natives.values())
    states = sum(map(is_recurrent, cache.natives.values()))
    beside = sum(map(is_recurrent, cache.paged))
    parts = {
        "full": len(cache.paged),
        "windowed": windows,
        "recurrent": states,
        "of them with a state": beside,
    }
    return ", ".join(f"{count} {kind}" for kind, count in parts.items() if count)


def check(model: PreTrainedModel) -> None:
    """Compare an ample budget, with a left-padded pair, and a tight one, with a row alone.

    By night the ample one with a row alone as well: by day the tight one is what reads a prompt without a mask.
    """
    text_BT = texts(model)
    mask_BT = torch.ones_like(text_BT)
    mask_BT[1, :PADDING] = 0
    alone = [(text_BT[:1], None)] if TIMES > 1 else []
    for rows, mask in (*alone, (text_BT, mask_BT)):
        with longthink.make_cache(model, policy=POLICY, decode_budget=64) as cache:
            found_BTV = stepwise(model, rows, mask, cache)[0]
            assert cache.num_evicted == 0
        expected_BTV = stepwise(model, rows, mask, DynamicCache(config=model.config))[0]
        assert error(found_BTV, expected_BTV, mask) < TOLERANCE, "an ample budget"
        with longthink.make_cache(model, policy=POLICY, decode_budget=64) as cache:
            stepwise(model, rows[:, :PROMPT], None if mask is None else mask[:, :PROMPT], cache, steps=0)
            step = DecodeStep(model, cache, compile=False)
            found_BTV = torch.stack([step(token_B1) for token_B1 in rows[:, PROMPT:].split(1, 1)], 1)
        assert error(found_BTV, expected_BTV[:, PROMPT:], None) < TOLERANCE, "steps of longthink"
    with longthink.make_cache(model, policy=POLICY, decode_budget=4) as cache:
        found_BTV, residents = stepwise(model, text_BT[:1], None, cache)
        assert cache.num_evicted > 0
        places = [layer.index for layer in cache.paged]
        foreseen, bound = forecast(model.config), cache.bound_tokens
        held = cache.kv_bytes_parts
        if model.config.model_type not in UNFORESEEN:
            assert held["bounded"] == bound * foreseen.token_bytes, "a forecast"
            assert held["windowed"] == foreseen.window_numbers * foreseen.itemsize, "a forecast of windows"
            native = held["windowed"] + held["recurrent"]
            assert (
                cache.dense_kv_bytes - native == (PROMPT + STEPS) * foreseen.dense_numbers * foreseen.itemsize
            )
    expected_BTV = on_residents(model, text_BT[:1], residents, places)
    assert error(found_BTV, expected_BTV, None) < TOLERANCE, "a tight budget"


def texts(model: PreTrainedModel) -> Tensor:
    """Two random texts, BT."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(
        3, model.config.get_text_config().vocab_size, (2, PROMPT + STEPS), generator=generator
    )


@torch.no_grad()
def stepwise(
    model: PreTrainedModel, text_BT: Tensor, mask_BT: Tensor | None, cache: Any, steps: int = STEPS
) -> tuple[Tensor, list[list[int]]]:
    """Logits of a text read as a prompt and then token by token, BTV; and the positions held after each step."""
    found, held = [], []
    for start, end in [(0, PROMPT), *((i, i + 1) for i in range(PROMPT, PROMPT + steps))]:
        inputs = model.prepare_inputs_for_generation(
            text_BT[:, :end],
            attention_mask=torch.ones_like(text_BT[:, :end]) if mask_BT is None else mask_BT[:, :end],
            past_key_values=cache,
            next_sequence_length=end - start,
            use_cache=True,
            is_first_iteration=start == 0,
        )
        inputs.pop("logits_to_keep", None)  # some ask for the last ones only
        # As `generate` does before it asks for the inputs.
        real_BT = torch.ones_like(text_BT) if mask_BT is None else mask_BT
        inputs["position_ids"] = (real_BT.cumsum(1) - 1).clamp(min=0)[:, start:end]
        found.append(model(**inputs).logits)
        if hasattr(cache, "paged"):
            held.append(cache.resident_positions(cache.paged[0].index)[0][0])
    return torch.cat(found, 1), held


def error(found_BTV: Tensor, expected_BTV: Tensor, mask_BT: Tensor | None) -> float:
    """Distance of logits relative to their spread, the 0.9 quantile over columns: experts may tip over."""
    found, expected = found_BTV.double(), expected_BTV.double()
    spread = (expected - expected.mean(-1, keepdim=True)).norm(dim=-1).clamp(min=1e-12)
    distance_BT = ((found - expected).norm(dim=-1) / spread).nan_to_num(torch.inf)
    shown = distance_BT.flatten() if mask_BT is None else distance_BT[mask_BT.bool()]
    return float(shown.quantile(0.9))


# A slow reading of the residents -----------------------------------------------------------------------------------


@torch.no_grad()
def on_residents(model: PreTrainedModel, text_BT: Tensor, held: list[list[int]], places: list[int]) -> Tensor:
    """Logits of a text, BTV, with transformers' cache of all tokens, of which layers at `places` read in each step
    only those held then.
    """
    read_TT = torch.ones(text_BT.shape[1], text_BT.shape[1], dtype=torch.bool).tril()
    for step, positions in enumerate(held[1:]):
        read_TT[PROMPT + step] = False
        read_TT[PROMPT + step, positions] = True

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **given: Any
    ) -> Any:
        scaling = given.get("scaling") or query.shape[-1] ** -0.5
        shares = getattr(module, "is_kv_shared_layer", False) and not given.get("sliding_window")
        paged = module.layer_idx in places or shares
        softcap, sinks = given.get("softcap"), given.get("s_aux")
        if not paged and softcap is None and sinks is None:
            return sdpa_attention_forward(module, query, key, value, attention_mask, **given)
        seen, new = key.shape[2], query.shape[2]
        plain = paged or attention_mask is None
        read = read_TT[seen - new : seen, :seen] if plain else attention_mask
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        logits = torch.einsum("bhqd,bhnd->bhqn", query, key) * scaling
        if softcap is not None:
            logits = (logits / softcap).tanh() * softcap
        logits = logits.masked_fill(~read, -torch.inf)
        total = logits.exp().sum(-1, keepdim=True)
        if sinks is not None:
            total = total + sinks.exp()[None, :, None, None]
        return torch.einsum("bhqn,bhnd->bqhd", logits.exp() / total, value).contiguous(), None

    AttentionInterface.register("residents", attention)
    AttentionMaskInterface.register("residents", sdpa_mask)
    previous = model.config._attn_implementation
    model.set_attn_implementation("residents")
    try:
        return stepwise(model, text_BT, None, DynamicCache(config=model.config))[0]
    finally:
        model.set_attn_implementation(previous)
