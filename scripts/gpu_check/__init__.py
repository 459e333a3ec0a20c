"""What `make gpu-check` runs: tests on a GPU, then measurements, in parts that fail and time out alone."""
