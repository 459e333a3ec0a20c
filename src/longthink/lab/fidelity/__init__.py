"""Fidelity: how far the next-token distributions under a bounded cache are from those of a dense one."""
