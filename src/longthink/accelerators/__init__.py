"""Kernels made for single policies, above the cache: looked up by the *exact* class of a policy.

A policy that is not in the table (`longthink.accelerators.table`), such as a subclass or a wrapper of one that is,
takes the general route. So does every policy where there is no GPU with Triton; nothing here is imported then.
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
    """Whether fused steps run where the tensor is, on what it holds."""
    return kernels.runs_triton(tensor)


def fused_steps(device: torch.device) -> Mapping[type[Policy], type[FusedStep]]:
    """Decode steps by exact class of policy, for caches on a device."""
    if not available(torch.empty(0, device=device)):
        return {}
    from longthink.accelerators.table import FUSED

    return FUSED


def group_layers(layers: list[LayerCache]) -> list[LayerGroup]:
    """Put the layers that one kernel can evict for together: see `LayerGroup`."""
    if not any(layer.is_fused for layer in layers):
        return []
    from longthink.accelerators.groups import group_layers

    return group_layers(layers)
