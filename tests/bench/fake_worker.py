"""A worker whose systems do what their names say. The standard library is all it needs."""

import os
import sys
import time

from bench.protocol import Job, serve


class Decoder:
    def __init__(self, job: Job) -> None:
        self._job, self._steps = job, 0

    def decode(self, steps: int) -> None:
        if self._job.system == "dies":
            print("the last words", file=sys.stderr, flush=True)
            os._exit(3)
        if self._job.system == "prints":
            print("this is no answer", flush=True)
        if self._job.system == "works":
            end = time.process_time() + 0.05
            while time.process_time() < end:
                pass
        if self._job.system == "sleeps":
            time.sleep(0.05)
        self._steps += steps

    def facts(self) -> dict:
        return {"kv_bytes": self._steps, "metadata_bytes": 0, "fast_forwarded": True}


class Host:
    packages = ("pytest",)

    def open(self, job: Job) -> Decoder:
        if job.system == "refuses":
            raise ValueError("not this one")
        return Decoder(job)


if __name__ == "__main__":
    serve(Host())
