"""Where a model computes, if accelerate has spread its weights over devices, main memory or disk."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

HOOK = "_hf_hook"
"""Attribute of modules whose weights and inputs accelerate moves around each call."""


def device_of(model: PreTrainedModel) -> torch.device:
    """Device on which the model takes its tokens; its own weights may lie on the meta device between passes."""
    if model.device.type != "meta":
        return model.device
    for module in model.modules():
        hook = getattr(module, HOOK, None)
        for one in getattr(hook, "hooks", [hook]):
            place = getattr(one, "execution_device", None)
            if place is not None:
                return torch.empty(0, device=place).device  # accelerate writes cuda:1 as 1
    return model.device


def is_spread(model: PreTrainedModel) -> bool:
    """Whether accelerate moves weights or inputs of the model around each call."""
    return any(hasattr(module, HOOK) for module in model.modules())
