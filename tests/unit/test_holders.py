"""Weights from a running process, over real sockets in one process; and whose digests count."""

import random
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import zmq
from support.sources import make_store, tensors_of

from elastic_moe.deadlines import Deadlines
from elastic_moe.group.view import Member, View
from elastic_moe.weights import server as server_module
from elastic_moe.weights.digest import digest
from elastic_moe.weights.holders import IN_FLIGHT, Holder, Holders, other_members
from elastic_moe.weights.holding import GiveDense, Given, encode
from elastic_moe.weights.server import Gift, WeightServer
from elastic_moe.weights.shelf import EngineShelf
from elastic_moe.weights.sources import Account, Missed, Origin, Until, Want, fill
from elastic_moe.weights.store import UNKNOWN, ExpertStore
from elastic_moe.wire import PLAIN, Wire

DENSE = {
    "embed.weight": torch.randn(5, 3),
    "norm": torch.randn(4).bfloat16(),
    "scalar": torch.tensor(2.5),
    "apart": torch.randn(3, 5).T,
    "empty": torch.empty(0, 3),
}
NOBODY = "tcp://127.0.0.1:9"
QUICK = replace(Deadlines(), weights_s=0.3, greeting_s=0.1)


class Shelf(EngineShelf):
    """That of an engine, with what a test does to it."""

    def __init__(self, store: ExpertStore, form: str = "") -> None:
        super().__init__(store, DENSE, form)
        self.asked: list[tuple[int, int]] = []
        self.spoil = 0
        self.delay_s = 0.0

    def expert(self, layer: int, expert: int) -> Gift:
        self.asked.append((layer, expert))
        time.sleep(self.delay_s)
        return self._spoilt(super().expert(layer, expert))

    def dense(self, name: str) -> Gift:
        return self._spoilt(super().dense(name))

    def _spoilt(self, gift: Gift) -> Gift:
        if self.spoil <= 0 or not gift.frames:
            return gift
        self.spoil -= 1
        first = bytes([gift.frames[0][0] ^ 1]) + bytes(gift.frames[0][1:])
        return gift._replace(frames=[memoryview(first), *gift.frames[1:]])


class Group:
    """Holders of one group, in threads."""

    def __init__(self) -> None:
        self.servers: list[WeightServer] = []

    def add(self, shelf: EngineShelf, wire: Wire = PLAIN) -> Holder:
        self.servers.append(WeightServer("127.0.0.1", wire))
        self.servers[-1].start(shelf)
        return Holder(self.servers[-1].address, Origin.NODE, wire)


@pytest.fixture
def group() -> Iterator[Group]:
    group = Group()
    yield group
    for server in group.servers:
        server.close()


def dense_of(holders: Holders, *names: str) -> dict[str, torch.Tensor]:
    """What comes of these dense tensors."""
    out = {name: torch.zeros_like(DENSE[name]) for name in names}
    return {name: out[name] for name in holders.dense(out)}


def is_right(store: ExpertStore, want: Want) -> bool:
    found = store.tensors(want.layer, want.slot)
    right = tensors_of(want.layer, want.expert)
    return store.has(want) and all(torch.equal(a, b) for a, b in zip(found, right, strict=True))


def test_dense_tensors_arrive_from_whoever_lives(group):
    holders = Holders([Holder(NOBODY, Origin.NODE), group.add(Shelf(make_store([2, 3])))], QUICK)
    came = dense_of(holders, *DENSE)
    assert came.keys() == DENSE.keys()
    assert all(torch.equal(came[name], DENSE[name]) for name in DENSE)
    assert holders.dense_bytes == sum(t.numel() * t.element_size() for t in DENSE.values())
    assert not list(holders.dense({"no such tensor": torch.empty(1)}))
    holders.close()


@pytest.mark.parametrize(
    "out", [torch.empty(4), torch.empty(3).bfloat16(), torch.empty(2, 2).bfloat16()], ids=["dtype", "size", "shape"]
)
def test_what_does_not_fit_is_refused(group, out):
    holders = Holders([group.add(Shelf(make_store([2, 3])))], QUICK)
    assert not list(holders.dense({"norm": out}))


def test_experts_arrive_and_what_nobody_has_is_missed(group):
    shelf = Shelf(make_store([2, 3]))
    holders, mine, account = Holders([group.add(shelf)], QUICK), make_store(), Account()
    fill([Want(1, 2, 0), Want(0, 3, 1)], mine, [holders], account)
    assert is_right(mine, Want(1, 2, 0))
    assert is_right(mine, Want(0, 3, 1))
    assert account.num_bytes[Origin.NODE] == 2 * mine.num_bytes(Want(0, 0, 0))
    told = [one for some in holders.fetch([Want(1, 0, 0)], mine, Until()) for one in some]
    assert told == [Missed(Want(1, 0, 0), "none of 1 holders that answer has it right")]
    assert (1, 0) not in shelf.asked, "it has said what it has"


