"""The worker of our own environment: the caches of longthink and of transformers, and the byte floor.

Shape suffixes: B batch rows, N tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from typing_extensions import override

from bench.peers.plan import FLOOR, NARROW, TRANSFORMERS
from bench.protocol import Job, serve
from longthink.config import Budget
from longthink.hf import generate
from longthink.lab.bench.plan import Plan
from longthink.lab.bench.systems import PagedSystem, System, make_systems
from longthink.policies import make_policy

_ROW_BYTES = 1 << 14


class _Cache:
    """A cache around the model."""

    def __init__(self, system: System, job: Job) -> None:
        self._system = system
        self.decode = system.decode
        system.go_to(job.context - job.prompt, fast=True)
        system.decode(1)  # compiles

    def facts(self) -> dict[str, Any]:
        system = self._system
        return {"kv_bytes": system.kv_bytes, "metadata_bytes": system.metadata_bytes, "fast_forwarded": True}


class GenerateSystem(PagedSystem):
    """A policy behind `longthink.generate`: each call continues with the cache of the call before."""

    @override
    def decode(self, steps: int) -> None:
        seen_BN = self.prompt_BN.new_zeros(len(self.prompt_BN), self.prompt_BN.shape[1] + self.decoded)
        out_BN = generate(
            self.model,
            torch.cat([seen_BN, self._token_B1], 1),
            policy=self.policy,
            past_key_values=self.cache,
            max_new_tokens=steps,
            do_sample=False,
            compile=self.compiled,
        )
        self._token_B1 = out_BN[:, -1:]
        self.decoded += steps


class _Floor:
    """Reads the bytes that every step must read, weights and the keys and values of the budget, in one large `mv`."""

    def __init__(self, model: PreTrainedModel, job: Job) -> None:
        config = model.config.get_text_config(decoder=True)
        per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
        self._kv_bytes = job.budget * job.rows * per_token
        # A step reads only one row of the embedding.
        embedding = model.get_input_embeddings().weight
        weights = sum(weight.nbytes for weight in model.parameters() if weight is not embedding)
        self._matrix = torch.rand((weights + self._kv_bytes) // _ROW_BYTES, _ROW_BYTES // 4)
        self._vector = torch.rand(_ROW_BYTES // 4)
        self.decode(1)

    def decode(self, steps: int) -> None:
        for _ in range(steps):
            torch.mv(self._matrix, self._vector)

    def facts(self) -> dict[str, Any]:
        read = self._matrix.nbytes
        return {"kv_bytes": self._kv_bytes, "metadata_bytes": 0, "fast_forwarded": False, "read_bytes": read}


class OwnHost:
    """Jobs on the same folder share the model."""

    packages: tuple[str, ...] = ("longthink", "torch", "transformers")

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self._models: dict[str, PreTrainedModel] = {}

    def open(self, job: Job) -> _Cache | _Floor:
        """Prepare a cache or the floor."""
        if job.folder not in self._models:
            loaded = AutoModelForCausalLM.from_pretrained(
                job.folder, dtype=torch.float32, use_safetensors=True, local_files_only=True
            )
            self._models[job.folder] = loaded.eval()
        model = self._models[job.folder]
        return _Floor(model, job) if job.system == FLOOR else _Cache(_system(model, job), job)


def _system(model: PreTrainedModel, job: Job) -> System:
    baseline = TRANSFORMERS.get(job.system)
    plan = Plan(
        policies=() if baseline else (job.system,),
        baselines=(baseline,) if baseline else (),
        budget=Budget(budget=job.budget),
        lengths=(job.context - job.prompt,),
        prompt=job.prompt,
        rows=job.rows,
        fast_forward=True,
        compile=not baseline,
        kv_dtype=NARROW if job.mode == NARROW else None,
    )
    # The compiled system of a policy comes last.
    *_, system = make_systems(model, plan, room=job.steps)
    if job.mode == "generate":
        return GenerateSystem(model, system.prompt_BN, make_policy(job.system), plan.budget, compiled=True)
    return system


if __name__ == "__main__":
    serve(OwnHost())
