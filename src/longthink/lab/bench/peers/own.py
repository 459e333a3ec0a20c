"""The worker of our own environment: the caches of longthink and of transformers, and the floor below all of them.

Shape suffixes: B batch rows, N tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from typing_extensions import override

from longthink.config import Budget
from longthink.hf import generate
from longthink.lab.bench.peers.plan import FLOOR, NARROW, TRANSFORMERS
from longthink.lab.bench.peers.protocol import Point, serve
from longthink.lab.bench.plan import Plan
from longthink.lab.bench.systems import PagedSystem, System, make_systems
from longthink.policies import make_policy

_ROW_BYTES = 1 << 14


class _Cache:
    """A cache around the model, decoding."""

    def __init__(self, system: System, point: Point) -> None:
        self._system = system
        system.go_to(point.context - point.prompt, fast=True)
        # What is compiled is compiled at the first step.
        system.decode(1)

    def decode(self, steps: int) -> None:
        self._system.decode(steps)

    def facts(self) -> dict[str, Any]:
        return {
            "kv_bytes": self._system.kv_bytes,
            "metadata_bytes": self._system.metadata_bytes,
            "fast_forwarded": True,
        }


class GenerateSystem(PagedSystem):
    """A policy behind `longthink.generate`: each call goes on from the cache of the call before."""

    @override
    def decode(self, steps: int) -> None:
        seen_BN = self.prompt_BN.new_zeros(len(self.prompt_BN), self.prompt_BN.shape[1] + self.decoded)
        ids_BN = torch.cat([seen_BN, self._token_B1], 1)
        out_BN = generate(
            self.model,
            ids_BN,
            policy=self.policy,
            past_key_values=self.cache,
            max_new_tokens=steps,
            do_sample=False,
            compile=self.compiled,
        )
        self._token_B1 = out_BN[:, -1:]
        self.decoded += steps


class _Floor:
    """Reads what a step cannot but read, the weights once and the keys and values of the budget, in one large mv."""

    def __init__(self, model: PreTrainedModel, point: Point) -> None:
        config = model.config.get_text_config(decoder=True)
        per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
        self._kv_bytes = point.budget * point.rows * per_token
        # One row of the embedding is read, not all.
        embedding = model.get_input_embeddings().weight
        weights = sum(weight.nbytes for weight in model.parameters() if weight is not embedding)
        rows = (weights + self._kv_bytes) // _ROW_BYTES
        self._matrix = torch.rand(rows, _ROW_BYTES // 4)
        self._vector = torch.rand(_ROW_BYTES // 4)
        self.decode(1)

    def decode(self, steps: int) -> None:
        for _ in range(steps):
            torch.mv(self._matrix, self._vector)

    def facts(self) -> dict[str, Any]:
        return {
            "kv_bytes": self._kv_bytes,
            "metadata_bytes": 0,
            "fast_forwarded": False,
            "read_bytes": self._matrix.nbytes,
        }


class OwnHost:
    """Opens what runs in our own environment; points share the model of their folder."""

    packages: tuple[str, ...] = ("longthink", "torch", "transformers")

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self._models: dict[str, PreTrainedModel] = {}

    def open(self, point: Point) -> _Cache | _Floor:
        """Bring a system to a point."""
        if point.folder not in self._models:
            loaded = AutoModelForCausalLM.from_pretrained(
                point.folder, dtype=torch.float32, use_safetensors=True, local_files_only=True
            )
            self._models[point.folder] = loaded.eval()
        model = self._models[point.folder]
        if point.system == FLOOR:
            return _Floor(model, point)
        return _Cache(_system(model, point), point)


def _system(model: PreTrainedModel, point: Point) -> System:
    baseline = TRANSFORMERS.get(point.system)
    plan = Plan(
        policies=() if baseline else (point.system,),
        baselines=(baseline,) if baseline else (),
        budget=Budget(budget=point.budget),
        lengths=(point.context - point.prompt,),
        prompt=point.prompt,
        rows=point.rows,
        fast_forward=True,
        compile=not baseline,
        kv_dtype=NARROW if point.way == NARROW else None,
    )
    # Of ours the compiled one, which comes last.
    *_, system = make_systems(model, plan, room=point.steps)
    if point.way == "generate":
        return GenerateSystem(model, system.prompt_BN, make_policy(point.system), plan.budget, compiled=True)
    return system


if __name__ == "__main__":
    serve(OwnHost())
