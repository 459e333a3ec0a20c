"""Metrics on vLLM's ``/metrics``: pages held now, pages evicted, and bytes saved.

The pages of a request follow from its lengths, which vLLM reports when it finishes: only then do the counters move.
Like vLLM's own, they leave out requests that the client aborted.
"""

from functools import cache
from typing import Any

from prometheus_client import Counter, Gauge
from vllm.config import VllmConfig
from vllm.v1.metrics import loggers
from vllm.v1.metrics.loggers import PrometheusStatLogger

from longthink.config import Budget
from longthink.vllm.checks import get_options

_LABELS = ("model_name", "engine")


def register_metrics() -> None:
    """Replace vLLM's Prometheus logger in this process, where longthink is enabled. Idempotent.

    vLLM's entry point for stat loggers (``vllm.stat_logger_plugins``) cannot be used: a logger found there turns
    statistics on for every user of vLLM, even with ``--disable-log-stats``.
    """
    loggers.PrometheusStatLogger = BoundedCacheLogger


class BoundedCacheLogger(PrometheusStatLogger):
    """vLLM's Prometheus logger, with the ``longthink:`` metrics for configurations that enable longthink."""

    def __init__(self, vllm_config: VllmConfig, engine_indexes: list[int] | None = None) -> None:
        super().__init__(vllm_config, engine_indexes)
        self._vllm = vllm_config
        self._options = get_options(vllm_config)
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
        super().record(scheduler_stats, iteration_stats, mm_cache_stats, engine_idx, **more)
        if self._options is None:
            return
        labels = self._labels(engine_idx)
        if scheduler_stats is not None:
            pool, resident = _gauges()
            # `num_gpu_blocks` is the sum over engines; one block of each is the null block.
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
    """Pages that a finished request has evicted in each layer. Its last token was sampled but never stored."""
    stored = prompt + generated - 1
    return max(0, -(-stored // page_size) - budget.pages(prompt, page_size))


def page_bytes(config: VllmConfig) -> int:
    """Bytes of the keys and values of one page in all layers, over all devices."""
    model = config.model_config
    heads = model.get_total_num_kv_heads() * model.get_total_num_hidden_layers()
    return 2 * config.cache_config.block_size * heads * model.get_head_size() * model.dtype.itemsize


@cache
def _gauges() -> tuple[Gauge, Gauge]:
    pool = "Pages of the pool, which requests and the prefix cache share."
    resident = "Pages that requests hold now. A page is one block of tokens in every layer."
    return (
        Gauge("longthink:pool_pages", pool, _LABELS, multiprocess_mode="mostrecent"),
        Gauge("longthink:resident_pages", resident, _LABELS, multiprocess_mode="mostrecent"),
    )


@cache
def _counters() -> tuple[Counter, Counter, Counter]:
    requests = "Finished requests that exceeded their budget."
    evicted = "Pages overwritten by finished requests, counted once for all layers."
    saved = "Bytes of keys and values that finished requests would have held in addition with a dense cache."
    return (
        Counter("longthink:bounded_requests", requests, _LABELS),
        Counter("longthink:evicted_pages", evicted, _LABELS),
        Counter("longthink:saved_bytes", saved, _LABELS),
    )
