"""The forward of a rank that has no tokens: it does its experts' share for the others."""

from collections.abc import Sequence
from typing import Protocol

import torch


class IdleLayer(Protocol):
    """What the runtime needs to know of an ElasticMoELayer."""

    def join_idle(self) -> None:
        """Take part in this layer's exchange with no tokens."""


class IdleForward:
    """All MoE layers without tokens; by a CUDA graph if `captures` is set. Without one a rank with nothing to do would
    hold up those that have: launching its kernels one by one takes longer than running them."""

    def __init__(self) -> None:
        self.captures = False
        """Whether a graph may be made: no layer waits for the GPU."""
        self._graph: torch.cuda.CUDAGraph | None = None
        self._made_for = -1

    @torch.no_grad()
    def __call__(self, layers: Sequence[IdleLayer], num_slots: int) -> None:
        """Go through all layers once. With another number of slots than last time, their weights are elsewhere."""
        if self._graph is not None and self._made_for == num_slots:
            self._graph.replay()
            return
        self._graph = None
        _join(layers)
        if self.captures:
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads use the GPU too
                _join(layers)
            self._graph, self._made_for = graph, num_slots


def _join(layers: Sequence[IdleLayer]) -> None:
    for layer in layers:
        layer.join_idle()
