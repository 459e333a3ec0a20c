"""`Rotation`: how the queries and keys of a layer carry their positions (RoPE), and queries without them.

Shape suffixes: B batch rows, H query heads, Q query tokens, F frequency pairs, D head dim, or its half
where pairs are counted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from longthink.kernels.reference import wide_dtype


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


def query_sums(query_BHQD: Tensor, position_BQ: Tensor, rotation: Rotation) -> Tensor:
    """Sums over the queries as they were before RoPE, by frequency pair: BH3F, float32 or wider.

    A pair of features is a complex number; the three sums are those of its real part, its imaginary part and its
    magnitude. Queries at negative positions are padding.
    """
    wide = wide_dtype(query_BHQD.dtype)
    real, imaginary = rotation.paired(query_BHQD).to(wide).chunk(2, -1)
    angle_B1QF = (position_BQ.double()[..., None] * rotation.inv_freq_D.double())[:, None]
    cos, sin = angle_B1QF.cos().to(wide), angle_B1QF.sin().to(wide)
    parts = real * cos + imaginary * sin, imaginary * cos - real * sin, torch.hypot(real, imaginary)
    token_B1Q1 = (position_BQ >= 0)[:, None, :, None]
    return torch.stack([torch.where(token_B1Q1, part, 0).sum(2) for part in parts], 2)
