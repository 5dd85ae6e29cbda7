"""What a rank holds: which slots lie, which digests count, what idle time finds; and what waits beside the slots."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.sources import EXPERTS, LAYERS, NUM_BYTES, SLOTS, make_store, tensors_of, write
from test_sources import together

from elastic_moe.control.vote import Vote
from elastic_moe.placement.placement import EMPTY
from elastic_moe.weights import store as store_module
from elastic_moe.weights.digest import digest
from elastic_moe.weights.disk import Disk, OtherDisks
from elastic_moe.weights.sources import Account, Origin, Want, fill
from elastic_moe.weights.staged import Staged
from elastic_moe.weights.store import UNKNOWN, ExpertStore

PLACED = np.array([[2, 3], [2, 3]])


def test_slots_that_hold_what_is_placed_are_whole():
    store = make_store([2, 3])
    for _ in range(2 * LAYERS * SLOTS):
        store.check_integrity(PLACED)
    empty = make_store()
    empty.check_integrity(np.full((LAYERS, SLOTS), EMPTY))


def test_a_slot_that_holds_another_expert_is_found():
    with pytest.raises(ValueError, match="layer 1 slot 0 holds expert 2, but 1 is placed there"):
        make_store([2, 3]).check_integrity(np.array([[2, 3], [1, 3]]))


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("slot", range(SLOTS))
def test_bytes_that_change_are_found_within_a_round_of_checks(layer: int, slot: int):
    store = make_store([2, 3])
    store.tensors(layer, slot)[1][0] += 1
    said = []
    for _ in range(LAYERS * SLOTS):
        try:
            store.check_integrity(PLACED)
        except ValueError as error:
            said.append(str(error))
    assert said == [f"layer {layer} expert {2 + slot} in slot {slot} has changed: its digest is another one"]


def test_experts_in_training_may_change():
    store = ExpertStore(make_store([2, 3]).layers, PLACED, trains=True)
    store.record_digests()
    before = store.digests.copy()
    store.tensors(0, 0)[0] += 1
    for _ in range(LAYERS * SLOTS):
        store.check_integrity(PLACED)
    store.record_digests()
    changed = store.digests != before
    assert np.argwhere(changed).tolist() == [[0, 2]]


def test_a_digest_that_is_known_is_not_computed_again():
    store = make_store([2, 3])
    store.tensors(0, 0)[0] += 1
    store.record_digests()
    assert store.digests[0, 2] == digest(tensors_of(0, 2))


def test_only_experts_that_are_held_get_digests():
    store = make_store([2, 3], knows_digests=False)
    store.record_digests()
    assert (store.digests != UNKNOWN).tolist() == [[False, False, True, True]] * LAYERS


def test_what_lacks_is_wanted_and_nothing_else():
    store = make_store([2, EMPTY])
    assert store.wants(PLACED) == [Want(0, 3, 1), Want(1, 3, 1)]
    assert store.wants(np.array([[2, EMPTY], [EMPTY, 2]])) == [Want(1, 2, 1)]


def test_slots_that_are_given_up_are_counted():
    store = make_store([2, 3])
    group = store.digests.copy()
    group[:, 3] += 1
    assert store.trust(group) == LAYERS
    assert store.held.tolist() == [[2, EMPTY]] * LAYERS


def test_more_slots_are_empty_and_the_old_ones_stay():
    store, asked = make_store([2, 3]), []
    for layer in store.layers:
        layer.resize = asked.append  # type: ignore[method-assign]
    store.resize(SLOTS)
    assert not asked, "as many as before"
    store.resize(SLOTS + 2)
    assert asked == [SLOTS + 2] * LAYERS
    assert store.held.tolist() == [[2, 3, EMPTY, EMPTY]] * LAYERS
    assert store.num_slots == SLOTS + 2


def test_without_memory_for_more_slots_all_are_as_before():
    store = make_store([2, 3])
    layer: Any = store.layers[1]
    right, sizes = layer.resize, []

    def resize(num_slots: int) -> None:
        sizes.append(num_slots)
        if num_slots > SLOTS:
            raise torch.OutOfMemoryError("CUDA out of memory")
        right(num_slots)

    layer.resize = resize
    with pytest.raises(torch.OutOfMemoryError):
        store.resize(SLOTS + 1)
    assert sizes == [SLOTS + 1, SLOTS]
    assert [len(layer.first) for layer in store.layers] == [SLOTS] * LAYERS  # pyright: ignore[reportAttributeAccessIssue]
    assert store.held.tolist() == [[2, 3]] * LAYERS
    store.check_integrity(PLACED)


def test_fewer_slots_keep_what_is_in_the_first():
    store = make_store([2, 3])
    store.resize(1)
    assert store.held.tolist() == [[2]] * LAYERS
    assert torch.equal(store.tensors(1, 0)[0], tensors_of(1, 2)[0])


@pytest.mark.parametrize(("slots_free", "room"), [(0, 0), (SLOTS, 0), (SLOTS + LAYERS, 1), (SLOTS + 3.5 * LAYERS, 3)])
def test_for_how_many_slots_there_is_room(monkeypatch: pytest.MonkeyPatch, slots_free: float, room: int):
    """In every layer, and a layer beside them while it is copied."""
    monkeypatch.setattr(store_module, "free_bytes", lambda _device: int(NUM_BYTES * slots_free))
    assert make_store([2, 3]).room() == SLOTS + room


def test_what_waits_beside_the_slots_leaves_them_alone_until_it_is_installed():
    store = make_store([0, 1])
    staged, account, want = Staged(store), Account(), Want(1, 3, 0)
    assert not staged.has(want)
    fill([want], staged, [Disk(write)], account)
    assert staged.has(want)
    assert not staged.has(Want(0, 3, 0))
    assert account.num_bytes == {Origin.DISK: NUM_BYTES}
    assert store.held.tolist() == [[0, 1]] * LAYERS
    assert torch.equal(store.tensors(1, 0)[0], tensors_of(1, 0)[0])
    staged.install()
    assert store.held.tolist() == [[0, 1], [3, 1]]
    assert torch.equal(store.tensors(1, 0)[0], tensors_of(1, 3)[0])


@pytest.mark.parametrize("right", [0, 1])
def test_of_three_disks_the_one_that_is_right_serves(right: int):
    """Rank 2 lacks an expert; of the two others only `right` reads it as it is."""
    origins = []

    def disk_of(rank: int) -> Disk:
        def read(layer: int, expert: int, out: Any) -> int:
            write(layer, expert, out)
            if rank != right:
                out[0][0] += 1
            else:
                origins.append(rank)
            return NUM_BYTES

        return Disk(read)

    def act(group: Any, wants: list[Want]) -> ExpertStore:
        store, account = make_store(), Account()
        groups: Any = SimpleNamespace(control=group, data=group)
        disk = disk_of(group.rank)
        fill(wants, store, [disk, OtherDisks(disk, store, groups)], account, any_lacks=Vote(group, account))
        return store

    store = together("", lambda group: act(group, []), lambda group: act(group, [Want(1, 2, 0)]), 0, size=3)
    assert store.held[1, 0] == 2
    assert torch.equal(store.tensors(1, 0)[0], tensors_of(1, 2)[0])
    assert set(origins) == {right}
    assert EXPERTS > 2
