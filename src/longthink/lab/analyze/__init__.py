"""Analysis of attention: record what a model reads, classify the life of every token, replay policies on it."""
