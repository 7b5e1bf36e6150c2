"""Ctrl-C and SIGTERM: a step is finished and saved first; a second one ends the process at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """code: what a shell expects of a process that ended by this signal, 130 or 143"""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number


class Interruption:
    """While a block runs, the first signal raises `Interrupted`; within `deferred`, it is kept in `number` instead.

    Signals reach the main thread alone: in another one nothing is changed.
    """

    def __init__(self):
        self.number: int | None = None
        self._deferred = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Whoever runs in here looks at `number` and raises; at the end of the block it is raised for them."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        self.raise_if_any()

    def raise_if_any(self) -> None:
        if self.number is not None:
            raise Interrupted(self.number)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        self.number = number
        if not self._deferred:
            raise Interrupted(number)
        os.write(2, b"finishing the step; a second signal ends at once\n")  # a handler must not wait for a stream's lock
