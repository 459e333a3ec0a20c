"""Calibration: statistics of a model's queries before RoPE over texts, as a cache collects them of a prompt.

Shape suffixes: H query heads, F frequency pairs.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from longthink.config import Budget
from longthink.errors import StatsFileError, UnsupportedModelError
from longthink.hf.cache import PagedCache
from longthink.hf.placement import device_of
from longthink.policies import TriAttention


def calibrate(model: PreTrainedModel, texts: Iterable[Tensor]) -> tuple[list[Tensor], int]:
    """Means over the queries of texts, each with equal weight per token.

    Parameters
    ----------
    texts
        Token ids, each of shape (1, tokens).

    Returns
    -------
    list of Tensor
        For each layer, the means of real part, imaginary part and magnitude of each frequency pair, H3F in float32.
    int
        Number of tokens.

    Raises
    ------
    UnsupportedModelError
        If RoPE does not rotate all features of the keys, or not all layers have full attention.
    StatsFileError
        If there are no tokens.
    """
    sums: list[Tensor] = []
    total = 0
    with PagedCache(model, TriAttention(), Budget(decode_budget=1)) as cache, torch.no_grad():
        if cache.natives:
            raise UnsupportedModelError(
                f"{type(model).__name__} has layers without full attention, for which there are no statistics: "
                "choose a policy that needs no calibration"
            )
        for ids in texts:
            cache.reset()
            model(ids.to(device_of(model)), past_key_values=cache, logits_to_keep=1)
            count = ids.shape[1]
            found = [layer.slots.store.table.query_stats_BH3F[0].double() * count for layer in cache.paged]
            sums = [old + new for old, new in zip(sums, found, strict=True)] if sums else found
            total += count
    if not total:
        raise StatsFileError("there is no text to calibrate on: expected at least one token")
    return [(layer / total).float().cpu() for layer in sums], total
