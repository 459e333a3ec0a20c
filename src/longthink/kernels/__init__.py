"""The numerical work, behind one set of names.

`reference` is the definition, in plain torch, and runs on every device.
"""

from longthink.kernels.reference import (
    block_attention,
    bound_scores,
    column_mass,
    decode_attention,
    discriminant_scores,
    hash_priority,
    lowest,
    page_mass,
    rotate_keys,
    top_fraction,
    top_pages,
)

__all__ = [
    "block_attention",
    "bound_scores",
    "column_mass",
    "decode_attention",
    "discriminant_scores",
    "hash_priority",
    "lowest",
    "page_mass",
    "rotate_keys",
    "top_fraction",
    "top_pages",
]
