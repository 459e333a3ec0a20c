"""A worker that serves as fast as its system's name says, and has room for more the smaller its cache."""

import time

from longthink.lab.bench.peers.protocol import Point, serve

MS = {"dense": 6, "raas": 2}
ROOM = {"dense": 2, "raas": 12}


class Subject:
    def __init__(self, point: Point) -> None:
        self._point = point

    def decode(self, steps: int) -> None:
        end = time.process_time() + MS[self._point.system] / 1000
        while time.process_time() < end:
            pass

    def facts(self) -> dict:
        room = ROOM[self._point.system]
        if self._point.way == "full pool":
            return {"running": room}
        assert self._point.way == "in flight"
        return {"in_flight": room, "waiting": self._point.rows - room, "preempted": 0}


class Host:
    packages = ("pytest",)

    def open(self, point: Point) -> Subject:
        return Subject(point)


if __name__ == "__main__":
    serve(Host())
