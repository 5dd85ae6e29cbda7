"""SymmetricExchange between processes: the table of cases, gloo, a graph, a SIGKILL, a rejoin, a sleeper."""

import contextlib
import os
import signal
import threading
import time

import pytest
import torch

from elastic_moe.errors import PeerLost

triton = pytest.importorskip("triton")

from support import exchange_cases  # noqa: E402
from support.ranks import run_ranks  # noqa: E402
from symmetric_ranks import Seat  # noqa: E402

from elastic_moe.deadlines import Deadlines  # noqa: E402
from elastic_moe.exchange.collective import CollectiveExchange  # noqa: E402
from elastic_moe.group.epoch_groups import EpochGroups  # noqa: E402
from elastic_moe.memory.peer_memory import PeerMemory  # noqa: E402
from elastic_moe.transport.symmetric import PeerStaging  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
MAX_TOKENS = 64
TIMEOUT_S = 1.0
CASES = [
    {"counts": lambda r: MAX_TOKENS},
    {"counts": lambda r: 0 if r == 0 else 5 * r % (MAX_TOKENS + 1)},
    {"counts": lambda r: 0},
    {"counts": lambda r: MAX_TOKENS if r == 1 else 0, "skew": "rank"},
    {"counts": lambda r: MAX_TOKENS - r, "skew": "rank"},
    {"counts": lambda r: 7 * (r + 1) % (MAX_TOKENS + 1), "skew": "slot"},
    {"counts": lambda r: 1 + r, "none": 0.5},
    {"counts": lambda r: MAX_TOKENS if r % 2 else 0},
]


@contextlib.contextmanager
def open_symmetric(launch, setup):
    seat = Seat(
        launch,
        setup.ranks[launch.rank],
        seats=setup.num_seats,
        slots=setup.slots_per_rank,
        tokens=exchange_cases.MAX_TOKENS,
        top_k=setup.top_k,
        dtype=setup.dtype,
        hidden=exchange_cases.HIDDEN,
    )
    seat.enter(1, setup.ranks)
    yield seat.exchange, seat.device
    seat.meet("done", len(setup.ranks))


@pytest.mark.parametrize("setup", exchange_cases.SETUPS, ids=str)
def test_symmetric(setup):
    assert all(run_ranks(exchange_cases.conform, len(setup.ranks), open_symmetric, setup, deadline_s=150))


def round_trips(launch, top_k, hidden_size):
    ranks = tuple(range(launch.world_size))
    seat = Seat(launch, launch.rank, tokens=MAX_TOKENS, top_k=top_k, hidden=hidden_size)
    view = seat.enter(1, ranks)
    groups = EpochGroups(view, seat.rank, torch.device("cpu"), Deadlines.of(len(view.members), exchange_s=60.0)).build()
    gloo = CollectiveExchange(groups.data, view.ranks, seat.slots)
    for turn, case in enumerate(CASES * 2):
        options = {"skew": case.get("skew", ""), "none": case.get("none", 0.0)}
        sent = {r: seat.tokens(r, turn, case["counts"](r), ranks, **options) for r in ranks}
        hidden, slots = sent[seat.rank]
        got, results = seat.round_trip(hidden.to(seat.device), slots.to(seat.device))
        seat.exchange.check()
        rows, ends = seat.expected_rows(sent)
        assert got.offsets.tolist() == ends
        assert torch.equal(got.rows[: ends[-1]].cpu(), rows)
        assert torch.equal(results.cpu(), seat.expected_results(hidden, slots))
        wanted = gloo.dispatch(hidden.float(), slots)
        assert torch.equal(got.offsets.cpu(), wanted.offsets)
        assert torch.equal(got.rows[: ends[-1]].cpu().float(), wanted.rows)
        back = gloo.combine(seat.compute(wanted.rows.to(seat.dtype), wanted.offsets).float(), wanted.ticket)
        assert torch.equal(results.cpu().float(), back)
    groups.control.barrier()
    return True


@pytest.mark.parametrize(("num_ranks", "top_k", "hidden_size"), [(2, 2, 256), (3, 3, 2048), (4, 4, 200), (8, 4, 7168)])
def test_it_does_what_gloo_does(num_ranks, top_k, hidden_size):
    assert all(run_ranks(round_trips, num_ranks, top_k, hidden_size, deadline_s=150))


