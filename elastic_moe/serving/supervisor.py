"""What the supervisor of one serving rank does: an engine in the seat, and on a node's first rank a front end."""

import contextlib
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import zmq

from elastic_moe.backup.start import BackupStart
from elastic_moe.config import ServeConfig
from elastic_moe.group.view import Backup, View
from elastic_moe.membership.launch import Launch, SeatStart, host_of
from elastic_moe.serving.protocol import Hello, Phase, Status, decode_to_front_end, encode
from elastic_moe.serving.starts import EngineStart, FrontEndStart
from elastic_moe.supervision.channel import Ready, ViewChanged
from elastic_moe.supervision.ports import lasting_port
from elastic_moe.supervision.rank_supervisor import BACKUP, SEAT, SPARE, RankSupervisor
from elastic_moe.supervision.supervisor import Child, Event, complain
from elastic_moe.wire import PLAIN, Wire

FRONT_END = "front end"
SPARE_AFTER_S = 5.0
"""A spare process is started so long after the process in the seat serves: its imports take a core for seconds."""
ANSWER_S = 1.0
"""How long an engine may take to say that it serves."""


class ServeSupervisor(RankSupervisor):
    """Owns the children of one rank of launch/serve.py."""

    def __init__(
        self, config: ServeConfig, launch: Launch, listener: socket.socket | None, attempt: Path | None = None
    ) -> None:
        """`listener` is the node's HTTP socket, on its first rank: it outlives every front end. `attempt` is a folder
        that the ranks of this node share for this start; see `complain`."""
        elastic = config.elastic
        deadlines = elastic.deadlines(launch.world_size)
        keeps_lighthouse = listener is not None and not elastic.lighthouse
        super().__init__(launch, deadlines, elastic.max_quick_deaths, keeps_lighthouse=keeps_lighthouse)
        self._config = config
        self._listener = listener
        self._keeps_spare = False
        self._segment: int | None = None
        if listener is not None and config.backup.mode == "on":
            host = host_of(launch)
            self._segment = os.memfd_create("elastic_moe_backup")  # it outlives every daemon
            path = f"/proc/{os.getpid()}/fd/{self._segment}"
            self._backup = Backup(launch.node, f"tcp://{host}:{lasting_port(host)}", path)
        self._attempt = attempt

    def run(self) -> int:
        """See the base; a user's mistake is told in one line at the end, when nothing else can hide it."""
        code = super().run()
        if self._refused:
            complain(self._refused, self._attempt)
        return code

    def start_process(self, start: SeatStart) -> Child:
        """See the base."""
        engine = self._supervisor.promote(SPARE, SEAT) or self._start_engine(SEAT)
        engine.send(EngineStart(start, self._config))
        return engine

    def services(self) -> dict[str, Callable[[], Child]]:
        """See the base."""
        own = {FRONT_END: self._start_front_end} if self._listener is not None else {}
        if self._segment is not None:
            own[BACKUP] = self._start_backup
        if self._keeps_spare:
            own[SPARE] = lambda: self._start_engine(SPARE)
        return super().services() | own

    def starts_at_once(self) -> bool:
        """See the base."""
        return self._supervisor.has(SPARE)

    def others_serve(self) -> bool:
        """See the base."""
        members = self._view.members if self._view else ()
        return anybody_serves([m.address for m in members if m.rank != self._launch.rank], self._launch.wire)

    def on_view(self, view: View) -> None:
        """See the base."""
        for name in (FRONT_END, BACKUP):
            if service := self._supervisor.children.get(name):
                service.send(ViewChanged(view))

    def on_message(self, event: Event) -> None:
        """See the base."""
        if not isinstance(event.message, Ready):
            return
        if event.child == SEAT:
            self._keeps_spare = self._config.elastic.keeps_spare(event.message.detail)
            if self._keeps_spare and not self._supervisor.has(SPARE):
                self.start_later(SPARE, SPARE_AFTER_S)
        elif event.child == FRONT_END:
            name, url = self._config.model.name, event.message.detail
            sys.stdout.write(f"elastic_moe: node {self._launch.node} serves {name} at {url}\n")
            sys.stdout.flush()

    def _start_engine(self, name: str) -> Child:
        """It imports what it needs, and waits for its `EngineStart`."""
        return self._supervisor.start(name, [sys.executable, "-m", "elastic_moe.serving.engine.engine"])

    def _start_front_end(self) -> Child:
        if self._listener is None:
            raise RuntimeError("only a node's first rank has a front end")
        fd = self._listener.fileno()
        command = [sys.executable, "-m", "elastic_moe.serving.front_end.process", "--listen-fd", str(fd)]
        front_end = self._supervisor.start(FRONT_END, command, pass_fds=[fd])
        front_end.send(FrontEndStart(self._config, self._launch.node, self._launch.wire))
        if self._view is not None:
            front_end.send(ViewChanged(self._view))
        return front_end

    def _start_backup(self) -> Child:
        if self._segment is None or self._backup is None:
            raise RuntimeError("there is no backup here")
        command = [sys.executable, "-m", "elastic_moe.backup.daemon", "--segment-fd", str(self._segment)]
        daemon = self._supervisor.start(BACKUP, command, pass_fds=[self._segment])
        daemon.send(BackupStart(self._config.backup, self._backup, self._launch.wire, self._config.log_level))
        if self._view is not None:
            daemon.send(ViewChanged(self._view))
        return daemon


def anybody_serves(addresses: Sequence[str], wire: Wire = PLAIN) -> bool:
    """Whether an engine at one of these endpoints says that it serves, within `ANSWER_S`."""
    context, poller = zmq.Context.instance(), zmq.Poller()
    with contextlib.ExitStack() as stack:
        for address in addresses:
            socket = wire.client(stack.enter_context(context.socket(zmq.DEALER)))
            socket.setsockopt(zmq.LINGER, 0)
            socket.connect(address)
            socket.send(encode(Hello("supervisor")))
            poller.register(socket, zmq.POLLIN)
        end = time.monotonic() + ANSWER_S
        while addresses and (left := end - time.monotonic()) > 0:
            for socket, _ in poller.poll(int(left * 1000) + 1):
                answer = decode_to_front_end(socket.recv())
                if isinstance(answer, Status) and answer.phase is Phase.SERVING:
                    return True
    return False
