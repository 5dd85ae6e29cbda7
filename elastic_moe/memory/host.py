"""How much memory of the host may still be taken. Without torch."""

import contextlib
from pathlib import Path

import psutil

_CGROUP = Path("/sys/fs/cgroup")


def available_bytes() -> int:
    """Bytes that the host has, and the container may take."""
    free = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError):  # no limit says "max"
        limit = int((_CGROUP / "memory.max").read_text())
        kept = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        taken = int((_CGROUP / "memory.current").read_text()) - int(kept.get("inactive_file", 0))
        free = min(free, limit - taken)
    return max(0, free)
