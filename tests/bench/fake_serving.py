"""A worker that serves as fast as its system's name says, and has room for more the smaller its cache."""

import time

from bench.protocol import Job, serve

MS = {"dense": 6, "raas": 2}
ROOM = {"dense": 2, "raas": 12}


class Decoder:
    def __init__(self, job: Job) -> None:
        self._job = job

    def decode(self, steps: int) -> None:
        end = time.process_time() + MS[self._job.system] / 1000
        while time.process_time() < end:
            pass

    def facts(self) -> dict:
        room = ROOM[self._job.system]
        if self._job.mode == "full pool":
            return {"running": room}
        assert self._job.mode == "in flight"
        return {"in_flight": room, "waiting": self._job.rows - room, "preempted": 0}


class Host:
    packages = ("pytest",)

    def open(self, job: Job) -> Decoder:
        return Decoder(job)


if __name__ == "__main__":
    serve(Host())
