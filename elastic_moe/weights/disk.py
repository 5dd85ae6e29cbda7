"""The checkpoint as a source: as this rank reads it, and as the other ranks do."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from queue import Empty, SimpleQueue
from typing import TypeVar

import numpy as np
import torch

from elastic_moe.background import start_thread
from elastic_moe.errors import CheckpointError
from elastic_moe.group.epoch_groups import EpochGroups
from elastic_moe.weights.sources import Asked, Came, Landing, Missed, Origin, Source, Told, Until, Want
from elastic_moe.weights.store import ExpertStore

ReadExpert = Callable[[int, int, Sequence[torch.Tensor]], int]
"""`read(layer, expert, out)` fills the tensors of an expert and returns the bytes read."""

_Item = TypeVar("_Item")
_Task = list[tuple[Want, Sequence[torch.Tensor]]]
READERS = {"cpu": 2, "cuda": 8}
"""By kind of device. Eight read the page cache at 20 GB/s (H200); with more, Python's lock is what they wait for."""
AHEAD = 2
"""Tasks that are done, or wait to be, of each reader."""
AT_ONCE = 8
"""Experts of a task: threads of Python give way to each other at each."""
BYTES_IN_FLIGHT = 1 << 28
"""On their way between ranks at once, one expert at least; bounds what is read beside the slots."""
NOBODY = -1
NO_SLOT = -1


class Disk(Source):
    """This rank's way to the checkpoint."""

    nearest = Origin.DISK

    def __init__(self, read: ReadExpert, num_readers: int = 1) -> None:
        """`read` raises CheckpointError or OSError when it cannot; `num_readers` threads call it at once."""
        self.read = read
        self._num_readers = num_readers

    def fetch(self, wants: Sequence[Want], landing: Landing, until: Until) -> Iterator[Told]:
        """See `Source.fetch`. When it is left, nobody reads any more."""
        if min(self._num_readers, len(wants)) <= 1:
            yield from ([self._read(want, landing.open(want))] for want in wants)
            return
        tasks, told = SimpleQueue[_Task | None](), SimpleQueue[Told | BaseException]()
        for number in range(self._num_readers):
            start_thread(f"disk {number}", self._serve, tasks, told, on_error=told.put)
        at_once = min(AT_ONCE, -(-len(wants) // self._num_readers))
        left, reading = (wants[begin : begin + at_once] for begin in range(0, len(wants), at_once)), 0
        try:
            while True:
                for some in islice(left, AHEAD * self._num_readers - reading):
                    task = [(want, landing.open(want)) for want in some]
                    device = task[0][1][0].device
                    if not reading and device.type == "cuda":  # whoever used what is overwritten has done so
                        torch.cuda.current_stream(device).synchronize()
                    tasks.put(task)
                    reading += 1
                if not reading:
                    return
                came: list[Came | Missed] = []
                done = [told.get(), *_there(told)]
                reading -= len(done)
                for one in done:
                    if isinstance(one, BaseException):
                        raise one
                    came += one
                yield came
        finally:
            reading -= sum(1 for _ in _there(tasks))
            for _ in range(reading):
                told.get()
            for _ in range(self._num_readers):
                tasks.put(None)

    def _serve(self, tasks: "SimpleQueue[_Task | None]", told: "SimpleQueue[Told | BaseException]") -> None:
        while task := tasks.get():
            told.put([self._read(want, out) for want, out in task])

    def _read(self, want: Want, out: Sequence[torch.Tensor]) -> Came | Missed:
        try:
            self.read(want.layer, want.expert, out)
        except (CheckpointError, OSError) as error:
            return Missed(want, str(error))
        return Came(want, Origin.DISK)


def _there(queue: "SimpleQueue[_Item]") -> Iterator[_Item]:
    """What is in the queue."""
    with contextlib.suppress(Empty):
        while True:
            yield queue.get_nowait()


class OtherDisks(Source):
    """What this rank's disk has wrong, another's may have right: each other member reads in turn for those who lack."""

    nearest = Origin.OTHER_DISK
    asked = Asked.IF_ANY_LACKS

    def __init__(self, disk: Disk, store: ExpertStore, groups: EpochGroups) -> None:
        """`disk` and `store` are this rank's; the digests of `store` are those of the group of `groups`."""
        self._disk = disk
        self._store = store
        self._groups = groups

    def fetch(self, wants: Sequence[Want], landing: Landing, until: Until) -> Iterator[Told]:
        """See `Source.fetch`. Turn by turn; all ranks tell what they lack, as int64 [L, E] of the positions of who."""
        group = self._groups.control
        for turn in range(1, group.size):
            mine = {(want.layer, want.expert): want for want in wants if not landing.has(want)}
            wanted = np.full(self._store.digests.shape, NOBODY, dtype=np.int64)
            for place in mine:
                wanted[place] = group.rank
            wanted = group.all_reduce_max_array(wanted)
            places = [(layer, expert) for layer, expert in np.argwhere(wanted != NOBODY).tolist()]
            at_once = max(1, BYTES_IN_FLIGHT // self._store.expert_bytes)
            for begin in range(0, len(places), at_once):
                targets = {place: int(wanted[place]) for place in places[begin : begin + at_once]}
                for place in self._pass_on(targets, turn, mine, landing):
                    yield [Came(mine[place], Origin.OTHER_DISK)]
        for want in wants:
            if not landing.has(want):
                yield [Missed(want, f"none of {group.size - 1} other ranks reads it right")]

    def _pass_on(
        self, targets: Mapping[tuple[int, int], int], turn: int, mine: Mapping[tuple[int, int], Want], landing: Landing
    ) -> list[tuple[int, int]]:
        """The member `turn` places behind each target reads, and sends what is right.

        Args:
            targets: position in the group of who is served, of those that want each (layer, expert).
            turn: 1 to the size of the group less 1.
            mine: what this rank lacks.
            landing: where to.

        Returns:
            What has come here.
        """
        group = self._groups.control
        read = {
            place: tensors
            for place, target in targets.items()
            if (target + turn) % group.size == group.rank and (tensors := self._read_aside(*place)) is not None
        }
        found = group.all_reduce_max([int(place in read) for place in targets])
        sends, receives, arriving = [], [], []
        for tag, ((place, target), there) in enumerate(zip(targets.items(), found, strict=True)):
            if place in read:
                sends += [(tensor, target, tag) for tensor in read[place]]
            elif there and target == group.rank:
                arriving.append(place)
                receives += [(tensor, (group.rank + turn) % group.size, tag) for tensor in landing.open(mine[place])]
        self._groups.data.exchange(sends, receives)
        return arriving

    def _read_aside(self, layer: int, expert: int) -> Sequence[torch.Tensor] | None:
        """An expert in tensors of its own; None unless it is right."""
        tensors = [torch.empty_like(tensor) for tensor in self._store.tensors(layer, 0)]
        try:
            self._disk.read(layer, expert, tensors)
        except (CheckpointError, OSError):
            return None
        right = self._store.are_right([Came(Want(layer, expert, NO_SLOT), Origin.DISK)], [tensors])
        return tensors if right[0] else None
