"""What the bound is worth, on vLLM's own ``/metrics``: pages held now, pages evicted and bytes not held so far.

The number of pages that a request holds follows from its length alone, so the front end can count without asking an
engine. vLLM tells it lengths when a request is complete: the counters move then. Requests that the client gave up are
not counted, and neither are they in vLLM's own counters.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from prometheus_client import Counter, Gauge
from vllm.config import VllmConfig
from vllm.v1.metrics import loggers
from vllm.v1.metrics.loggers import PrometheusStatLogger

from longthink.config import Budget
from longthink.vllm.checks import options_of

_LABELS = ("model_name", "engine")


def register_metrics() -> None:
    """Have ours kept with vLLM's own, where those are kept at all. May be called again."""
    # vLLM's entry point for loggers would turn statistics on for everybody, also where nobody asks for longthink.
    loggers.PrometheusStatLogger = BoundedCacheLogger


class BoundedCacheLogger(PrometheusStatLogger):
    """Keeps vLLM's own metrics and the ``longthink:`` ones; without longthink options there are none of those."""

    def __init__(self, vllm_config: VllmConfig, engine_indexes: list[int] | None = None) -> None:
        super().__init__(vllm_config, engine_indexes)
        self._vllm = vllm_config
        self._options = options_of(vllm_config)
        if self._options is not None:
            self._page_bytes = page_bytes(vllm_config)
            for engine in self.engine_indexes:
                for metric in (*_gauges(), *_counters()):
                    metric.labels(*self._labels(engine))

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
        **more: Any,
    ) -> None:
        """Take in one step of an engine."""
        super().record(scheduler_stats, iteration_stats, mm_cache_stats, engine_idx, **more)
        if self._options is None:
            return
        labels = self._labels(engine_idx)
        if scheduler_stats is not None:
            pool, resident = _gauges()
            # vLLM adds up the blocks of all engines. One of each is a placeholder that no request ever holds.
            pages = (self._vllm.cache_config.num_gpu_blocks or 1) // len(self.engine_indexes) - 1
            pool.labels(*labels).set(pages)
            resident.labels(*labels).set(round(scheduler_stats.kv_cache_usage * pages))
        if iteration_stats is not None:
            for request in iteration_stats.finished_requests:
                self._count(request, labels)

    def _count(self, request: Any, labels: tuple[str, str]) -> None:
        assert self._options is not None
        page_size = self._vllm.cache_config.block_size
        evicted = evicted_pages(
            self._options.budget, page_size, request.num_prompt_tokens, request.num_generation_tokens
        )
        if evicted:
            for metric, amount in zip(_counters(), (1, evicted, evicted * self._page_bytes), strict=True):
                metric.labels(*labels).inc(amount)

    def _labels(self, engine: int) -> tuple[str, str]:
        return str(self._vllm.model_config.served_model_name), str(engine)


def evicted_pages(budget: Budget, page_size: int, prompt: int, generated: int) -> int:
    """Pages that gave way in each layer by the end of a request, whose last token is sampled and never stored."""
    stored = prompt + generated - 1
    return max(0, -(-stored // page_size) - budget.pages(prompt, page_size))


def page_bytes(config: VllmConfig) -> int:
    """Bytes of the keys and values of one page in all layers, on all devices."""
    model = config.model_config
    head_bytes = model.get_head_size() * model.dtype.itemsize
    heads = model.get_total_num_kv_heads() * model.get_total_num_hidden_layers()
    return 2 * config.cache_config.block_size * heads * head_bytes


@cache
def _gauges() -> tuple[Gauge, Gauge]:
    return (
        Gauge(
            "longthink:pool_pages",
            "Pages of the pool that requests and the prefix cache share.",
            _LABELS,
            multiprocess_mode="mostrecent",
        ),
        Gauge(
            "longthink:resident_pages",
            "Pages that requests hold now; a page is a block of tokens in every layer.",
            _LABELS,
            multiprocess_mode="mostrecent",
        ),
    )


@cache
def _counters() -> tuple[Counter, Counter, Counter]:
    return (
        Counter(
            "longthink:bounded_requests",
            "Complete requests that outgrew their budget.",
            _LABELS,
        ),
        Counter(
            "longthink:evicted_pages",
            "Pages overwritten by complete requests, counted once for all layers.",
            _LABELS,
        ),
        Counter(
            "longthink:saved_bytes",
            "Bytes of keys and values that a dense cache would have held beside, at the end of complete requests.",
            _LABELS,
        ),
    )
