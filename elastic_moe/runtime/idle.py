"""The forward of a rank that has no tokens: it does its experts' share for the others."""

from collections.abc import Callable, Sequence

import torch


class IdleForward:
    """All MoE layers without tokens; by a CUDA graph if `captures` is set. Without one a rank with nothing to do would
    hold up those that have: launching its kernels one by one takes longer than running them."""

    def __init__(self) -> None:
        self.turns: Sequence[Callable[[], None]] = ()
        """`join_idle` of every ElasticMoELayer, in their order."""
        self.captures = False
        """Whether a graph may be made: no layer waits for the GPU."""
        self._graph: torch.cuda.CUDAGraph | None = None
        self._made_for = -1

    @torch.no_grad()
    def __call__(self, num_slots: int) -> None:
        """Go through all layers once. With another number of slots than last time, their weights are elsewhere."""
        if self._graph is not None and self._made_for == num_slots:
            self._graph.replay()
            return
        self._graph = None
        self._run()
        if self.captures:
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads use the GPU too
                self._run()
            self._graph, self._made_for = graph, num_slots

    def _run(self) -> None:
        for turn in self.turns:
            turn()
