"""The store of an epoch: what one client puts the others get, waiting, late, replaced; strangers; its memory."""

import threading
import time
from datetime import timedelta

import msgspec
import pytest
import torch.distributed as dist
import zmq

from elastic_moe.group import epoch_store
from elastic_moe.group.epoch_store import EpochStore, StoreServer


@pytest.fixture
def server():
    return StoreServer("127.0.0.1")


def test_what_one_client_puts_another_gets_under_its_prefix(server):
    one, other = EpochStore(server.address, 5), EpochStore(server.address, 5)
    dist.PrefixStore("epoch", one).set("a", "text")
    one.set("epoch/b", b"\0bytes")
    assert dist.PrefixStore("epoch", other).multi_get(["b", "a"]) == [b"\0bytes", b"text"]
    one.set("epoch/a", "newer")
    assert one.get("epoch/a") == b"newer"
    other.wait(["epoch/a", "epoch/b"], timedelta(seconds=1))
    assert other.check(["epoch/a", "epoch/b"])
    assert not other.check(["epoch/a", "epoch/c"])


def test_who_asks_first_waits_for_the_value(server):
    got = []
    asker = threading.Thread(target=lambda: got.append(EpochStore(server.address, 5).multi_get(["late", "later"])))
    asker.start()
    store = EpochStore(server.address, 5)
    store.set("late", b"1")
    time.sleep(0.05)
    assert not got
    store.set("later", b"2")
    asker.join(5)
    assert got == [[b"1", b"2"]]


def test_a_value_that_does_not_come_is_an_error_that_names_it_and_the_client_goes_on(server):
    store = EpochStore(server.address, 0.1)
    with pytest.raises(dist.DistStoreError, match="no value of nowhere within"):
        store.get("nowhere")
    store.set("nowhere", b"x")
    store.set("here", b"y")
    assert store.get("here") == b"y", "the late answer to the question given up is not taken for this one's"


def test_nobody_there_is_an_error_within_the_time():
    with pytest.raises(dist.DistStoreError, match="no value of a within"):
        EpochStore("127.0.0.1:9", 0.1).get("a")


@pytest.mark.parametrize(
    "frame", [b"", b"GET / HTTP/1.1", msgspec.msgpack.encode({"type": "get", "keys": 3}), b"\x80\x04pickle"]
)
def test_strangers_harm_nobody(server, frame):
    stranger = zmq.Context.instance().socket(zmq.DEALER)
    stranger.connect(f"tcp://{server.address}")
    stranger.send(frame)
    store = EpochStore(server.address, 5)
    store.set("a", b"1")
    assert store.get("a") == b"1"
    stranger.close(linger=0)


def test_old_values_and_questions_are_forgotten(server, monkeypatch):
    monkeypatch.setattr(epoch_store, "KEEP_S", 0.5)
    store = EpochStore(server.address, 0.05)
    for epoch in range(100):
        store.set(f"{epoch}/a", b"x" * 100)
    with pytest.raises(dist.DistStoreError):
        store.get("nowhere")
    deadline = time.monotonic() + 5
    while list(server._kept) != ["now"] or server._waiting:  # at the next request after they are due
        assert time.monotonic() < deadline
        time.sleep(0.02)
        store.set("now", b"1")
        assert EpochStore(server.address, 5).get("now") == b"1"