def test_what_moves_while_it_is_read_is_found_where_it_went(group):
    """It is greeted, then loses an expert to another, which is greeted again then."""
    here, there = make_store([2, 3]), make_store([0, 1])
    holders = Holders([group.add(Shelf(here)), group.add(Shelf(there))], QUICK)
    for layer, slot in ((0, 0), (1, 0)):
        expert = int(here.held[layer, slot])
        for target, source in zip(there.vacate(layer, slot), tensors_of(layer, expert), strict=True):
            target.copy_(source)
        there.held[layer, slot] = expert
        here.vacate(layer, slot)
    mine = make_store()
    fill([Want(0, 2, 0), Want(1, 2, 1)], mine, [holders], Account())
    assert is_right(mine, Want(0, 2, 0))
    assert is_right(mine, Want(1, 2, 1))


def test_an_empty_slot_and_nonsense_are_given_to_nobody():
    shelf = EngineShelf(make_store([2, 3]))
    for layer, expert in ((0, -1), (0, 0), (7, 2), (-1, 2), (0, 99)):
        assert shelf.expert(layer, expert) == server_module.NOTHING
    assert shelf.dense("x") == server_module.NOTHING


def test_bytes_that_change_on_their_way_are_read_again_and_another_copy_serves(group):
    bad, good = Shelf(make_store([2, 3])), Shelf(make_store([2, 3]))
    bad.spoil = 99
    holders, mine, account = Holders([group.add(bad)], QUICK), make_store(), Account()
    told = [one for some in holders.fetch([Want(0, 2, 0)], mine, Until()) for one in some]
    assert len(bad.asked) == 2, "once more when all were greeted again"
    assert isinstance(told[-1], Missed)
    assert not dense_of(holders, "norm")
    holders.close()
    bad.spoil = 1
    holders = Holders([group.add(bad)], QUICK)
    fill([Want(0, 2, 0)], mine, [holders], account)
    assert account.rejected == 1
    holders.close()
    bad.spoil, bad.asked = 99, []
    holders, account = Holders([group.add(bad), group.add(good)], QUICK), Account()
    wants = [Want(0, 2, 0), Want(0, 3, 1), Want(1, 2, 0), Want(1, 3, 1)]
    fill(wants, mine := make_store(), [holders], account)
    assert all(is_right(mine, want) for want in wants)
    assert account.rejected > 0
    holders.close()


def test_the_load_is_spread_and_the_nearest_are_asked_first(group):
    shelves = [Shelf(make_store([2, 3])) for _ in range(3)]
    near = [group.add(shelf) for shelf in shelves[:2]]
    far = group.add(shelves[2])._replace(origin=Origin.REMOTE)
    holders, account = Holders([far, *near], QUICK), Account()
    assert holders.nearest is Origin.NODE
    fill([Want(layer, expert, expert - 2) for layer in (0, 1) for expert in (2, 3)], make_store(), [holders], account)
    assert [len(shelf.asked) for shelf in shelves] == [2, 2, 0]


def test_one_that_falls_silent_in_the_middle_holds_nobody_up_for_long(group):
    silent, other = Shelf(make_store([2, 3])), Shelf(make_store([2, 3]))
    holders = Holders([group.add(silent), group.add(other)], QUICK)
    silent.delay_s, begin = 60.0, time.monotonic()
    wants = [Want(0, 2, 0), Want(0, 3, 1), Want(1, 2, 0), Want(1, 3, 1)]
    fill(wants, mine := make_store(), [holders], Account())
    assert all(is_right(mine, want) for want in wants)
    assert time.monotonic() - begin < 5
    assert len(silent.asked) == 1


def test_few_requests_wait_at_a_holder(group):
    """What one does not come to is had from another soon."""
    store, largest = make_store([2, 3]), 0
    holders = Holders([group.add(Shelf(store))], QUICK)
    (link,) = holders._links
    ask = link.ask

    def counted(*args: object) -> None:
        nonlocal largest
        ask(*args)
        largest = max(largest, len(link.asked))

    link.ask = counted  # type: ignore[method-assign]
    wants = [Want(layer, expert, expert - 2) for layer in (0, 1) for expert in (2, 3)] * 5
    for _ in holders.fetch(wants, make_store(), Until()):
        pass
    assert largest == IN_FLIGHT


def test_only_weights_of_the_same_form_count(group):
    here = group.add(Shelf(make_store([2, 3]), form="bf16"))
    other = Holders([here], QUICK, form="fp32")
    assert (other.holdings, other.refused) == ([], ["bf16"])
    same = Holders([here], QUICK, form="bf16")
    assert len(same.holdings) == 1
    other.close()
    same.close()


