"""What the supervisor of one rank does: keep an engine in the seat, and on the first rank of a node its services."""

import socket
import sys
import time
from pathlib import Path

import zmq

from elastic_moe.config import ServeConfig
from elastic_moe.membership.channel import Beat, EngineStart, FrontEndStart, Ready, Refused, ViewChanged
from elastic_moe.membership.launch import Launch, host_of
from elastic_moe.membership.supervisor import Event, Supervisor, complain
from elastic_moe.membership.view import View
from elastic_moe.serving.protocol import PeerDied, encode

POLL_S = 0.25
QUICK_DEATH_S = 60.0
"""An engine that dies within this many seconds of its start died quickly."""
BACKOFF_S = 1.0
"""Wait before the second respawn in a row after quick deaths; doubles with each. The first is immediate."""

ENGINE, FRONT_END, LIGHTHOUSE = "engine", "front end", "lighthouse"


class RankSupervisor:
    """Owns the children of one rank. `run` returns the exit code when the launch is over for this rank."""

    def __init__(
        self, config: ServeConfig, launch: Launch, listener: socket.socket | None, attempt: Path | None = None
    ) -> None:
        """`listener` is the node's HTTP socket, on its first rank: it outlives every front end. `attempt` is a folder
        that the ranks of this node share for this start; see `complain`."""
        self._config = config
        self._launch = launch
        self._listener = listener
        self._attempt = attempt
        self._supervisor = Supervisor()
        self._lighthouse = ""
        self._view: View | None = None
        self._refused = ""
        self._started = 0.0
        self._quick_deaths = 0
        self._respawn_at: float | None = None
        self._beat: Beat | None = None
        self._beat_at = self._progress_at = 0.0
        self._context = zmq.Context()
        self._peers: dict[str, zmq.Socket] = {}

    def run(self) -> int:
        """Keep the children going until a signal comes or the rank cannot start. Returns the exit code."""
        if self._listener is not None:
            if not self._config.elastic.lighthouse:
                self._lighthouse = f"http://{host_of(self._launch)}:{_free_port(host_of(self._launch))}"
                self._start_lighthouse()
            self._start_front_end()
        self._start_engine()
        try:
            while (code := self._turn()) is None:
                pass
        finally:
            self._supervisor.stop()
            self._context.destroy(linger=0)
        if self._refused:
            complain(self._refused, self._attempt)
        return code

    def _turn(self) -> int | None:
        event = self._supervisor.next_event(POLL_S)
        now = time.monotonic()
        if event is not None:
            if not event.child:
                return 0
            if event.code is None:
                self._hear(event, now)
            else:
                code = self._bury(event, now)
                if code is not None:
                    return code
        if self._respawn_at is not None and now >= self._respawn_at:
            self._start_engine()
        self._watch(now)
        return None

    def _hear(self, event: Event, now: float) -> None:
        match event.message:
            case Beat() as beat:
                if self._beat is None or not beat.working or beat.progress != self._beat.progress:
                    self._progress_at = now
                self._beat, self._beat_at = beat, now
            case ViewChanged(view=view):
                self._view = view
                self._tell_front_end()
            case Ready(detail=url) if event.child == FRONT_END:
                sys.stdout.write(f"elastic_moe: node {self._launch.node} serves {self._config.model.name} at {url}\n")
                sys.stdout.flush()
            case Refused(reason=reason):
                self._refused = reason

    def _bury(self, event: Event, now: float) -> int | None:
        """A child has ended. Returns the exit code if that ends this rank's part in the launch."""
        if self._refused and self._view is None:
            return 2
        if event.child == FRONT_END:
            self._start_front_end()
        elif event.child == LIGHTHOUSE:
            self._start_lighthouse()
        elif self._view is None:
            complain(f"rank {self._launch.rank}: the engine ended with code {event.code} before it served", None)
            return 1
        else:
            self._announce_death()
            self._plan_respawn(event, now)
        return None

    def _plan_respawn(self, event: Event, now: float) -> None:
        rank, limit = self._launch.rank, self._config.elastic.max_quick_deaths
        self._beat = None
        self._quick_deaths = self._quick_deaths + 1 if now - self._started < QUICK_DEATH_S else 0
        if self._refused or self._quick_deaths > limit:
            reason = self._refused or f"it died {self._quick_deaths} times within {QUICK_DEATH_S:.0f} s of its start"
            complain(f"rank {rank}: given up ({reason}); the others serve without it", None)
            return
        wait = BACKOFF_S * 2 ** (self._quick_deaths - 2) if self._quick_deaths > 1 else 0.0
        self._respawn_at = now + wait
        complain(f"rank {rank}: the engine ended with code {event.code}; respawn in {wait:.0f} s", None)

    def _announce_death(self) -> None:
        """Tell all engines, in milliseconds, that this rank's process is gone."""
        if self._view is None:
            return
        dead = next((m for m in self._view.members if m.rank == self._launch.rank), None)
        if dead is None:
            return
        for member in self._view.members:
            if member is not dead:
                if member.address not in self._peers:
                    self._peers[member.address] = self._context.socket(zmq.DEALER)
                    self._peers[member.address].connect(member.address)
                self._peers[member.address].send(encode(PeerDied(dead.rank, dead.incarnation)))

    def _watch(self, now: float) -> None:
        """Kill an engine that is alive but gets nowhere: stopped, or stuck outside every call with a deadline."""
        limit = self._config.elastic.hang_timeout_s
        engine = self._supervisor.children.get(ENGINE)
        if self._beat is None or engine is None:
            return
        silent, idle = now - self._beat_at, now - self._progress_at
        if silent > limit or idle > limit:
            what = f"silent for {silent:.1f} s" if silent > limit else f"without progress for {idle:.1f} s"
            complain(f"rank {self._launch.rank}: the engine (pid {engine.pid}) is {what}; killing it", None)
            self._beat = None
            engine.kill()

    def _start_engine(self) -> None:
        self._respawn_at, self._beat, self._started = None, None, time.monotonic()
        engine = self._supervisor.start(ENGINE, [sys.executable, "-m", "elastic_moe.serving.engine"])
        engine.channel.send(EngineStart(self._config, self._launch, self._lighthouse, self._view))

    def _start_front_end(self) -> None:
        if self._listener is None:
            return
        fd = self._listener.fileno()
        command = [sys.executable, "-m", "elastic_moe.serving.frontend", "--listen-fd", str(fd)]
        front_end = self._supervisor.start(FRONT_END, command, pass_fds=[fd])
        front_end.channel.send(FrontEndStart(self._config, self._launch.node))
        self._tell_front_end()

    def _start_lighthouse(self) -> None:
        bind = self._lighthouse.removeprefix("http://")
        self._supervisor.start(LIGHTHOUSE, [sys.executable, "-m", "elastic_moe.membership.lighthouse", "--bind", bind])

    def _tell_front_end(self) -> None:
        front_end = self._supervisor.children.get(FRONT_END)
        if front_end is not None and self._view is not None:
            front_end.channel.send(ViewChanged(self._view))


def _free_port(host: str) -> int:
    """A port that was free a moment ago; the lighthouse has to keep it over its respawns, so it cannot choose one."""
    with socket.create_server((host, 0)) as probe:
        return probe.getsockname()[1]
