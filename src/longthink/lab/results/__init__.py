"""What runs have measured: the records, the store they go to, and the statistics on them."""
