"""Accuracy of policies on problem sets: tasks, grading and sweeps."""
