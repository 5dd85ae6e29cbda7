"""The GPUs of this machine, for benchmarks of whole servers."""

from typing import NamedTuple


class Gpus(NamedTuple):
    """How many there are, and what a result says of them."""

    num: int
    machine: str


def gpus_for(bench: str) -> Gpus:
    """Those that there are; ValueError without any."""
    import torch

    if not torch.cuda.is_available():
        raise ValueError(f"bench={bench} needs a GPU")
    return Gpus(torch.cuda.device_count(), f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}")


def ways(ranks: int, gpus: int) -> list[tuple[str, bool]]:
    """(`exchange.kind`, with CUDA graphs): NCCL takes no graphs, and a GPU for each rank."""
    collective = [("collective", False)] if ranks <= gpus else []
    return [*collective, *([("symmetric", False)] if ranks > 1 else []), ("symmetric", True)]
