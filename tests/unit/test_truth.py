"""Copies that differ at the start: who is right, who is told, and when nobody can say."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.sources import EXPERTS, LAYERS, make_store, tensors_of, write
from support.wires import WireGroup, Wires

from elastic_moe.control.settle import settle
from elastic_moe.group.view import Member, View
from elastic_moe.weights import manifest as manifest_module
from elastic_moe.weights.digest import digest
from elastic_moe.weights.disk import Disk
from elastic_moe.weights.manifest import DigestFile
from elastic_moe.weights.reserves import Reserves
from elastic_moe.weights.sources import Came, Origin
from elastic_moe.weights.truth import UNKNOWN, Undecided, agree

GOALS = ((0, 1), (2, 3), (0, 2), (1, 3))
"""By rank, in every layer: each expert twice."""


def votes(
    rows: Sequence[Sequence[int]], nodes: Sequence[int], earlier: Sequence[int] | None = None, held: Any = None
) -> list[Any]:
    """What `agree` returns or raises on each rank, whose disk says `rows[rank]`."""
    wires = Wires(len(rows))

    def of(rank: int) -> Any:
        mine = np.array(rows[rank] if held is None else held[rank])
        before = np.full(len(mine), UNKNOWN) if earlier is None else np.array(earlier)
        group: Any = WireGroup(wires, rank)
        return agree(group, mine, lambda thing: rows[rank][thing], nodes, before, lambda thing: f"thing {thing}")

    with ThreadPoolExecutor(len(rows)) as pool:
        running = [pool.submit(of, rank) for rank in range(len(rows))]
        return [one.exception() or one.result() for one in running]


@pytest.mark.parametrize("wrong", [3, 900], ids=["smaller", "larger"])
def test_most_disks_are_right_whatever_the_number(wrong: int):
    for found in votes([[7, 40], [7, wrong], [7, 40]], nodes=[0, 1, 2]):
        assert found.digests.tolist() == [7, 40]
        assert found.wrong == {1: (1,)}


def test_a_disk_has_one_vote_however_many_ranks_read_it():
    (found, *_) = votes([[3], [3], [3], [40], [40]], nodes=[0, 0, 0, 1, 2])
    assert found.digests.tolist() == [40]
    assert found.wrong == {0: (0, 1, 2)}


def test_an_earlier_start_decides_between_two_and_speaks_where_there_is_one_copy():
    (found, *_) = votes([[5, 6, 7, 9], [5, 6, 7, 40]], nodes=[0, 1], earlier=[5, 6, 7, 40])
    assert (found.digests.tolist(), found.wrong) == ([5, 6, 7, 40], {3: (0,)})
    held = [[5, 6, 9, UNKNOWN], [UNKNOWN, UNKNOWN, UNKNOWN, 8]]
    (found, *_) = votes([[5, 6, 9, 8], [5, 6, 7, 8]], nodes=[0, 1], earlier=[5, 6, 7, 8], held=held)
    assert (found.digests.tolist(), found.wrong) == ([5, 6, 7, 8], {2: (0,)}), "nobody else held it"


def test_two_that_differ_are_undecided_on_all_ranks():
    for raised in votes([[5], [6]], nodes=[0, 1]):
        assert isinstance(raised, Undecided)
        assert "the copies of thing 0 differ" in str(raised)
        assert "node 0" in str(raised)


def test_one_file_against_an_earlier_start_is_undecided_but_new_weights_are_new():
    (raised,) = votes([[5, 6, 7]], nodes=[0], earlier=[5, 6, 8])
    assert isinstance(raised, Undecided)
    (found,) = votes([[5, 6, 7]], nodes=[0], earlier=[1, 2, 8])
    assert (found.digests.tolist(), found.wrong) == ([5, 6, 7], {})


def test_a_first_read_that_was_torn_is_read_again():
    held = [[5], [6]]
    (found, *_) = votes([[5], [5]], nodes=[0, 1], held=held)
    assert (found.digests.tolist(), found.wrong) == ([5], {0: ()})


def start(
    folders: Sequence[Path], bad_experts: dict[int, tuple[int, int]], bad_dense: Sequence[int] = (), keep: bool = True
) -> list[Any]:
    """A start of four ranks on two nodes. `bad_experts`: node -> (layer, expert) that is wrong in its files.

    Returns by rank (store, dense), or what was raised.
    """
    wires, nodes = Wires(4), (0, 0, 1, 1)
    members = tuple(Member(rank, nodes[rank], f"{rank}", 1, f"host{nodes[rank]}", "", "") for rank in range(4))

    def read_of(node: int):
        def read(layer: int, expert: int, out: Sequence[torch.Tensor]) -> int:
            size = write(layer, expert, out)
            if bad_experts.get(node) == (layer, expert):
                out[0][1] += 1
            return size

        return read

    def of(rank: int) -> Any:
        group: Any = WireGroup(wires, rank)
        groups: Any = SimpleNamespace(control=group, data=group)
        store, disk = make_store(knows_digests=False), Disk(read_of(nodes[rank]))
        goal = np.tile(np.array(GOALS[rank], dtype=np.int32), (LAYERS, 1))
        for want in store.wants(goal):
            disk.read(want.layer, want.expert, store.open(want))
            assert store.accept([Came(want, Origin.DISK)]) == [True]
        dense = {"b": torch.arange(5.0).bfloat16(), "a": torch.ones(2, 3)}
        if nodes[rank] in bad_dense:
            dense["b"][4] = 9
        kept = DigestFile(folders[nodes[rank]], "headers", "form") if keep else None
        settle(View(1, members), groups, goal, store, Reserves(disk), dense, kept)
        return store, dense

    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(of, rank) for rank in range(4)]
        return [one.exception() or one.result() for one in running]


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    monkeypatch.setattr(manifest_module, "CACHE", tmp_path / "cache")
    for node in range(2):
        (tmp_path / f"{node}").mkdir()
    return [tmp_path / f"{node}" for node in range(2)]


def is_right(found: Any, rank: int) -> bool:
    store, dense = found
    assert store.held.tolist() == [list(GOALS[rank])] * LAYERS
    assert torch.equal(dense["b"], torch.arange(5.0).bfloat16())
    assert torch.equal(dense["a"], torch.ones(2, 3))
    wanted = np.array([[digest(tensors_of(layer, expert)) for expert in range(EXPERTS)] for layer in range(LAYERS)])
    assert np.array_equal(store.digests, wanted)
    return all(
        torch.equal(mine, right)
        for layer in range(LAYERS)
        for slot, expert in enumerate(GOALS[rank])
        for mine, right in zip(store.tensors(layer, slot), tensors_of(layer, expert), strict=True)
    )


def test_a_start_keeps_its_digests_and_a_later_one_mends_what_went_bad(folders, caplog):
    assert all(is_right(found, rank) for rank, found in enumerate(start(folders, {})))
    assert [path.name for folder in folders for path in folder.iterdir()] == ["elastic_moe_digests.json"] * 2
    for node, other in ((0, 1), (1, 0)):
        caplog.clear()
        found = start(folders, {node: (1, 2)}, bad_dense=[other])
        assert all(is_right(one, rank) for rank, one in enumerate(found))
        assert f"wrong in the checkpoint of node {node} (host{node}): layer 1 expert 2; the right bytes" in caplog.text
        assert f"wrong in the checkpoint of node {other} (host{other}): b; the right bytes" in caplog.text


def test_without_an_earlier_start_two_nodes_that_differ_do_not_serve(folders):
    for raised in start(folders, {1: (0, 1)}):
        assert isinstance(raised, Undecided)
        assert "layer 0 expert 1" in str(raised)
    assert not any(folder.iterdir() for folder in folders if any(folder.iterdir()))


def test_a_folder_that_cannot_be_written_has_its_digests_in_the_cache(folders, monkeypatch):
    gone = [folder / "read-only" / "x" for folder in folders]
    for path in folders:
        (path / "read-only").write_text("a file where a folder would have to be made")
    start(gone, {})
    assert len(list(manifest_module.CACHE.iterdir())) == 1
    assert all(is_right(found, rank) for rank, found in enumerate(start(gone, {0: (0, 0)})))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"headers": 3}', "null"])
def test_a_file_of_digests_that_cannot_be_read_is_none(folders, text: str):
    kept = DigestFile(folders[0], "headers", "form")
    (folders[0] / "elastic_moe_digests.json").write_text(text)
    assert kept.load() is None
    kept.save([1, 2])
    assert kept.load().tolist() == [1, 2]  # pyright: ignore[reportOptionalMemberAccess]
