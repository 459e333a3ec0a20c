"""The laboratory: evaluation, attention traces, benchmarks and reports, built on the cache and unknown to it."""
