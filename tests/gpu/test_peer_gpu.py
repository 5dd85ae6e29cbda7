"""Experts out of the memory of another process's GPU, and out of pinned memory of the host."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from elastic_moe.deadlines import Deadlines
from elastic_moe.weights.holders import Holder, Holders
from elastic_moe.weights.peer_gpu import PeerGpus
from elastic_moe.weights.sources import Account, Origin, Until, fill
from elastic_moe.weights.store import ExpertStore

sys.path.insert(0, str(Path(__file__).parent))
from sharing_process import FORM, make_store

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
SIZE = (3, 8, 256, 128)
THERE = torch.cuda.device_count() - 1
"""Another GPU, if there is one."""


@pytest.fixture
def peer() -> Iterator[Holder]:
    command = [sys.executable, str(Path(__file__).parent / "sharing_process.py"), f"cuda:{THERE}", *map(str, SIZE)]
    repo = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [repo, os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert process.stdout is not None
    yield Holder(process.stdout.readline().strip(), Origin.NODE)
    process.communicate("")


def empty() -> ExpertStore:
    return make_store(*SIZE, torch.device("cuda:0"), full=False)


def has_all(store: ExpertStore) -> bool:
    right = make_store(*SIZE, torch.device("cpu"), full=True)
    places = [(layer, expert) for layer in range(SIZE[0]) for expert in range(SIZE[1])]
    return bool((store.held == right.held).all()) and all(
        torch.equal(found.cpu(), wanted)
        for place in places
        for found, wanted in zip(store.tensors(*place), right.tensors(*place), strict=True)
    )


def goal(store: ExpertStore) -> list:
    return store.wants(make_store(*SIZE, torch.device("cpu"), full=True).held)


def test_experts_and_dense_tensors_come_from_a_peers_gpu(peer: Holder):
    store, account = empty(), Account()
    gpus = PeerGpus(Origin.NODE, lambda: [peer], Deadlines(), FORM)
    fill(goal(store), store, [gpus], account)
    assert has_all(store)
    assert account.rejected == 0
    out = {"norm": torch.zeros(1000, device="cuda:0"), "absent": torch.zeros(3, device="cuda:0")}
    assert gpus.dense(out) == ["norm"]
    assert torch.equal(out["norm"].cpu(), torch.arange(1000.0))
    assert gpus.dense({"norm": torch.zeros(999, device="cuda:0")}) == []
    gpus.close()


def test_it_can_be_mapped_again(peer: Holder):
    for _ in range(3):
        store = empty()
        gpus = PeerGpus(Origin.NODE, lambda: [peer], Deadlines(), FORM)
        fill(goal(store), store, [gpus], Account())
        gpus.close()
        assert has_all(store)


def test_what_it_does_not_share_is_had_over_a_socket(peer: Holder):
    store, account = empty(), Account()
    other = PeerGpus(Origin.NODE, lambda: [peer], Deadlines(), "another form")
    holders = Holders([peer], Deadlines(), FORM)
    fill(goal(store), store, [other, holders], account)
    assert has_all(store)
    holders.close()


def test_bytes_that_another_digest_is_known_of_are_refused(peer: Holder):
    store = empty()
    store.digests[1, 2] = 7
    gpus = PeerGpus(Origin.NODE, lambda: [peer], Deadlines(), FORM)
    wants = goal(store)
    came = [one for told in gpus.fetch(wants, store, Until()) for one in told]
    right = store.accept(came)
    assert [one.want[:2] for one, ok in zip(came, right, strict=True) if not ok] == [(1, 2)]
