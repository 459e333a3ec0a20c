"""The worker for kvpress, in its own environment."""

from __future__ import annotations

from typing import Any

import torch
from kvpress import DecodingPress, KnormPress
from transformers import AutoModelForCausalLM, DynamicCache

from longthink.lab.bench.peers.protocol import Point, serve

INTERVAL = 16
"""Steps between two compressions: a page of ours, so that no more is held than we hold."""


class _Pressed:
    """A cache that is pressed back to the budget every `INTERVAL` steps, by the cheapest press, that of key norms.

    What it holds does not depend on the text's length, so the budget is read as a prompt and the positions go on
    from the context.
    """

    def __init__(self, model: Any, point: Point) -> None:
        self._model, self._position = model, point.context
        self._cache = DynamicCache(config=model.config)
        self._press = DecodingPress(
            base_press=KnormPress(), compression_interval=INTERVAL, target_size=point.budget
        )
        drawn = torch.Generator().manual_seed(0)
        ids = torch.randint(model.config.vocab_size, (point.rows, point.budget), generator=drawn)
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
    """Opens caches under a `DecodingPress`."""

    packages: tuple[str, ...] = ("kvpress", "torch", "transformers")

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self._models: dict[str, Any] = {}

    def open(self, point: Point) -> _Pressed:
        """Bring a cache to a point."""
        if point.folder not in self._models:
            loaded = AutoModelForCausalLM.from_pretrained(
                point.folder, dtype=torch.float32, use_safetensors=True, local_files_only=True
            )
            self._models[point.folder] = loaded.eval()
        return _Pressed(self._models[point.folder], point)


if __name__ == "__main__":
    serve(KvpressHost())
