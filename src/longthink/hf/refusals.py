"""What transformers or a user may ask of a cache that a bounded one cannot do."""

from __future__ import annotations

from typing import Any

from transformers.cache_utils import Cache

from longthink.config import brief_repr
from longthink.errors import UnsupportedFeatureError

REFUSED = {
    "assistant_model": "assisted decoding removes tokens again",
    "prompt_lookup_num_tokens": "assisted decoding removes tokens again",
    "assistant_early_exit": "assisted decoding removes tokens again",
    "use_mtp": "assisted decoding removes tokens again",
    "penalty_alpha": "contrastive search removes tokens again",
    "dola_layers": "DoLa decoding is not supported",
    "custom_generate": "custom decoding loops are not supported",
    "cache_implementation": (
        "longthink is the cache; pass cache_implementation=None (it may come from model.generation_config)"
    ),
    "guidance_scale": "it decodes a second text with an unbounded cache",
    "output_attentions": "attention weights of evicted tokens do not exist; see cache.resident_positions",
}
"""Options of `model.generate` that do not work with a bounded cache; None and False leave them off."""


def refusal(option: str, value: Any) -> UnsupportedFeatureError:
    """The error for one of `REFUSED`."""
    return UnsupportedFeatureError(
        f"{option}={brief_repr(value)} cannot be used with a bounded cache: {REFUSED[option]}"
    )


class Refusals(Cache):
    """The part of a `PagedCache` that refuses, and says what to do instead."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Raise: the contents are of use to this model only."""
        raise UnsupportedFeatureError(
            "a longthink cache belongs to a model in this process and cannot be pickled: copy it with copy.deepcopy, "
            "or write it to a file with cache.save(path) and read it with longthink.load_cache(model, path)"
        )

    def crop(self, tokens_to_remove: int) -> None:
        """Raise: evicted tokens cannot be restored."""
        if tokens_to_remove:
            raise UnsupportedFeatureError(
                f"a bounded cache cannot be cropped by {tokens_to_remove} tokens: evicted tokens cannot be restored"
            )

    def activate_past_recording(self) -> None:
        """Raise: assisted decoding, which calls this, removes tokens again."""
        raise UnsupportedFeatureError(
            "assisted decoding removes tokens again, and evicted tokens cannot be restored: generate without "
            "assistant model and prompt lookup, or use transformers' own cache"
        )

    @property
    def max_cache_len(self) -> int:
        """Raise: PEFT's prefix tuning, which asks for this, fills the cache with vectors that belong to no token."""
        raise UnsupportedFeatureError(
            "prefix tuning fills a cache with vectors that belong to no token, which a policy cannot count: use "
            "transformers' own cache"
        )
