"""What all tests share: the slow ones begin, and what was imported is no work for the garbage collector."""

import atexit
import gc


def pytest_configure():
    gc.disable()  # most of what imports make stays


def pytest_collection_modifyitems(items):
    """Begin with slow tests, or a worker may be left alone with one in the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_collection_finish():
    """Leave what was imported out of every garbage collection to come: it is most of the heap, and none goes.

    Torch's compiler imports and makes as much again, so what is young is looked through less often as well.
    """
    gc.enable()
    gc.set_threshold(5_000, 20, 20)
    gc.collect()
    gc.freeze()
    # Behind the collections of pytest's own end, which would look through all of it again; then libraries find there
    # what they look for.
    atexit.register(gc.unfreeze)
