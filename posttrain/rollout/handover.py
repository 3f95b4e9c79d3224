"""How other threads come in between two steps of one that never rests: a lock alone would be its
own again before they wake."""

from collections.abc import Generator
from contextlib import contextmanager
from threading import Condition, RLock


class Handover:
    """A lock that the stepping thread leaves to those who wait."""

    def __init__(self) -> None:
        self._lock, self._change = RLock(), Condition()
        self.num_waiting = 0
        """Threads that wait to come in."""

    @contextmanager
    def step(self) -> Generator[None]:
        """Around a step: begins when nobody waits."""
        with self._change:
            self._change.wait_for(lambda: not self.num_waiting)
        with self._lock:
            yield

    @contextmanager
    def between(self) -> Generator[None]:
        """Between two steps, or within one for the thread that makes it."""
        with self._change:
            self.num_waiting += 1
        try:
            self._lock.acquire()
        finally:
            with self._change:
                self.num_waiting -= 1
                self._change.notify_all()
        try:
            yield
        finally:
            self._lock.release()