def test_when_instances_differ_the_first_says_what_is_right(group):
    ours, theirs = make_store([2, 3]), make_store([2, 3])
    theirs.digests = theirs.digests + 1
    theirs.digests[1, 3] = UNKNOWN
    holders = Holders([group.add(Shelf(ours)), group.add(Shelf(theirs))], QUICK)
    mine = make_store(knows_digests=False)
    holders.tell_truth(mine)
    first = holders.holdings[0].experts
    assert all(mine.digests[layer, expert] in (said, ours.digests[layer, expert]) for layer, expert, said in first)
    assert set(mine.digests[:, :2].ravel().tolist()) == {UNKNOWN}


def test_members_of_ones_node_are_nearer():
    me, same, other = (Member(r, n, "x", 1, "h", "", "", weights=f"tcp://h:{r}") for r, n in ((0, 0), (1, 0), (2, 1)))
    mute = Member(3, 0, "x", 1, "h", "", "")
    found = other_members(View(1, (me, same, other, mute)), me, Wire("the secret of this launch"))
    assert [(h.address, h.origin) for h in found] == [("tcp://h:1", Origin.NODE), ("tcp://h:2", Origin.REMOTE)]
    assert found[0].wire.secret not in ("", "the secret of this launch")


def test_garbage_does_not_end_the_server(group):
    holder = group.add(Shelf(make_store([2, 3])))
    holders = Holders([holder], QUICK)
    with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
        stranger.connect(holder.address)
        for frames in ([b""], [b"\xff"], [b"a", b"b"], [b'{"type":"expert","layer":"x"}']):
            stranger.send_multipart(frames)
    assert dense_of(holders, "norm")


def test_a_server_that_nobody_asks_for_a_while_still_answers(monkeypatch, group):
    monkeypatch.setattr(server_module, "POLL_MS", 5)
    holder = group.add(Shelf(make_store([2, 3])))
    time.sleep(0.1)
    assert dense_of(Holders([holder], QUICK), "norm")


def test_nobody_answers():
    holders = Holders([Holder(NOBODY, Origin.NODE)], QUICK)
    assert not holders.holdings
    assert not dense_of(holders, "norm")
    assert not Holders([], QUICK).holdings


def test_the_digests_of_the_group_count_not_ones_own():
    store = make_store([2, 3])
    group = store.digests.copy()
    group[1, 2] += 1  # the group says other bytes
    group[0, 3] = UNKNOWN  # the group does not know
    assert store.trust(group) == 1
    assert store.held.tolist() == [[2, 3], [-1, 3]]
    assert store.digests[1, 2] == group[1, 2]
    assert store.digests[0, 3] != UNKNOWN


OURS, THEIRS = Wire("the secret of this launch"), Wire("the secret of another launch")


def test_weights_go_to_and_come_from_those_who_know_the_secret_only(group):
    holder = group.add(Shelf(make_store([2, 3])), OURS)
    for wire, right in [(PLAIN, False), (THEIRS, False), (OURS, True)]:
        holders = Holders([holder._replace(wire=wire)], QUICK)
        assert bool(dense_of(holders, "norm")) is right
        holders.close()


@pytest.mark.parametrize("wire", [PLAIN, THEIRS, OURS])
def test_an_impostor_at_a_members_address_gives_nothing(wire):
    """Not even with what a member has said to another request."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as impostor:
        impostor.linger = 0
        address = f"tcp://127.0.0.1:{impostor.bind_to_random_port('tcp://127.0.0.1')}"
        header = encode(Given(["torch.float32"], [[1]], digest([torch.ones(1)]))).decode()

        def answer() -> None:
            for _ in range(2):
                if impostor.poll(2000):
                    sender, _ = impostor.recv_multipart()
                    said = wire.seal(header, "another request").encode()
                    impostor.send_multipart([sender, said, torch.ones(1).numpy().tobytes()])

        thread = threading.Thread(target=answer)
        thread.start()
        holders, out = Holders([Holder(address, Origin.NODE, OURS)], QUICK), torch.zeros(1)
        assert not list(holders.dense({"x": out}))
        assert out.item() == 0
        thread.join()
        holders.close()


def test_nonsense_harms_no_weight_server(group):
    holder, chance = group.add(Shelf(make_store([2, 3])), OURS), random.Random(0)
    word = OURS.seal(encode(GiveDense("norm")).decode(), holder.address).encode()
    with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
        stranger.linger = 0
        stranger.connect(holder.address)
        for _ in range(100):
            stranger.send_multipart([chance.randbytes(chance.randrange(60)) for _ in range(chance.randrange(1, 4))])
            stranger.send(word[: chance.randrange(len(word))])
        assert not stranger.poll(100)
        assert dense_of(Holders([holder], QUICK), "norm")