def with_holes(launch, ranks):
    """Seats of which some stay empty, the tokens of one rank more than a chunk, no waiting between the turns."""
    rank = ranks[launch.rank]
    seat = Seat(launch, rank, seats=8, slots=16, tokens=300, top_k=8, dtype=torch.float16)
    seat.enter(3, ranks)
    turns = []
    for turn in range(6):
        sent = {r: seat.tokens(r, turn, 300 if r == ranks[turn % len(ranks)] else 17 * turn, ranks) for r in ranks}
        hidden, slots = sent[rank]
        got, results = seat.round_trip(hidden.to(seat.device), slots.to(seat.device))
        turns.append((sent, got, results.clone()))
    seat.exchange.check()
    for sent, got, results in turns:
        rows, ends = seat.expected_rows(sent)
        assert got.offsets.tolist() == ends
        assert torch.equal(got.rows[: ends[-1]].cpu(), rows)
        assert torch.equal(results.cpu(), seat.expected_results(*sent[rank]))
    seat.meet("done", len(ranks))
    return True


def test_seats_may_have_holes():
    assert all(run_ranks(with_holes, 3, (0, 3, 6), deadline_s=100))


def in_eight_bits(launch):
    ranks = tuple(range(launch.world_size))
    seat = Seat(launch, launch.rank, fp8=True, hidden=1024)
    seat.enter(1, ranks)
    for turn in range(3):
        sent = {r: seat.tokens(r, turn, 40 + r, ranks) for r in ranks}
        hidden, slots = sent[seat.rank]
        hidden[0] = 0
        got, _ = seat.round_trip(hidden.to(seat.device), slots.to(seat.device))
        seat.exchange.check()
        sent[0][0][0] = sent[1][0][0] = 0
        rows, ends = seat.expected_rows(sent)
        assert got.offsets.tolist() == ends
        scale = rows.float().view(ends[-1], -1, 128).abs().amax(-1, keepdim=True) / 448
        error = (got.rows[: ends[-1]].cpu().float() - rows.float()).view(ends[-1], -1, 128).abs()
        limit = rows.float().view_as(error).abs() / 16 * 1.07 + scale / 256  # half a step of e4m3, and bfloat16's
        assert (error <= limit).all()
    seat.meet("done", len(ranks))
    return True


def test_tokens_may_travel_in_eight_bits():
    assert all(run_ranks(in_eight_bits, 2, deadline_s=100))


def replay_until_lost(seat, graph, victim):
    """Seconds that the replay took which found the loss."""
    with pytest.raises(PeerLost, match=rf"ranks \[.*{victim}.*\] missed the deadline of {TIMEOUT_S} s"):  # noqa: PT012
        while True:
            begin = time.monotonic()
            graph.replay()
            seat.exchange.check()
    return time.monotonic() - begin


def killed_and_replaced(launch, num_ranks, victim):
    """Process `num_ranks` takes the seat of `victim` later. The survivors use one graph from the first to the last."""
    ranks = tuple(range(num_ranks))
    newcomer = launch.rank == num_ranks
    rank = victim if newcomer else launch.rank
    seat = Seat(launch, rank, seats=num_ranks, timeout_s=TIMEOUT_S, generation=int(newcomer))
    seconds = 0.0
    if not newcomer:
        seat.enter(1, ranks)
        hidden, slots, results, graph = seat.captured(16)

    def replay(turns, ranks):
        for turn in turns:
            mine = seat.tokens(rank, turn, 16, ranks, none=0.1)
            if newcomer:
                _, got = seat.round_trip(*(x.to(seat.device) for x in mine))
            else:
                hidden.copy_(mine[0])
                slots.copy_(mine[1])
                graph.replay()
                got = results
            seat.exchange.check()
            assert torch.equal(got.cpu(), seat.expected_results(*mine))

    if not newcomer:
        replay(range(20), ranks)
        if rank == victim:
            for _ in range(30):
                graph.replay()
            os.kill(os.getpid(), signal.SIGKILL)
        seconds = replay_until_lost(seat, graph, victim)
        left = tuple(r for r in ranks if r != victim)
        seat.enter(2, left)
        replay(range(20, 40), left)
    seat.meet("replaced", num_ranks)
    seat.enter(3, ranks, newcomers=(victim,))
    replay(range(40, 60), ranks)
    seat.meet("done", num_ranks)
    return seconds


@pytest.mark.parametrize(("num_ranks", "victim"), [(2, 1), (4, 0)])
def test_a_killed_peer_is_told_in_time_and_the_same_graph_goes_on(num_ranks, victim):
    ends = {victim: -signal.SIGKILL}
    seconds = run_ranks(killed_and_replaced, num_ranks + 1, num_ranks, victim, ends=ends, deadline_s=150)
    survivors = [s for r, s in enumerate(seconds[:num_ranks]) if r != victim]
    assert all(TIMEOUT_S * 0.9 < s < TIMEOUT_S + 2 for s in survivors), survivors


