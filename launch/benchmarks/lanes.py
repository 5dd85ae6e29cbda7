"""How bench=exchange measures: ranks as streams of one process, or each a process: microseconds of the slowest."""

import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from statistics import median
from typing import Any

import torch

from elastic_moe.deadlines import Deadlines
from elastic_moe.exchange.collective import CollectiveExchange
from elastic_moe.exchange.interface import TokenExchange
from elastic_moe.exchange.layout import ExchangeLayout
from elastic_moe.group.epoch_groups import EpochGroups
from elastic_moe.group.epoch_store import EpochStore, StoreServer
from elastic_moe.group.view import Member, View

TIMEOUT_S = 10.0
MOST_GLOO_BYTES = 64e6
"""Of one rank's dispatch through host memory; larger ones take seconds."""
PAIRS = 20
"""Dispatches and combines in a graph."""
NOT_COUNTED = 3
"""First measurements of each kind."""
MOST_GLOO_REPEATS = 3


@dataclass(frozen=True)
class Shape:
    """T tokens of every rank, in bfloat16; E experts, spread evenly over the ranks; each token goes to K of them."""

    seed: int
    ranks: int
    tokens: int
    hidden: int
    experts: int
    top_k: int
    fp8: bool

    @property
    def layout(self) -> ExchangeLayout:
        """bfloat16."""
        return ExchangeLayout(self.ranks, self.experts // self.ranks, self.tokens, self.top_k, self.hidden, 2)

    def routes(self, rank: int) -> torch.Tensor:
        """int64 [T, K] slots that `rank` sends to: K different ones at random."""
        generator = torch.Generator().manual_seed(self.seed * self.ranks + rank)
        return torch.rand((self.tokens, self.experts), generator=generator).argsort(1)[:, : self.top_k].contiguous()

    def copies(self, rank: int) -> tuple[int, int]:
        """(tokens that travel to ranks, this one not counted; rows they become at the other ranks)."""
        owners = self.routes(rank) // (self.experts // self.ranks)
        travels = sum(int((owners == peer).any(1).sum()) for peer in range(self.ranks) if peer != rank)
        return travels, int((owners != rank).sum())

    def at_home(self, rank: int) -> int:
        """Tokens of `rank` that have an expert on it."""
        return int((self.routes(rank) // (self.experts // self.ranks) == rank).any(1).sum())

    @property
    def fits(self) -> bool:
        """Whether all ranks' buffers and rows fit on the current GPU."""
        layout = self.layout
        rows = layout.max_rows(self.tokens, layout.max_slots) * layout.row_bytes
        return self.ranks * (layout.num_bytes + 5 * rows) < 0.85 * torch.cuda.mem_get_info()[0]


def in_one_process(shape: Shape, repeats: int) -> dict[str, float]:
    """All ranks on the current GPU, each a stream."""
    device = torch.device("cuda", torch.cuda.current_device())
    exchanges = [symmetric(shape, rank, device) for rank in range(shape.ranks)]
    view = view_of(shape.ranks, "")
    for exchange in exchanges:
        exchange.enter(view, shape.experts // shape.ranks, lambda: None)
    lanes = [Lane(shape, rank, exchange, device) for rank, exchange in enumerate(exchanges)]
    figures = timed(lanes, repeats)
    for exchange in exchanges:
        exchange.check()
    for exchange in exchanges:
        exchange.close()
    del lanes, exchanges
    torch.cuda.empty_cache()
    return figures


class Lane:
    """One rank's calls on a stream of its own, and two graphs of them."""

    def __init__(self, shape: Shape, rank: int, exchange: Any, device: torch.device) -> None:
        self.shape = shape
        self.exchange = exchange
        self.stream = torch.cuda.Stream(device)
        self.hidden = torch.randn((shape.tokens, shape.hidden), device=device).bfloat16()
        self.slots = shape.routes(rank).to(device)
        torch.cuda.synchronize(device)
        self.dispatches = self._captured(self.dispatch)
        self.pairs = self._captured(self.pair)

    def warm(self) -> None:
        """Have the allocator hold what a call takes: it would wait for the kernels of other lanes."""
        layout = self.shape.layout
        shape = (layout.max_rows(self.shape.tokens, layout.max_slots), self.shape.hidden)
        with torch.cuda.stream(self.stream):
            rows = [self.hidden.new_empty(shape) for _ in range(2)]
            rows.clear()

    def dispatch(self) -> None:
        """Alone, over and over, its rows are overwritten while they are read: for timing only."""
        self.exchange.dispatch(self.hidden, self.slots)

    def pair(self) -> None:
        """Dispatch and combine."""
        sent = self.exchange.dispatch(self.hidden, self.slots)
        self.exchange.combine(sent.rows, sent.ticket)

    def _captured(self, call: Callable[[], None]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            for _ in range(PAIRS):
                call()
        return graph


def timed(lanes: list[Lane], repeats: int) -> dict[str, float]:
    """Microseconds of one call, of the slowest rank: in graphs, and what it takes the host to launch a pair."""
    dispatch = _replayed(lanes, repeats, lambda lane: lane.dispatches)
    pair = _replayed(lanes, repeats, lambda lane: lane.pairs)
    for lane in lanes:
        lane.warm()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(PAIRS):
        for lane in lanes:
            with torch.cuda.stream(lane.stream):
                lane.pair()
    host = (time.perf_counter() - begin) / PAIRS / len(lanes)
    torch.cuda.synchronize()
    return {
        "dispatch_us": dispatch,
        "combine_us": pair - dispatch,
        "pair_us": pair,
        "host_us": host * 1e6,
    }


def _replayed(lanes: list[Lane], repeats: int, graph_of: Callable[[Lane], torch.cuda.CUDAGraph]) -> float:
    times = []
    for _ in range(NOT_COUNTED + repeats):
        torch.cuda.synchronize()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for lane in lanes:
            lane.stream.wait_event(begin)
            with torch.cuda.stream(lane.stream):
                graph_of(lane).replay()
        for lane in lanes:
            torch.cuda.current_stream().wait_stream(lane.stream)
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / PAIRS)
    return median(times[NOT_COUNTED:])


def in_processes(shapes: list[Shape], own_gpus: bool, repeats: int) -> list[dict[str, Any]]:
    """The collective exchange, each rank a process; with a GPU each, also the symmetric one. Of the slowest rank."""
    context = multiprocessing.get_context("spawn")
    store = StoreServer("127.0.0.1")
    pipes = [context.Pipe() for _ in range(shapes[0].ranks)]
    processes = [
        context.Process(target=_rank, args=(rank, store.address, shapes, own_gpus, repeats, pipe), daemon=True)
        for rank, (_, pipe) in enumerate(pipes)
    ]
    for process, (_, theirs) in zip(processes, pipes, strict=True):
        process.start()
        theirs.close()
    try:
        said = [ours.recv() for ours, _ in pipes]
    except EOFError as error:
        raise RuntimeError("a rank of the collective exchange has failed") from error
    finally:
        for process in processes:
            process.join(10)
            process.kill()
    return [
        {key: max(figure[key] for figure in of_ranks) for key in of_ranks[0]} for of_ranks in zip(*said, strict=True)
    ]


def _rank(rank: int, store: str, shapes: list[Shape], own_gpus: bool, repeats: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    torch.cuda.set_device(rank % torch.cuda.device_count())
    device = torch.device("cuda", torch.cuda.current_device())
    torch.zeros(1, device=device)
    _meet(EpochStore(store, 60.0), rank, shapes[0].ranks)
    name = store.replace(":", "-")
    view = view_of(shapes[0].ranks, store, name)
    deadlines = Deadlines.of(len(view.members), exchange_s=120.0)
    groups = EpochGroups(view, rank, device if own_gpus else torch.device("cpu"), deadlines).build()
    results = []
    for number, shape in enumerate(shapes):
        figures: dict[str, Any] = {"collective": "nccl" if own_gpus else "gloo", "collective_us": 0.0}
        sent = shape.tokens * shape.top_k * shape.hidden * 2
        if own_gpus or sent <= MOST_GLOO_BYTES:
            exchange = CollectiveExchange(groups.data, view.ranks, shape.experts // shape.ranks)
            figures["collective_us"] = collective_us(shape, rank, exchange, device, groups, own_gpus, repeats)
        if own_gpus:
            ours = symmetric(shape, rank, device, f"{name}-{number}")
            there = view_of(shape.ranks, "", f"{name}-{number}")
            ours.enter(there, shape.experts // shape.ranks, groups.control.barrier)
            figures |= timed([Lane(shape, rank, ours, device)], repeats)
            ours.check()
            groups.control.barrier()
            ours.close()
        results.append(figures)
    pipe.send(results)


def collective_us(
    shape: Shape,
    rank: int,
    exchange: TokenExchange,
    device: torch.device,
    groups: EpochGroups,
    own_gpus: bool,
    repeats: int,
) -> float:
    """Median of dispatch and combine, eager, tokens and results in GPU memory."""
    hidden = torch.randn((shape.tokens, shape.hidden), device=device).bfloat16()
    slots = shape.routes(rank).to(device)
    times = []
    for _ in range(NOT_COUNTED + (repeats if own_gpus else min(repeats, MOST_GLOO_REPEATS))):
        torch.cuda.synchronize()
        groups.control.barrier()
        begin = time.perf_counter()
        if own_gpus:
            sent = exchange.dispatch(hidden, slots)
            exchange.combine(sent.rows, sent.ticket)
        else:  # gloo has no bfloat16 sums, but bytes are bytes
            sent = exchange.dispatch(hidden.cpu(), slots.cpu())
            exchange.combine(sent.rows.to(device).cpu(), sent.ticket).to(device)
        torch.cuda.synchronize()
        times.append((time.perf_counter() - begin) * 1e6)
    return median(times[NOT_COUNTED:])


def symmetric(shape: Shape, rank: int, device: torch.device, prefix: str = "") -> Any:
    """The exchange of one rank; where Triton is."""
    from elastic_moe.exchange.symmetric import SymmetricExchange

    name = _incarnation(rank, prefix)
    return SymmetricExchange(name, rank, shape.layout, torch.bfloat16, device, timeout_s=TIMEOUT_S, fp8=shape.fp8)


def view_of(ranks: int, store: str, prefix: str = "") -> View:
    """All ranks, on this host."""
    members = (Member(rank, 0, _incarnation(rank, prefix), 0, "127.0.0.1", "", store) for rank in range(ranks))
    return View(1, tuple(members))


def _incarnation(rank: int, prefix: str) -> str:
    return f"bench-{prefix or os.getpid()}-{rank}"


def _meet(store: EpochStore, rank: int, count: int) -> None:
    store.set(f"ready/{rank}", "")
    store.multi_get([f"ready/{other}" for other in range(count)])
