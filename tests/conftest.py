"""What all tests share."""

import gc


def pytest_collection_finish():
    """Leave what was imported out of every garbage collection to come: it is most of the heap, and none goes."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    """Let libraries find at the end what they look for."""
    gc.unfreeze()
