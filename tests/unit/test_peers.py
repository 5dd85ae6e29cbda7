"""Weights from a running member, over real sockets in one process; and whose digests count."""

import random
import threading
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
import torch
import zmq

from elastic_moe.deadlines import Deadlines
from elastic_moe.group.view import Member
from elastic_moe.placement.placement import EMPTY
from elastic_moe.weights import peers as module
from elastic_moe.weights.digest import digest
from elastic_moe.weights.peers import Peers, WeightReply, WeightRequest, WeightServer
from elastic_moe.weights.sources import Account, Missed, Until, Want, fill
from elastic_moe.weights.store import UNKNOWN, ExpertStore
from elastic_moe.wire import PLAIN, Wire


class Layer:
    """Slots with two tensors each, as far as a store looks at them."""

    class layout:
        num_experts = 4
        num_bytes = 40

    num_slots = 3

    def __init__(self) -> None:
        self.weights = torch.arange(3 * 6, dtype=torch.float32).view(3, 6)
        self.biases = torch.arange(3 * 8, dtype=torch.bfloat16).view(3, 2, 4)

    def slot_tensors(self, slot: int) -> list[torch.Tensor]:
        return [self.weights[slot], self.biases[slot]]


def make_store() -> ExpertStore:
    """Layer 1 holds experts 2 and 0, and an empty slot."""
    store = ExpertStore([Layer(), Layer()], np.array([[1, 3, EMPTY], [2, 0, EMPTY]]))
    store.record_digests()
    return store


DENSE = {"embed.weight": torch.randn(5, 3), "norm": torch.randn(4).bfloat16(), "scalar": torch.tensor(2.5)}


def member(rank: int, weights: str) -> Member:
    return Member(rank, 0, "x", 1, "host", "", "", weights=weights)


@pytest.fixture
def store() -> ExpertStore:
    return make_store()


@pytest.fixture
def server(store: ExpertStore) -> Iterator[WeightServer]:
    server = WeightServer("127.0.0.1")
    server.start(DENSE, store)
    yield server
    server.close()


@pytest.fixture
def peers(server: WeightServer) -> Iterator[Peers]:
    """One of two members is dead."""
    peers = Peers([member(0, "tcp://127.0.0.1:9"), member(1, server.address)], node=0, deadlines=Deadlines())
    yield peers
    peers.close()


def test_dense_tensors_arrive_from_whoever_lives(peers):
    for name, tensor in DENSE.items():
        out = torch.empty_like(tensor)
        assert peers.dense(name, out)
        assert torch.equal(out, tensor)
    assert not peers.dense("no such tensor", torch.empty(1))
    assert peers.dense_bytes == sum(t.numel() * t.element_size() for t in DENSE.values())


def test_what_does_not_fit_is_refused(peers):
    assert not peers.dense("norm", torch.empty(4))
    assert not peers.dense("norm", torch.empty(3).bfloat16())


def test_experts_arrive_from_the_slot_that_holds_them(store, peers):
    mine, account = ExpertStore([Layer(), Layer()]), Account()
    fill([Want(1, 0, 2)], mine, [peers], account)
    assert all(torch.equal(a, b) for a, b in zip(mine.tensors(1, 2), store.tensors(1, 1), strict=True))
    assert (mine.held[1, 2], account.num_bytes) == (0, {"node": 40})
    store.vacate(1, 1)
    for layer, expert in ((1, 3), (0, 0), (7, 0), (1, 0)):
        want = Want(layer, expert, 0) if layer < 2 else None
        told = list(peers.fetch([want], mine, Until())) if want else []
        assert all(isinstance(one, Missed) for several in told for one in several)
        assert module._copy_of(store, layer, expert) == []


def test_wrong_bytes_are_refused(peers, monkeypatch):
    right = module._bytes_of
    monkeypatch.setattr(module, "_bytes_of", lambda t: bytes([right(t)[0] ^ 1]) + right(t)[1:])
    assert not peers.dense("embed.weight", torch.empty(5, 3))
    assert peers.dense_bytes == 0


def test_garbage_does_not_end_the_server(server, peers):
    with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
        stranger.connect(server.address)
        for frames in ([b""], [b"\xff"], [b"a", b"b"]):
            stranger.send_multipart(frames)
    assert peers.dense("norm", torch.empty(4).bfloat16())


