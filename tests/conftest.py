"""What all tests share: the slow ones begin, and what was imported is no work for the garbage collector."""

import gc


def pytest_configure():
    gc.disable()  # most of what imports make stays


def pytest_collection_modifyitems(items):
    """Begin with slow tests, or a worker may be left alone with one in the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_collection_finish():
    """Leave what was imported out of every garbage collection to come: it is most of the heap, and none goes."""
    gc.enable()
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    """Let libraries find at the end what they look for."""
    gc.unfreeze()
