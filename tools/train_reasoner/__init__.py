"""How the weights of the built-in model were made; run from the repository's root."""
