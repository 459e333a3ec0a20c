"""Our caches beside those of others, on the same weights: each peer in an environment and a process of its own."""
