"""How much memory this process may still take, where its experts are."""

import torch

from elastic_moe.memory.host import available_bytes

RESERVE = 0.1
"""Of what is free, a tenth is not ours: others take some meanwhile, and what is taken is rounded up."""


def free_bytes(device: torch.device) -> int:
    """Bytes that may be taken on `device` without harm to others: of its memory, or the host's and the container's."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    else:
        free = available_bytes()
    return max(0, int(free * (1 - RESERVE)))
