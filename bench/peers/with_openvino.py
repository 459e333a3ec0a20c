"""The worker for OpenVINO GenAI, in its own environment."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai

from bench.protocol import Job, serve

FIRST, RECENT = 32, 128
"""Tokens at both ends that are never evicted (OpenVINO's blocks have 32 tokens)."""
_PREFILL_CHUNK = 1024
_ENDLESS = 1 << 30


def exported(folder: Path) -> Path:
    """Return the folder of the model in OpenVINO's format, exported by optimum if it is missing."""
    target = folder.with_name(f"{folder.name}-openvino")
    if not target.exists():
        from optimum.exporters.openvino import main_export

        with tempfile.TemporaryDirectory(dir=folder.parent) as unfinished:
            made = Path(unfinished) / "model"
            main_export(
                str(folder),
                made,
                task="text-generation-with-past",
                library_name="transformers",
                convert_tokenizer=False,
            )
            made.rename(target)
    return target


class _Pipeline:
    """A pipeline with one request per row; the context is read as a prompt, because it cannot be filled otherwise."""

    def __init__(self, job: Job) -> None:
        _, precision, *eviction = job.system.split()
        self._pipeline = genai.ContinuousBatchingPipeline(
            str(exported(Path(job.folder))),
            _scheduler(job, evicts=bool(eviction)),
            "CPU",
            {
                "INFERENCE_NUM_THREADS": 1,
                # Otherwise weights and activations are rounded wherever the processor is faster with less.
                "INFERENCE_PRECISION_HINT": "f32",
                "KV_CACHE_PRECISION": precision,
            },
        )
        generator = np.random.default_rng(0)
        self._handles = []
        for row in range(job.rows):
            ids = ov.Tensor(generator.integers(0, 1000, (1, job.context)))
            self._handles.append(self._pipeline.add_request(row, ids, _endless()))
        waiting = list(self._handles)
        while waiting:
            self._pipeline.step()
            waiting = [handle for handle in waiting if not handle.can_read()]

    def decode(self, steps: int) -> None:
        for _ in range(steps):
            self._pipeline.step()
        for handle in self._handles:
            handle.read()

    def facts(self) -> dict[str, Any]:
        metrics = self._pipeline.get_metrics()
        # Blocks in use: the pool may be larger, which is the allocator's choice.
        used = metrics.kv_cache_size_in_bytes * metrics.cache_usage / 100
        return {"kv_bytes": round(used), "metadata_bytes": 0, "fast_forwarded": False}


def _scheduler(job: Job, *, evicts: bool) -> Any:
    scheduler = genai.SchedulerConfig()
    scheduler.max_num_seqs = job.rows
    scheduler.max_num_batched_tokens = _PREFILL_CHUNK
    if evicts:
        scheduler.use_cache_eviction = True
        scheduler.cache_eviction_config = genai.CacheEvictionConfig(
            FIRST, RECENT, job.budget, genai.AggregationMode.NORM_SUM
        )
    return scheduler


def _endless() -> Any:
    config = genai.GenerationConfig()
    config.max_new_tokens = _ENDLESS
    config.do_sample = False
    config.ignore_eos = True
    # The model has no end token, but the pipeline requires one.
    config.set_eos_token_id(0)
    config.stop_token_ids = {0}
    return config


class OpenvinoHost:
    """Pipelines, each with a model of its own."""

    packages: tuple[str, ...] = ("openvino", "openvino-genai", "optimum-intel", "torch", "transformers")

    def open(self, job: Job) -> _Pipeline:
        """Prepare a pipeline."""
        return _Pipeline(job)


if __name__ == "__main__":
    serve(OpenvinoHost())
