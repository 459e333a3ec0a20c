"""Slow list-based reference implementations of every policy, and tests that compare the library with them."""
