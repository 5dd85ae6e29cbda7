"""How long a process has been busy: running, or waiting for a processor. One that stands still is neither.

That tells a process that hangs (a read that never returns, a driver that does not answer, SIGSTOP) from one that works
for long without a word, and from one that a busy machine keeps from running.
"""

import contextlib
from pathlib import Path
from typing import NamedTuple


class Busy(NamedTuple):
    """Nanoseconds since its start."""

    main: int
    """Of its main thread."""
    all: int
    """Of all its threads together."""


def busy_ns(pid: int) -> Busy | None:
    """Of a process on this machine; None when it is gone, or the kernel does not say."""
    threads: dict[str, int] = {}
    with contextlib.suppress(OSError, ValueError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(FileNotFoundError):  # it has just ended
                running, waiting, _ = (task / "schedstat").read_text().split()
                threads[task.name] = int(running) + int(waiting)
    return Busy(threads[str(pid)], sum(threads.values())) if str(pid) in threads else None
