"""What the supervisor of one serving rank does: an engine in the seat, and on a node's first rank a front end."""

import socket
import sys
from pathlib import Path

from elastic_moe.config import ServeConfig
from elastic_moe.group.view import View
from elastic_moe.membership.launch import Launch, SeatStart
from elastic_moe.serving.starts import EngineStart, FrontEndStart
from elastic_moe.supervision.channel import Ready, ViewChanged
from elastic_moe.supervision.rank_supervisor import SEAT, RankSupervisor
from elastic_moe.supervision.supervisor import Child, Event, complain

FRONT_END = "front end"


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
        self._attempt = attempt

    def run(self) -> int:
        """See the base; a user's mistake is told in one line at the end, when nothing else can hide it."""
        code = super().run()
        if self._refused:
            complain(self._refused, self._attempt)
        return code

    def start_process(self, start: SeatStart) -> Child:
        """See the base."""
        engine = self._supervisor.start(SEAT, [sys.executable, "-m", "elastic_moe.serving.engine.engine"])
        engine.channel.send(EngineStart(start, self._config))
        return engine

    def start_services(self) -> None:
        """See the base."""
        super().start_services()
        if self._listener is not None:
            self._start_front_end(self._listener)

    def on_view(self, view: View) -> None:
        """See the base."""
        if front_end := self._supervisor.children.get(FRONT_END):
            front_end.channel.send(ViewChanged(view))

    def on_message(self, event: Event) -> None:
        """See the base."""
        if isinstance(event.message, Ready) and event.child == FRONT_END:
            name, url = self._config.model.name, event.message.detail
            sys.stdout.write(f"elastic_moe: node {self._launch.node} serves {name} at {url}\n")
            sys.stdout.flush()

    def on_service_exit(self, event: Event) -> None:
        """See the base."""
        super().on_service_exit(event)
        if event.child == FRONT_END and self._listener is not None:
            self._start_front_end(self._listener)

    def _start_front_end(self, listener: socket.socket) -> None:
        fd = listener.fileno()
        command = [sys.executable, "-m", "elastic_moe.serving.front_end.process", "--listen-fd", str(fd)]
        front_end = self._supervisor.start(FRONT_END, command, pass_fds=[fd])
        front_end.channel.send(FrontEndStart(self._config, self._launch.node))
        if self._view is not None:
            front_end.channel.send(ViewChanged(self._view))
