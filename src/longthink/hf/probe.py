"""`undisturbed`: run a model for a test and leave it as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


@contextmanager
def undisturbed(model: PreTrainedModel) -> Iterator[None]:
    """Run a model in evaluation mode and without gradients, and restore what running it may have changed.

    That is: which parts are in training mode, the state of the random generators, and the state of rotary embeddings
    whose frequencies depend on the length of the text.
    """
    parts = list(model.modules())
    training = [part for part in parts if part.training]
    rotary = [_State(part) for part in parts if _has_length_dependent_rope(part)]
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    try:
        for part in training:
            part.training = False
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            yield
    finally:
        for part in training:
            part.training = True
        for state in rotary:
            state.restore()


def _has_length_dependent_rope(part: nn.Module) -> bool:
    kind = getattr(part, "rope_type", "default")
    return hasattr(part, "inv_freq") and kind != "default"


class _State:
    """Buffers and attributes of a module."""

    def __init__(self, part: nn.Module) -> None:
        self._part = part
        self._buffers = {name: (buffer, _copy(buffer)) for name, buffer in part._buffers.items()}
        self._attributes = dict(vars(part))

    def restore(self) -> None:
        for name, (buffer, content) in self._buffers.items():
            self._part._buffers[name] = buffer
            if buffer is not None and content is not None and not torch.equal(buffer, content):
                buffer.copy_(content)
        vars(self._part).update(self._attributes)


def _copy(buffer: Tensor | None) -> Tensor | None:
    return None if buffer is None else buffer.detach().clone()
