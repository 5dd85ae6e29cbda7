"""The backup daemon of a node: `python -m elastic_moe.backup.daemon --supervisor-fd N --segment-fd M`. Without torch.

    engines --ZMQ: experts of this node's share--> segment --(mapped)--> engines of this node
                                                      `--ZMQ, Mooncake--> engines of other nodes

It reads from the engines' own slots, in the background: so a copy has the engines' own form, and the digest of their
group. It looks again and again, and after every change of the group: what the engines hold with another digest, or what
has become this node's to keep, is read; what is no more, is dropped.
"""

import argparse
import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence

from elastic_moe.background import end_process, start_thread
from elastic_moe.backup.mooncake import RemoteMemory, remote_memory
from elastic_moe.backup.segment import Segment, Writer, parts_of
from elastic_moe.backup.shares import share
from elastic_moe.backup.start import BackupStart
from elastic_moe.group.view import View
from elastic_moe.memory.host import available_bytes
from elastic_moe.supervision.channel import Channel, Ready, ViewChanged
from elastic_moe.weights.holding import GiveExpert, Given, Holding, Shared
from elastic_moe.weights.host_digest import digest_of_bytes
from elastic_moe.weights.link import Link, greet
from elastic_moe.weights.server import NOTHING, Gift, WeightServer

ANSWER_S = 5.0
"""Who does not answer in time is asked for nothing more in this round."""
GREETING_S = 0.5
"""How much later than the first a member may say what it has."""
REFRESH_S = 10.0
"""From one look at what the engines hold to the next."""
UNKNOWN = -1
log = logging.getLogger(__name__)


class Shelf:
    """What the segment holds, for whoever asks; of an empty one, nothing."""

    def __init__(self, remote: RemoteMemory | None = None) -> None:
        """`remote`: by which other nodes read the memory by themselves, if they may."""
        self.segment: Segment | None = None
        self.remote = remote

    def holding(self) -> Holding:
        """See `server.Shelf`."""
        if self.segment is None:
            return Holding()
        shape, held = self.segment.shape, self.segment.held()
        if self.remote is None:
            return Holding(shape.form, shape.num_layers, shape.num_experts, held)
        records = [self.segment.find(layer, expert) for layer, expert, _ in held]
        places = [self.segment.address_of(record) if record else (0, 0) for record in records]
        return Holding(shape.form, shape.num_layers, shape.num_experts, held, {}, self.remote.session, places)

    def dense(self, name: str) -> Gift:
        """See `server.Shelf`: experts only are kept."""
        return NOTHING

    def share(self) -> Shared:
        """See `server.Shelf`: no GPU is known here."""
        return Shared()

    def expert(self, layer: int, expert: int) -> Gift:
        """See `server.Shelf`."""
        record = self.segment.find(layer, expert) if self.segment else None
        if self.segment is None or record is None:
            return NOTHING
        parts, data = self.segment.parts(layer), self.segment.bytes_of(record)
        header = Given([part.dtype for part in parts], [part.shape for part in parts], record.digest)
        return Gift(header, [data[part.begin : part.begin + part.size] for part in parts])


