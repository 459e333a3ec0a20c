"""The worker for kvpress, in its own environment."""

from __future__ import annotations

from typing import Any

import torch
from kvpress import DecodingPress, KnormPress
from transformers import AutoModelForCausalLM, DynamicCache

from bench.protocol import Job, serve

INTERVAL = 16
"""Steps between two compressions: one of our pages, so that no more tokens are kept than we keep."""


class _Pressed:
    """A cache compressed to the budget every `INTERVAL` steps by the cheapest press, key norms.

    Its size does not depend on the length of the text, so only `budget` tokens are read, and positions start at the
    context.
    """

    def __init__(self, model: Any, job: Job) -> None:
        self._model, self._position = model, job.context
        self._cache = DynamicCache(config=model.config)
        self._press = DecodingPress(
            base_press=KnormPress(), compression_interval=INTERVAL, target_size=job.budget
        )
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(model.config.vocab_size, (job.rows, job.budget), generator=generator)
        with torch.no_grad():
            logits = model(ids, past_key_values=self._cache, logits_to_keep=1).logits
        self._token = logits[:, -1:].argmax(-1)

    @torch.no_grad()
    def decode(self, steps: int) -> None:
        with self._press(self._model):
            for _ in range(steps):
                at = torch.tensor([self._position])
                logits = self._model(
                    self._token,
                    past_key_values=self._cache,
                    position_ids=at.expand(len(self._token), 1),
                    cache_position=at,
                ).logits
                self._token = logits[:, -1:].argmax(-1)
                self._position += 1

    def facts(self) -> dict[str, Any]:
        layers = self._cache.layers
        kv_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
        return {"kv_bytes": kv_bytes, "metadata_bytes": 0, "fast_forwarded": True}


class KvpressHost:
    """Caches under a `DecodingPress`."""

    packages: tuple[str, ...] = ("kvpress", "torch", "transformers")

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self._models: dict[str, Any] = {}

    def open(self, job: Job) -> _Pressed:
        """Prepare a cache."""
        if job.folder not in self._models:
            loaded = AutoModelForCausalLM.from_pretrained(
                job.folder, dtype=torch.float32, use_safetensors=True, local_files_only=True
            )
            self._models[job.folder] = loaded.eval()
        return _Pressed(self._models[job.folder], job)


if __name__ == "__main__":
    serve(KvpressHost())
