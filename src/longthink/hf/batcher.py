"""`Batcher`: requests on their way through the seats, turn by turn, in whichever thread takes the turn."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator

from longthink.errors import BudgetError, EngineError
from longthink.hf.request import Finished, Request
from longthink.hf.seats import Row, Seats


class Job:
    """A request, its tokens so far, and what became of it; any thread may wait for them."""

    def __init__(self, request: Request) -> None:
        self.row = Row(request)
        self.finished: Finished | None = None
        self.error: BaseException | None = None
        self._changed = threading.Condition()

    @property
    def done(self) -> bool:
        """Whether nothing more will come."""
        return self.finished is not None or self.error is not None

    def tell(self) -> None:
        """Wake those who wait for tokens."""
        with self._changed:
            self._changed.notify_all()

    def end(self, finished: Finished | None, error: BaseException | None = None) -> None:
        """Say what became of the request; only the first word counts."""
        with self._changed:
            if not self.done:
                self.finished, self.error = finished, error
            self._changed.notify_all()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is done, and say whether it is."""
        with self._changed:
            return self._changed.wait_for(lambda: self.done, timeout)

    def tokens(self) -> Iterator[int]:
        """Yield all tokens, each as soon as it is there."""
        given = 0
        while True:
            with self._changed:
                while not self.done and len(self.row.tokens) == given:
                    self._changed.wait()
                new, done = self.row.tokens[given:], self.done
            yield from new
            given += len(new)
            if done:
                return


class Batcher:
    """Requests that wait, and those that have a seat.

    A *turn* gives free seats to waiting requests and decodes one token for each row. Whoever has work takes turns:
    the thread that `add` starts, or a caller; there is one turn at a time.

    An error while a prompt is read is the error of its request. An error in a step is that of all rows in it, because
    their cache is then of no use; the requests that wait go on.
    """

    def __init__(self, seats: Seats) -> None:
        self.closed = False
        self._seats = seats
        self._turning = threading.Lock()
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._seated: list[Job] = []
        self._cancelled: deque[Job] = deque()
        self._thread: threading.Thread | None = None

    # From any thread ----------------------------------------------------------------------------------------

    def add(self, job: Job, *, in_thread: bool) -> None:
        """Let a job wait for a seat, with a thread that takes turns if wanted.

        Raises
        ------
        EngineError
            If it is closed.
        """
        with self._changed:
            if self.closed:
                raise EngineError("the engine is closed")
            self._waiting.append(job)
            if in_thread and self._thread is None:
                self._thread = threading.Thread(target=self._run, name="longthink-engine", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def cancel(self, job: Job) -> None:
        """End a job before the next turn, if it is not done."""
        with self._changed:
            self._cancelled.append(job)
            self._changed.notify_all()

    def close(self) -> None:
        """Cancel all jobs and free all seats, when the turn that is being taken is over."""
        with self._changed:
            self.closed = True
            thread = self._thread
            self._changed.notify_all()
        if thread is threading.current_thread():
            # Asked for by the garbage collector in the middle of a turn; the thread ends behind it.
            return
        if thread is not None:
            thread.join()
        with self._turning:
            self._end_all(None)

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            while self._has_work():
                self.turn()
        except BaseException as caught:
            error = caught
        finally:
            with self._changed:
                self.closed = True
            with self._turning:
                self._end_all(error)

    def _has_work(self) -> bool:
        """Wait until there is work; False if it is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self.closed or self._waiting or self._seated or self._cancelled)
            return not self.closed

    # A turn -------------------------------------------------------------------------------------------------

    def turn(self) -> None:
        """Drop what was cancelled, fill the seats, and decode one token for each."""
        with self._turning:
            try:
                self._sweep()
                while self._seats.taken < self._seats.count and self._waiting:
                    self._begin(self._waiting.popleft())
                if self._seated:
                    self._seats.step()
                    self._deliver()
                if not self._waiting:
                    self._seats.idle()
            except BaseException as error:
                self._fail(self._seated, error)
                if not isinstance(error, Exception):
                    raise

    def sweep(self) -> None:
        """Drop what was cancelled, without decoding; left to the next turn while one is being taken."""
        if self._turning.acquire(blocking=False):
            try:
                self._sweep()
                self._seats.idle()
            finally:
                self._turning.release()

    def _sweep(self) -> None:
        while self._cancelled:
            job = self._cancelled.popleft()
            if job in self._seated:
                self._leave(job, "cancelled")
            with self._changed:
                if job in self._waiting:
                    self._waiting.remove(job)
                    job.end(_unread(job, "cancelled"))

    def _begin(self, job: Job) -> None:
        """Read the prompt of a job, and give it a seat unless that was all."""
        row = job.row
        try:
            cache = self._seats.read(row)
        except BudgetError as error:
            job.end(_unread(job, "no_room", str(error)))
            return
        except BaseException as error:
            job.end(None, error)
            if not isinstance(error, Exception):
                raise
            return
        finish = row.finish(self._seats.ends)
        if finish is not None:
            with cache:
                job.end(self._seats.report(row, finish, cache))
            return
        self._seated.append(job)
        self._seats.sit(row, cache)
        job.tell()

    def _deliver(self) -> None:
        for job in list(self._seated):
            finish = job.row.finish(self._seats.ends)
            if finish is None:
                job.tell()
            else:
                self._leave(job, finish)

    def _leave(self, job: Job, finish: str) -> None:
        finished = self._seats.report(job.row, finish)
        self._seats.rise(job.row)
        self._seated.remove(job)
        job.end(finished)

    def _fail(self, jobs: list[Job] | deque[Job], error: BaseException) -> None:
        """End jobs with an error; what they had in the seats is of no use."""
        self._seats.clear()
        while jobs:
            jobs.pop().end(None, error)

    def _end_all(self, error: BaseException | None) -> None:
        if error is None:
            self._cancelled.extend([*self._waiting, *self._seated])
            self._sweep()
        self._fail(self._seated, error or EngineError("the engine is closed"))
        self._fail(self._waiting, error or EngineError("the engine is closed"))


def _unread(job: Job, finish: str, note: str | None = None) -> Finished:
    return Finished(request=job.row.request, tokens=(), finish=finish, note=note)
