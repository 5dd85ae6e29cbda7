"""The GPUs of this machine: how many, what they can do at most, and how ranks may use them."""

from typing import NamedTuple


class Rates(NamedTuple):
    """The limits of a card that figures are compared with, measured where docs/performance.md says how."""

    memory_bytes_per_s: float
    """Read and written together."""
    bf16_flop_per_s: float
    link_bytes_per_s: float
    """To a GPU of the same host over NVLink, one direction."""


RATES = {
    "H100": Rates(3.0e12, 790e12, 250e9),
    "H200": Rates(4.3e12, 790e12, 250e9),
}
"""By a part of the name that torch tells. An H100 has the matrix units and the links of an H200, measured there."""


class Gpus(NamedTuple):
    """How many there are, and what a result says of them."""

    num: int
    machine: str


def rates_of(name: str) -> Rates | None:
    """Of the card whose name, as torch tells it, is in `name`; None: the table has none."""
    return next((rates for part, rates in RATES.items() if part in name), None)


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
