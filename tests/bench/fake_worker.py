"""A worker whose systems do what their names say. The standard library is all it needs."""

import os
import sys
import time

from longthink.lab.bench.peers.protocol import Point, serve


class Subject:
    def __init__(self, point: Point) -> None:
        self._point, self._steps = point, 0

    def decode(self, steps: int) -> None:
        if self._point.system == "dies":
            print("the last words", file=sys.stderr, flush=True)
            os._exit(3)
        if self._point.system == "prints":
            print("this is no answer", flush=True)
        if self._point.system == "works":
            end = time.process_time() + 0.05
            while time.process_time() < end:
                pass
        if self._point.system == "sleeps":
            time.sleep(0.05)
        self._steps += steps

    def facts(self) -> dict:
        return {"kv_bytes": self._steps, "metadata_bytes": 0, "fast_forwarded": True}


class Host:
    packages = ("pytest",)

    def open(self, point: Point) -> Subject:
        if point.system == "refuses":
            raise ValueError("not this one")
        return Subject(point)


if __name__ == "__main__":
    serve(Host())