def left_behind(launch):
    """Rank 2 sleeps between dispatch and combine, and wakes when the others are an epoch further."""
    ranks, sleeper = (0, 1, 2), 2
    seat = Seat(launch, launch.rank, timeout_s=TIMEOUT_S)
    seat.enter(1, ranks)
    hidden, slots = seat.tokens(seat.rank, 0, 32, ranks)
    sent = seat.exchange.dispatch(hidden.to(seat.device), slots.to(seat.device))
    rows = seat.compute(sent.rows, sent.offsets)
    if seat.rank == sleeper:
        seat.exchange.check()
        seat.meet("wake", 3)
        seat.exchange.combine(rows, sent.ticket)
        with pytest.raises(PeerLost, match="was left behind"):
            seat.exchange.check()
        seat.meet("late", 3)
        ranks = (0, 1, 2)
    else:
        seat.exchange.combine(rows, sent.ticket)
        with pytest.raises(PeerLost, match=r"ranks \[2\] missed"):
            seat.exchange.check()
        seat.enter(2, (0, 1))
        hidden, slots = seat.tokens(seat.rank, 1, 32, (0, 1))
        _, results = seat.round_trip(hidden.to(seat.device), slots.to(seat.device))
        seat.exchange.check()
        seat.meet("wake", 3)
        seat.meet("late", 3)
        assert torch.equal(results.cpu(), seat.expected_results(hidden, slots))
    seat.enter(3, ranks)
    hidden, slots = seat.tokens(seat.rank, 2, 32, ranks)
    _, results = seat.round_trip(hidden.to(seat.device), slots.to(seat.device))
    seat.exchange.check()
    assert torch.equal(results.cpu(), seat.expected_results(hidden, slots))
    seat.meet("done", 3)
    return True


def test_who_was_left_behind_writes_nothing_into_a_later_epoch():
    assert all(run_ranks(left_behind, 3, deadline_s=100))


def aborted(launch):
    """Rank 1 never sends; rank 0 is freed by a thread of its own, long before the deadline."""
    seat = Seat(launch, launch.rank, timeout_s=60.0)
    seat.enter(1, (0, 1))
    hidden, slots = seat.tokens(seat.rank, 0, 8, (0, 1))
    if seat.rank == 0:
        threading.Timer(0.5, seat.exchange.abort, (1,)).start()
        begin = time.monotonic()
        for _ in range(3):
            seat.round_trip(hidden.to(seat.device), slots.to(seat.device))
        with pytest.raises(PeerLost, match="this rank has left the epoch"):
            seat.exchange.check()
        assert 0.3 < time.monotonic() - begin < 10
    seat.enter(2, (0, 1))
    _, results = seat.round_trip(hidden.to(seat.device), slots.to(seat.device))
    seat.exchange.check()
    assert torch.equal(results.cpu(), seat.expected_results(hidden, slots))
    seat.meet("done", 2)
    return True


def test_abort_frees_a_waiting_kernel():
    assert all(run_ranks(aborted, 2, deadline_s=100))


def push_around(launch):
    seat = Seat(launch, launch.rank)
    view = seat.view(1, tuple(range(launch.world_size)))
    staging = PeerStaging(seat.incarnation, seat.rank, seat.num_seats, 2**20, seat.device, timeout_s=20.0)
    staging.enter(view)
    target = (seat.rank + 1) % launch.world_size
    tensors = [torch.full((1000,), seat.rank + 1.0, device=seat.device), torch.arange(500, device=seat.device)]
    end = staging.push(target, 64, tensors)
    assert end == 64 + 4000 + 4000
    staging.synchronize()
    seat.meet("pushed", launch.world_size)
    source = (seat.rank - 1) % launch.world_size
    assert (staging.buffer[64:4064].view(torch.float32) == source + 1).all()
    assert torch.equal(staging.buffer[4064:8064].view(torch.int64).cpu(), torch.arange(500))
    with pytest.raises(ValueError, match="cannot write 8 bytes at 1048570 of rank"):
        staging.push(target, 2**20 - 6, [torch.zeros(1, dtype=torch.int64, device=seat.device)])
    seat.meet("done", launch.world_size)
    staging.close()
    return True


def test_experts_are_pushed_into_a_peers_staging():
    assert all(run_ranks(push_around, 3, deadline_s=100))


def test_memory_that_nobody_offers_is_an_error_in_time():
    memory = PeerMemory("test-alone", 0, 2, 4096, torch.device("cuda", 0))
    begin = time.monotonic()
    with pytest.raises(PeerLost, match="rank 1 offers no memory under test-nobody"):
        memory.connect({0: "test-alone", 1: "test-nobody"}, 0.3)
    assert time.monotonic() - begin < 2
    memory.close()
