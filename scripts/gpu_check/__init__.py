"""`make gpu-check`: tests on a GPU, then measurements, in parts that fail and time out independently."""
