"""`Rotation`: how the keys of a layer carry their positions (RoPE).

Shape suffixes: D head dim, or its half where pairs are counted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotation:
    """RoPE of one layer.

    Policies see keys in the half-split layout of Llama, where features i and i + D / 2 form a pair.

    Parameters
    ----------
    inv_freq_D
        Rotation of each of the D / 2 pairs, radians per position: negative where a model rotates backwards, 0 where
        it does not rotate.
    order_D
        Feature of the model that stands at each place of the half-split layout; None if they are the same.
    """

    inv_freq_D: Tensor
    order_D: Tensor | None = None

    def to(self, device: torch.device) -> Rotation:
        order = None if self.order_D is None else self.order_D.to(device)
        return Rotation(self.inv_freq_D.to(device), order)

    def paired(self, keys: Tensor) -> Tensor:
        """Keys of the model in half-split layout."""
        return keys if self.order_D is None else keys[..., self.order_D]

    def unpaired(self, keys: Tensor) -> Tensor:
        """Keys in half-split layout as the model has them."""
        return keys if self.order_D is None else keys[..., self.order_D.argsort()]
