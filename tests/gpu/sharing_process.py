"""A process whose experts are on a GPU, and which gives them: for tests and measurements of those who read.

    python sharing_process.py DEVICE LAYERS EXPERTS HIDDEN INTER

Says its address, then waits for the end of its standard input. Expert e of layer l: all elements are l + e / 100.
"""

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from elastic_moe.weights.server import WeightServer
from elastic_moe.weights.shelf import EngineShelf
from elastic_moe.weights.store import ExpertStore

NAMES = ("gate_up", "down")
FORM = "a test"


class Layer:
    """What a store and a shelf need of SlotExperts."""

    def __init__(self, num_experts: int, hidden: int, inter: int, device: torch.device) -> None:
        self.num_slots = num_experts
        self.gate_up = torch.zeros(num_experts, 2 * inter, hidden, dtype=torch.bfloat16, device=device)
        self.down = torch.zeros(num_experts, hidden, inter, dtype=torch.bfloat16, device=device)
        num_bytes = (self.gate_up[0].numel() + self.down[0].numel()) * 2
        self.layout = SimpleNamespace(num_experts=num_experts, num_bytes=num_bytes, names=NAMES)
        self._views = [[self.gate_up[e], self.down[e]] for e in range(num_experts)]

    def slot_tensors(self, slot: int) -> list[torch.Tensor]:
        """Views."""
        return self._views[slot]


def make_store(layers: int, experts: int, hidden: int, inter: int, device: torch.device, *, full: bool) -> ExpertStore:
    """All experts in order, or none."""
    made: Any = [Layer(experts, hidden, inter, device) for _ in range(layers)]
    held = np.tile(np.arange(experts), (layers, 1)) if full else None
    for number, layer in enumerate(made if full else ()):
        for expert in range(experts):
            for tensor in layer.slot_tensors(expert):
                tensor.fill_(number + expert / 100)
    return ExpertStore(made, held)


def main() -> None:
    """Serve."""
    device = torch.device(sys.argv[1])
    torch.cuda.set_device(device)
    store = make_store(*map(int, sys.argv[2:6]), device, full=True)
    store.record_digests()
    server = WeightServer("127.0.0.1")
    server.start(EngineShelf(store, {"norm": torch.arange(1000.0, device=device)}, FORM))
    print(server.address, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
