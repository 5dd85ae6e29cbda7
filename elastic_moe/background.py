"""Background threads whose errors are never swallowed: a rank of which a thread has died must not look alive."""

import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

log = logging.getLogger(__name__)

OnError = Callable[[BaseException], None]


def start_thread(name: str, target: Callable[..., None], *args: Any, on_error: OnError) -> threading.Thread:
    """Start a daemon thread that runs `target(*args)`. What it raises is logged and given to `on_error`, there."""

    def run() -> None:
        try:
            target(*args)
        except BaseException as error:
            log.exception("thread %s died", name)
            on_error(error)

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    return thread


def start_worker(name: str) -> ThreadPoolExecutor:
    """A thread that does one thing after another. What one raises is for whoever waits for its result."""
    return ThreadPoolExecutor(1, thread_name_prefix=name)


def end_process(_error: BaseException | None = None) -> None:
    """End with code 1, whatever other threads do.

    The `OnError` of a process in which nobody waits to be told: its supervisor sees it end, and starts it again.
    """
    logging.shutdown()
    os._exit(1)


class Latch:
    """The first error of a rank's background threads, kept for its main thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._error: BaseException | None = None

    def set(self, error: BaseException) -> None:
        """Keep `error` unless there is one. From any thread."""
        with self._lock:
            self._error = self._error or error

    def check(self) -> None:
        """Raise RuntimeError, caused by the error, if there is one."""
        if self._error is not None:
            raise RuntimeError(f"a background thread of this rank died: {self._error!r}") from self._error
