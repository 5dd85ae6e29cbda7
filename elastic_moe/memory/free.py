"""How much memory this process may still take, where its experts are."""

import contextlib
from pathlib import Path

import psutil
import torch

RESERVE = 0.1
"""Of what is free, a tenth is not ours: others take some meanwhile, and what is taken is rounded up."""
_CGROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int:
    """Bytes that may be taken on `device` without harm to others: of its memory, or the host's and the container's."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    else:
        free = psutil.virtual_memory().available
        with contextlib.suppress(OSError, ValueError):  # no limit says "max"
            limit = int((_CGROUP / "memory.max").read_text())
            kept = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
            taken = int((_CGROUP / "memory.current").read_text()) - int(kept.get("inactive_file", 0))
            free = min(free, limit - taken)
    return max(0, int(free * (1 - RESERVE)))
