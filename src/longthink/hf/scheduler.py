"""`Scheduler`: the queue of requests and the thread that decodes them, step by step."""

from __future__ import annotations

import threading
from collections import deque

from longthink.errors import BudgetError, EngineError
from longthink.hf.batch import Batch
from longthink.hf.request import Finished, Job

_LONG_STEP_S = 0.5
"""Seconds that a step may hold up the cancellation of a request."""


class Scheduler:
    """Waiting and running requests.

    A step admits waiting requests to free seats and decodes one token for each running one. Steps are taken by the
    thread that `add` starts, or by a caller; one at a time.

    An error during prefill ends that request only. An error in a decode step ends all running requests, because
    their cache is unusable; waiting requests carry on.
    """

    def __init__(self, batch: Batch) -> None:
        self.closed = False
        self._batch = batch
        self._step_lock = threading.Lock()
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._cancelled: deque[Job] = deque()
        self._thread: threading.Thread | None = None
        self._timer: threading.Timer | None = None

    # From any thread ----------------------------------------------------------------------------------------

    def add(self, job: Job, *, in_thread: bool) -> None:
        """Queue a job, or raise `EngineError` if closed; with `in_thread` the scheduler's own thread decodes it."""
        with self._changed:
            if self.closed:
                raise EngineError("the engine is closed")
            self._waiting.append(job)
            if in_thread and self._thread is None:
                self._thread = threading.Thread(target=self._run, name="longthink-engine", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def cancel(self, job: Job) -> None:
        """End a job before the next step, or soon if the step under way takes long, unless it is done."""
        with self._changed:
            self._cancelled.append(job)
            if self._thread is not None and self._timer is None:
                self._timer = threading.Timer(_LONG_STEP_S, self._end_cancelled)
                self._timer.daemon = True
                self._timer.start()
            self._changed.notify_all()

    def _end_cancelled(self) -> None:
        """End cancelled jobs that a step holds up, such as one that compiles; their rows leave with the next step."""
        with self._changed:
            self._timer = None
            jobs = list(self._cancelled)
        for job in jobs:
            if job in self._running:
                job.end(self._batch.result(job, "cancelled", in_step=True))
            else:
                job.end(_not_started(job, "cancelled"))

    def close(self) -> None:
        """Wait for the current step, then cancel all jobs and free all seats."""
        with self._changed:
            self.closed = True
            thread = self._thread
            self._changed.notify_all()
        if thread is threading.current_thread():
            # The garbage collector called this in the middle of a step; the thread ends after it.
            return
        if thread is not None:
            thread.join()
        with self._step_lock:
            self._end_all(None)

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            while self._wait_for_work():
                self.step()
        except BaseException as caught:
            error = caught
        finally:
            with self._changed:
                self.closed = True
            with self._step_lock:
                self._end_all(error)

    def _wait_for_work(self) -> bool:
        """Wait until there is work; False once closed."""
        with self._changed:
            self._changed.wait_for(lambda: self.closed or self._waiting or self._running or self._cancelled)
            return not self.closed

    # A step -------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """Drop cancelled jobs, fill free seats, and decode one token for each running job."""
        with self._step_lock:
            try:
                self._drop_cancelled()
                while self._batch.occupied < self._batch.seats and self._waiting:
                    self._start(self._waiting.popleft())
                if self._running:
                    self._batch.step()
                    self._collect()
                if not self._waiting:
                    self._batch.free_idle()
            except BaseException as error:
                self._fail(self._running, error)
                if not isinstance(error, Exception):
                    raise

    def drop_cancelled(self) -> None:
        """Drop cancelled jobs without decoding; if a step is under way, the next one does it."""
        if self._step_lock.acquire(blocking=False):
            try:
                self._drop_cancelled()
                self._batch.free_idle()
            finally:
                self._step_lock.release()

    def _drop_cancelled(self) -> None:
        while self._cancelled:
            job = self._cancelled.popleft()
            if job in self._running:
                self._finish(job, "cancelled")
            with self._changed:
                if job in self._waiting:
                    self._waiting.remove(job)
                    job.end(_not_started(job, "cancelled"))

    def _start(self, job: Job) -> None:
        """Prefill a job, and give it a seat unless its first token is its last."""
        try:
            cache = self._batch.prefill(job)
        except BudgetError as error:
            job.end(_not_started(job, "no_room", str(error)))
            return
        except BaseException as error:
            job.end(None, error)
            if not isinstance(error, Exception):
                raise
            return
        finish = "cancelled" if job.done else job.finish_reason(self._batch.end_tokens)
        if finish is not None:
            with cache:
                job.end(self._batch.result(job, finish, cache))
            return
        self._running.append(job)
        self._batch.admit(job, cache)
        job.notify()

    def _collect(self) -> None:
        for job in list(self._running):
            if job.done:
                continue
            finish = job.finish_reason(self._batch.end_tokens)
            if finish is None:
                job.notify()
            else:
                self._finish(job, finish)

    def _finish(self, job: Job, finish: str) -> None:
        finished = self._batch.result(job, finish)
        self._batch.release(job)
        self._running.remove(job)
        job.end(finished)

    def _fail(self, jobs: list[Job] | deque[Job], error: BaseException) -> None:
        self._batch.clear()
        while jobs:
            jobs.pop().end(None, error)

    def _end_all(self, error: BaseException | None) -> None:
        if error is None:
            self._cancelled.extend([*self._waiting, *self._running])
            self._drop_cancelled()
        error = error or EngineError("the engine is closed")
        self._fail(self._running, error)
        self._fail(self._waiting, error)


def _not_started(job: Job, finish: str, note: str | None = None) -> Finished:
    return Finished(request=job.request, tokens=(), finish=finish, note=note)