class Filler:
    """Keeps the segment as it has to be: one round after another, in a thread of its own."""

    def __init__(self, start: BackupStart, file: int, shelf: Shelf) -> None:
        self._config, self._node, self._wire = start.config, start.backup.node, start.wire.of_weights()
        self._file = file
        self._shelf = shelf
        self._writer: Writer | None = None
        self._view: View | None = None
        self._changed = threading.Event()
        self._complained = ""

    def set_view(self, view: View) -> None:
        """The members are these now. From any thread."""
        self._view = view
        self._changed.set()

    def run(self) -> None:
        """For ever."""
        self._find_again()
        while True:
            self._changed.wait(REFRESH_S)
            self._changed.clear()
            if self._view is None:
                continue
            try:
                self.fill(self._view)
            except OSError as error:
                self._complain(f"there is no memory for more: {error}")

    def fill(self, view: View) -> None:
        """One round: what is to be here, and is not or has another digest, is read from the members."""
        with self._links(view) as links:
            holdings = [link.holding for link in links if link.holding.experts]
            if not holdings:
                return
            shape = holdings[0]
            nodes = {member.node for member in view.members}
            mine = share(self._node, shape.num_layers, shape.num_experts, nodes, self._config.copies)
            right = {(layer, expert): said for holding in holdings for layer, expert, said in holding.experts}
            lacking = [place for place in sorted(mine) if place in right and not self._has(place, right[place], shape)]
            if self._writer is not None:
                for layer, expert, _ in self._writer.held():
                    if (layer, expert) not in mine:
                        self._writer.drop(layer, expert)
            begin, num_bytes = time.monotonic(), 0
            for number, place in enumerate(lacking):
                num_bytes += self._read(links, place, shape, len(mine))
                ahead_s = num_bytes / (self._config.gb_per_s * 1e9) - (time.monotonic() - begin)
                if self._changed.wait(max(0.0, ahead_s)) or self._complained:
                    log.debug("a round was broken off after %d of %d experts", number + 1, len(lacking))
                    return
            if num_bytes:
                seconds = time.monotonic() - begin
                gigabytes = num_bytes / 1e9
                log.info("%d experts (%.2f GB) are backed up, %.1f s", len(lacking), gigabytes, seconds)

    def _has(self, place: tuple[int, int], digest: int, shape: Holding) -> bool:
        if self._writer is None or self._writer.shape.form != shape.form:
            return False
        record = self._writer.find(*place)
        return record is not None and digest in (record.digest, UNKNOWN)

    def _read(self, links: Sequence[Link[None]], place: tuple[int, int], shape: Holding, num_mine: int) -> int:
        """One expert from whoever has it; returns its bytes, 0 if nobody gives it rightly."""
        request = GiveExpert(*place)
        for link in (link for link in links if link.has(request)):
            link.ask(request)
            if not link.socket.poll(int(1000 * ANSWER_S)):
                link.greeted(Holding())  # it has nothing for us any more
                continue
            _, given, frames = link.receive()
            if not isinstance(given, Given) or not frames:
                continue
            parts = parts_of(given, [len(frame) for frame in frames])
            size = parts[-1].begin + parts[-1].size
            writer = self._writer_for(shape, size, num_mine)
            if writer is None:
                return 0
            if writer.parts(place[0]) != parts:
                writer.set_parts(place[0], parts)
            memory = writer.begin(*place, size)
            for part, frame in zip(parts, frames, strict=True):
                memory[part.begin : part.begin + part.size] = frame.buffer
            if digest_of_bytes(memory[part.begin : part.begin + part.size] for part in parts) == given.digest:
                writer.commit(*place, given.digest)
                return size
            writer.drop(*place)
            log.warning("layer %d expert %d: %s gives other bytes than it says", *place, link.address)
        return 0

    def _writer_for(self, shape: Holding, size: int, num_mine: int) -> Writer | None:
        """The segment, made for experts of this form; None if it would be too large."""
        limit_gb = self._config.memory_limit_gb
        limit = available_bytes() if limit_gb is None else limit_gb * 1e9
        if self._writer is not None and self._writer.shape.form != shape.form:
            self._complain(f"the experts have the form {shape.form}, those kept have {self._writer.shape.form}")
            return None
        if self._writer is None:
            if num_mine * size > limit:
                key = f"backup.memory_limit_gb={limit_gb}" if limit_gb is not None else "the memory of this host"
                self._complain(
                    f"{key}: {num_mine} experts of node {self._node}'s share take {num_mine * size / 1e9:.2f} GB, and "
                    f"there is room for {limit / 1e9:.2f} GB: nothing is backed up here; give more, or fewer "
                    "backup.copies"
                )
                return None
            Segment.create(self._file, shape.form, shape.num_layers, shape.num_experts, size)
            self._use(Writer(self._file))
        return self._writer

    def _use(self, writer: Writer) -> None:
        if remote := self._shelf.remote:
            writer.on_arena = remote.register
        writer.map_all()
        self._writer = self._shelf.segment = writer

    def _find_again(self) -> None:
        """What an earlier life has left counts if it has its digest."""
        try:
            writer = Writer(self._file)
        except ValueError:
            return
        begin, wrong = time.monotonic(), 0
        for layer, expert, digest in writer.held():
            record = writer.find(layer, expert)
            data = writer.bytes_of(record) if record else memoryview(b"")
            parts = writer.parts(layer)
            if digest_of_bytes(data[part.begin : part.begin + part.size] for part in parts) != digest:
                writer.drop(layer, expert)
                wrong += 1
        self._use(writer)
        seconds, there = time.monotonic() - begin, len(writer.held())
        log.info("%d experts of an earlier life are there, %d were wrong, %.1f s", there, wrong, seconds)

    def _complain(self, line: str) -> None:
        if line != self._complained:
            log.error("backup: %s", line)
        self._complained = line

    @contextlib.contextmanager
    def _links(self, view: View) -> Iterator[list[Link[None]]]:
        """To all members that answer, those of this node first."""
        members = sorted(view.members, key=lambda member: member.node != self._node)
        links: list[Link[None]] = [Link(member.weights, self._wire) for member in members if member.weights]
        try:
            answered = greet(links, ANSWER_S, GREETING_S)
            yield [link for link in links if link in answered]
        finally:
            for link in links:
                link.close()


def main() -> None:
    """Keep the backup until the supervisor is gone."""
    parser = argparse.ArgumentParser(description="keeps this node's share of all experts in host memory")
    parser.add_argument("--supervisor-fd", type=int, required=True, help="this end of the channel to the supervisor")
    parser.add_argument("--segment-fd", type=int, required=True, help="the segment's file, which the supervisor keeps")
    fds = parser.parse_args()
    channel = Channel.of_child(fds.supervisor_fd, BackupStart | ViewChanged)
    start = channel.receive()
    if not isinstance(start, BackupStart):
        return
    logging.basicConfig(level=start.log_level.upper(), format="%(asctime)s backup %(levelname)s %(message)s")
    os.nice(NICE)
    host, _, port = start.backup.address.removeprefix("tcp://").rpartition(":")
    shelf = Shelf(remote_memory(start.config, host))
    filler = Filler(start, fds.segment_fd, shelf)
    server = WeightServer(host, start.wire.of_weights(), int(port))
    server.start(shelf)
    start_thread("filler", filler.run, on_error=end_process)
    channel.send(Ready(server.address))
    while isinstance(message := channel.receive(), ViewChanged):
        filler.set_view(message.view)


NICE = 10
"""Who serves goes first."""

if __name__ == "__main__":
    main()
