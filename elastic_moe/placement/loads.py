"""How many tokens each expert gets: counted on the device, kept as a window of the recent past on the host."""

import contextlib
import json
import threading
from collections.abc import Iterator

import numpy as np
import torch


class LoadCounter:
    """Tokens per logical expert of every layer since the start. A layer adds to it without a word to the host; the
    address of the counts never changes, so a CUDA graph may add too."""

    def __init__(self, num_layers: int, num_experts: int, device: torch.device) -> None:
        self._counts = torch.zeros((num_layers, 1 + num_experts), dtype=torch.int64, device=device)
        """First those of -1, which nobody reads: to leave them out would take a word to the host."""
        self._one = torch.ones(1, dtype=torch.int64, device=device)
        self._lock = threading.Lock()

    def count(self, layer: int, top_k_index: torch.Tensor) -> None:
        """Add the choices of a router: int64 [T, K] logical experts, or -1, which does not count."""
        chosen = top_k_index.reshape(-1) + 1
        self._counts[layer].scatter_add_(0, chosen, self._one.expand(chosen.shape[0]))

    def read(self) -> np.ndarray:
        """int64 [L, E], a copy. Waits for the device, and until counting goes on; from any thread."""
        with self._lock:
            return self._counts[:, 1:].cpu().numpy().copy()

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """What is counted meanwhile does not count."""
        with self._lock:
            before = self._counts.clone()
            try:
                yield
            finally:
                self._counts.copy_(before)


class LoadWindow:
    """The loads of the recent past: what was counted `half_life_steps` steps ago counts half."""

    def __init__(self, num_layers: int, num_experts: int, half_life_steps: float) -> None:
        self.loads = np.zeros((num_layers, num_experts))
        """float64 [L, E], tokens."""
        self._half_life_steps = half_life_steps
        self._counted = np.zeros((num_layers, num_experts), dtype=np.int64)
        self._steps = 0

    def add(self, counted: np.ndarray, steps: int) -> None:
        """Take in what has been counted in all, int64 [L, E], after `steps` steps in all."""
        decay = 0.5 ** (max(0, steps - self._steps) / self._half_life_steps)
        self.loads = self.loads * decay + (counted - self._counted)
        self._counted, self._steps = counted, steps


def parse_loads(text: str, num_layers: int, num_experts: int) -> np.ndarray:
    """float64 [L, E] from JSON with the key `logical_count`: what GET /elastic/loads answers.

    It may have more layers than the model has MoE layers if the others had no tokens (dense layers).

    Raises:
        ValueError: it is something else; the message says what is expected.
    """
    wanted = f"expected JSON with 'logical_count': [{num_layers}][{num_experts}] numbers >= 0"
    try:
        loads = np.array(json.loads(text)["logical_count"], dtype=np.float64)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{wanted} ({error or type(error).__name__})") from error
    if loads.ndim == 2 and len(loads) > num_layers:
        loads = loads[loads.any(axis=1)]
    if loads.shape != (num_layers, num_experts) or not np.isfinite(loads).all() or (loads < 0).any():
        raise ValueError(f"{wanted}, got shape {list(loads.shape)}")
    return loads