def test_a_server_that_nobody_asks_for_a_while_still_answers(monkeypatch, store):
    monkeypatch.setattr(module, "POLL_MS", 5)
    server, looked = WeightServer("127.0.0.1"), threading.Event()
    poll, calls = server._router.poll, []

    def counted(timeout: int) -> int:
        calls.append(timeout)
        if len(calls) == 3:
            looked.set()
        return poll(timeout)

    monkeypatch.setattr(server._router, "poll", counted, raising=False)
    server.start(DENSE, store)
    assert looked.wait(5), "it gave up after the first look"
    peers = Peers([member(0, server.address)], node=1, deadlines=Deadlines())
    mine, account = ExpertStore([Layer(), Layer()]), Account()
    fill([Want(0, 3, 0)], mine, [peers], account)
    assert account.num_bytes == {"remote": 40}, "it is on another node"
    peers.close()
    server.close()


def test_members_are_asked_in_turn(store):
    """Each request goes to another one first, so that a newcomer loads all of them alike."""
    servers = [WeightServer("127.0.0.1") for _ in range(2)]
    asked: list[int] = []
    for number, server in enumerate(servers):
        receive = server._router.recv_multipart

        def told(number: int = number, receive=receive) -> list[bytes]:
            asked.append(number)
            return receive()

        server._router = SimpleNamespace(
            poll=server._router.poll, recv_multipart=told, send_multipart=server._router.send_multipart,
            close=server._router.close,
        )  # fmt: skip
        server.start(DENSE, store)
    peers = Peers([member(n, server.address) for n, server in enumerate(servers)], node=0, deadlines=Deadlines())
    greeted, asked[:] = sorted(asked), []
    for _ in range(4):
        assert peers.dense("norm", torch.empty(4).bfloat16())
    assert (greeted, sorted(asked)) == ([0, 1], [0, 0, 1, 1])
    peers.close()
    for server in servers:
        server.close()


def test_nobody_answers():
    peers = Peers([member(0, "tcp://127.0.0.1:9")], node=0, deadlines=replace(Deadlines(), weights_s=0.3))
    assert not peers.dense("norm", torch.empty(4).bfloat16())


def test_the_digests_of_the_group_count_not_ones_own():
    store = make_store()
    group = store.digests.copy()
    group[1, 2] += 1  # the group says other bytes
    group[0, 3] = UNKNOWN  # the group does not know
    assert store.trust(group) == 1
    assert store.held.tolist() == [[1, 3, EMPTY], [EMPTY, 0, EMPTY]]
    assert store.digests[1, 2] == group[1, 2]
    assert store.digests[0, 3] != UNKNOWN


OURS, THEIRS = Wire("the secret of this launch"), Wire("the secret of another launch")


def test_weights_go_to_and_come_from_those_who_know_the_secret_only(store):
    server = WeightServer("127.0.0.1", OURS)
    server.start(DENSE, store)
    deadlines = replace(Deadlines(), weights_s=0.3)
    for wire, right in [(PLAIN, False), (THEIRS, False), (OURS, True)]:
        peers, norm = Peers([member(0, server.address)], 1, deadlines, wire), torch.zeros(4).bfloat16()
        assert peers.dense("norm", norm) is right
        assert torch.equal(norm, DENSE["norm"]) is right
        peers.close()
    server.close()


@pytest.mark.parametrize("wire", [PLAIN, THEIRS, OURS])
def test_an_impostor_at_a_members_address_gives_nothing(wire):
    """Not even with what a member has said to another request."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as impostor:
        impostor.linger = 0
        address = f"tcp://127.0.0.1:{impostor.bind_to_random_port('tcp://127.0.0.1')}"
        header = msgspec.json.encode(WeightReply(["torch.float32"], [[1]], digest([torch.ones(1)]))).decode()

        def answer() -> None:
            for _ in range(2):
                sender, _ = impostor.recv_multipart()
                said = wire.seal(header, "another request").encode()
                impostor.send_multipart([sender, said, torch.ones(1).numpy().tobytes()])

        thread = threading.Thread(target=answer)
        thread.start()
        peers, out = Peers([member(0, address)], 1, replace(Deadlines(), weights_s=5.0), OURS), torch.zeros(1)
        assert not peers.dense("x", out)
        assert out.item() == 0
        thread.join()
        peers.close()


def test_nonsense_harms_no_weight_server(store):
    server, chance = WeightServer("127.0.0.1", OURS), random.Random(0)
    server.start(DENSE, store)
    word = OURS.seal(msgspec.json.encode(WeightRequest(name="norm")).decode(), server.address).encode()
    with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
        stranger.linger = 0
        stranger.connect(server.address)
        for _ in range(100):
            stranger.send_multipart([chance.randbytes(chance.randrange(60)) for _ in range(chance.randrange(1, 4))])
            stranger.send(word[: chance.randrange(len(word))])
        assert not stranger.poll(100)
        peers, norm = Peers([member(0, server.address)], 1, Deadlines(), OURS), torch.zeros(4).bfloat16()
        assert peers.dense("norm", norm)
        peers.close()
    server.close()
