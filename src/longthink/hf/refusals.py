"""What transformers or a user may ask of a cache that a bounded one cannot do."""

from __future__ import annotations

from typing import Any

from transformers.cache_utils import Cache

from longthink.errors import UnsupportedFeatureError


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
