"""Time and memory per token against decode length, measured."""
