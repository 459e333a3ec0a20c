"""Our caches beside those of other libraries, on the same weights: each peer in an environment of its own."""
