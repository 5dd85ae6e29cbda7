"""Backups as sources: that of this node is memory that this process maps, those of others are asked for bytes."""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from elastic_moe.backup.mooncake import remote_memory
from elastic_moe.backup.remote import GREET_S, MooncakeMemory
from elastic_moe.backup.segment import Part, Record, Segment
from elastic_moe.config import BackupConfig
from elastic_moe.deadlines import Deadlines
from elastic_moe.group.view import Member, View
from elastic_moe.pulse import Pulse
from elastic_moe.weights.holders import Holder
from elastic_moe.weights.reserves import FoundHolders
from elastic_moe.weights.sources import Came, Landing, Missed, Origin, Source, Told, Until, Want
from elastic_moe.wire import Wire

AT_ONCE = 16
"""Experts that are copied to a GPU before it is waited for."""
log = logging.getLogger(__name__)


def backups(
    config: BackupConfig,
    view: Callable[[], View],
    me: Member,
    wire: Wire,
    deadlines: Deadlines,
    form: str,
    pulse: Pulse,
) -> list[Source]:
    """All that `view` names at the time, as sources for the process `me`; `wire` is the launch's."""

    def path() -> str:
        return next((backup.segment for backup in view().backups if backup.node == me.node), "")

    def daemons() -> list[Holder]:
        of_weights = wire.of_weights()
        return [
            Holder(backup.address, Origin.DRAM if backup.node == me.node else Origin.REMOTE_DRAM, of_weights)
            for backup in view().backups
        ]

    by_mooncake = MooncakeMemory(
        lambda: [holder for holder in daemons() if holder.origin is Origin.REMOTE_DRAM],
        lambda: remote_memory(config, me.host),
        deadlines,
        form,
        pulse,
    )
    others = FoundHolders(Origin.REMOTE_DRAM, daemons, deadlines, form, pulse, greet_s=GREET_S)
    return [NodeMemory(path, form), *([by_mooncake] if config.transport == "mooncake" else []), others]


class NodeMemory(Source):
    """The segment of this node's backup. It is read whether its daemon lives or not."""

    nearest = Origin.DRAM

    def __init__(self, find: Callable[[], str], form: str) -> None:
        """`find` says where the segment is opened, empty while nobody knows; `form`: see `Holding.form`."""
        self._find = find
        self._form = form
        self._segment: Segment | None = None
        self._pinned: set[int] = set()
        self._stream: torch.cuda.Stream | None = None

    def fetch(self, wants: Sequence[Want], landing: Landing, until: Until) -> Iterator[Told]:
        """See `Source.fetch`."""
        path = self._find()
        if not path:
            return
        try:
            segment = self._segment = self._segment or _opened(path)
        except (OSError, ValueError) as error:
            yield [Missed(want, f"the backup of this node cannot be opened: {error}") for want in wants]
            return
        if segment.shape.form != self._form:
            yield [Missed(want, "the backup of this node has another form") for want in wants]
            return
        for begin in range(0, len(wants), AT_ONCE):
            told: list[Came | Missed] = []
            for want in wants[begin : begin + AT_ONCE]:
                record = segment.find(want.layer, want.expert)
                if record is None or not self._copy(segment, record, segment.parts(want.layer), landing.open(want)):
                    told.append(Missed(want, "it is not in the backup of this node"))
                else:
                    told.append(Came(want, Origin.DRAM, record.digest))
            if self._stream is not None:
                self._stream.synchronize()
            yield told

    def _copy(self, segment: Segment, record: Record, parts: Sequence[Part], out: Sequence[torch.Tensor]) -> bool:
        """Whether it fits; on a GPU the copies are under way then."""
        if [(part.dtype, part.shape) for part in parts] != [(str(t.dtype), list(t.shape)) for t in out]:
            return False
        data = np.frombuffer(segment.bytes_of(record), dtype=np.uint8)
        device = out[0].device
        if device.type == "cuda":
            self._pin(segment, record.offset // segment.shape.arena_bytes)
            if self._stream is None:
                self._stream = torch.cuda.Stream(device)
                self._stream.wait_stream(torch.cuda.current_stream(device))  # whoever used what is overwritten
        with torch.cuda.stream(self._stream):
            for part, tensor in zip(parts, out, strict=True):
                found = torch.from_numpy(data[part.begin : part.begin + part.size])
                tensor.detach().copy_(found.view(tensor.dtype).view(tensor.shape), non_blocking=True)
        return True

    def _pin(self, segment: Segment, arena: int) -> None:
        """Once, so that a GPU reads it at the speed of its bus."""
        if arena in self._pinned:
            return
        self._pinned.add(arena)
        memory = np.frombuffer(segment.arena(arena), dtype=np.uint8)
        runtime: Any = torch.cuda.cudart()
        error = runtime.cudaHostRegister(memory.ctypes.data, memory.nbytes, 0)
        if int(error):
            log.warning("the backup's memory cannot be pinned (error %d): it is read more slowly", int(error))


def _opened(path: str) -> Segment:
    file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        return Segment(file)
    except ValueError:
        os.close(file)
        raise
