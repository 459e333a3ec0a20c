"""Fused decode steps for individual policies, looked up by the *exact* class of a policy.

Policies outside the table (`longthink.accelerators.table`), subclasses and wrappers included, take the general route.
So does every policy without a GPU and Triton; then no other module here is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from longthink import kernels
from longthink.cache import FusedStep, LayerCache
from longthink.policies import Policy

if TYPE_CHECKING:
    from longthink.accelerators.groups import LayerGroup


def available(tensor: torch.Tensor) -> bool:
    """Whether fused steps support the tensor's device and dtype."""
    return kernels.runs_triton(tensor)


def fused_steps(device: torch.device) -> Mapping[type[Policy], type[FusedStep]]:
    """Fused decode steps by exact policy class, for caches on a device."""
    if not available(torch.empty(0, device=device)):
        return {}
    from longthink.accelerators.table import FUSED

    return FUSED


def group_layers(layers: list[LayerCache]) -> list[LayerGroup]:
    if not any(layer.is_fused for layer in layers):
        return []
    from longthink.accelerators.groups import group_layers

    return group_layers(layers)
