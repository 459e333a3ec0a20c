"""The worker for OpenVINO GenAI, in its own environment."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai

from longthink.lab.bench.peers.plan import OPENVINO
from longthink.lab.bench.peers.protocol import Point, serve

FIRST, RECENT = 32, 128
"""Tokens at both ends that eviction spares (OpenVINO's blocks have 32 tokens)."""
_PREFILL_AT_ONCE = 1024
_MUCH = 1 << 30


def exported(folder: Path) -> Path:
    """Return the folder of the model in OpenVINO's format, made with optimum if it is not there."""
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
    """A pipeline with a request for each row; the context is read as a prompt, for it cannot be made up."""

    def __init__(self, point: Point) -> None:
        precision, self._evicts = OPENVINO[point.system]
        self._pipeline = genai.ContinuousBatchingPipeline(
            str(exported(Path(point.folder))),
            self._scheduler(point),
            "CPU",
            {
                "INFERENCE_NUM_THREADS": 1,
                # Otherwise weights and activations are rounded where the processor is faster with less.
                "INFERENCE_PRECISION_HINT": "f32",
                "KV_CACHE_PRECISION": precision,
            },
        )
        drawn = np.random.default_rng(0)
        self._handles = []
        for row in range(point.rows):
            ids = ov.Tensor(drawn.integers(0, 1000, (1, point.context)))
            self._handles.append(self._pipeline.add_request(row, ids, _endless()))
        waiting = list(self._handles)
        while waiting:
            self._pipeline.step()
            waiting = [handle for handle in waiting if not handle.can_read()]

    def _scheduler(self, point: Point) -> Any:
        scheduler = genai.SchedulerConfig()
        scheduler.max_num_seqs = point.rows
        scheduler.max_num_batched_tokens = _PREFILL_AT_ONCE
        if self._evicts:
            scheduler.use_cache_eviction = True
            scheduler.cache_eviction_config = genai.CacheEvictionConfig(
                FIRST, RECENT, point.budget, genai.AggregationMode.NORM_SUM
            )
        return scheduler

    def decode(self, steps: int) -> None:
        for _ in range(steps):
            self._pipeline.step()
        for handle in self._handles:
            handle.read()

    def facts(self) -> dict[str, Any]:
        metrics = self._pipeline.get_metrics()
        # The pool may be larger than what is held; that is another allocator's choice.
        used = metrics.kv_cache_size_in_bytes * metrics.cache_usage / 100
        return {"kv_bytes": round(used), "metadata_bytes": 0, "fast_forwarded": False}


def _endless() -> Any:
    config = genai.GenerationConfig()
    config.max_new_tokens = _MUCH
    config.do_sample = False
    config.ignore_eos = True
    # The model has no end token, and the pipeline insists on one.
    config.set_eos_token_id(0)
    config.stop_token_ids = {0}
    return config


class OpenvinoHost:
    """Opens pipelines; each has a model of its own."""

    packages: tuple[str, ...] = ("openvino", "openvino-genai", "optimum-intel", "torch", "transformers")

    def open(self, point: Point) -> _Pipeline:
        """Bring a pipeline to a point."""
        return _Pipeline(point)


if __name__ == "__main__":
    serve(OpenvinoHost())
