"""The supervisor of one rank: it keeps a process in the seat, tells the others when that dies, and starts it again."""

import sys
import time
from dataclasses import dataclass

from elastic_moe.group.view import View
from elastic_moe.membership.launch import Launch, SeatStart, host_of
from elastic_moe.membership.signals import Mouth, PeerDied
from elastic_moe.supervision.channel import Beat, Refused, ViewChanged
from elastic_moe.supervision.ports import lasting_port
from elastic_moe.supervision.supervisor import Child, Event, Supervisor, complain

POLL_S = 0.25
QUICK_DEATH_S = 60.0
"""A process that dies within this many seconds of its start died quickly."""
RESPAWN_S = 2.0
"""Wait before a respawn: starting takes whole cores for seconds; first the survivors recover and catch up."""
BACKOFF_S = 1.0
"""Wait before the second respawn in a row after quick deaths; doubles with each."""

SEAT, LIGHTHOUSE = "process", "lighthouse"


@dataclass(frozen=True)
class Limits:
    """How patient a supervisor is; see the keys of the same name in conf/config.yaml."""

    hang_timeout_s: float = 20.0
    max_quick_deaths: int = 3


class RankSupervisor:
    """Owns the children of one rank. `run` returns the exit code when the launch is over for this rank."""

    def __init__(self, launch: Launch, limits: Limits, *, keeps_lighthouse: bool) -> None:
        """`keeps_lighthouse`: start one beside this rank, on this host."""
        self._launch = launch
        self._limits = limits
        self._supervisor = Supervisor()
        self._mouth = Mouth()
        host = host_of(launch)
        self._signals_port = lasting_port(host)
        self._lighthouse = f"http://{host}:{lasting_port(host)}" if keeps_lighthouse else ""
        self._view: View | None = None
        self._refused = ""
        self._started = 0.0
        self._quick_deaths = 0
        self._respawn_at: float | None = None
        self._beat: Beat | None = None
        self._beat_at = self._progress_at = 0.0

    def run(self) -> int:
        """Keep the children going until a signal comes, the rank cannot start, or its work is done."""
        self.start_services()
        self._start_process()
        try:
            while (code := self._turn()) is None:
                pass
        finally:
            self._supervisor.stop()
            self._mouth.close()
        return code

    def start_process(self, start: SeatStart) -> Child:
        """Start the process of this rank, named `SEAT`, and tell it who it is."""
        raise NotImplementedError

    def start_services(self) -> None:
        """Start what stands beside the rank."""
        if self._lighthouse:
            self._start_lighthouse()

    def on_view(self, view: View) -> None:
        """The members of the group have changed."""

    def on_message(self, event: Event) -> None:
        """A child says something of no concern to the seat."""

    def on_end(self, event: Event) -> None:
        """A service has ended."""
        if event.child == LIGHTHOUSE:
            self._start_lighthouse()

    def is_loss(self) -> bool:
        """Whether the others lose a member when the process ends now."""
        return True

    def on_exit(self, code: int) -> int | None:
        """The process has ended. Returns the exit code if that is the end of this rank, else it is started again."""
        if self._refused and self._view is None:
            return 2
        if self._view is None:
            complain(f"rank {self._launch.rank}: the process ended with code {code} before it joined the group", None)
            return 1
        return None

    def on_given_up(self) -> int | None:
        """It died too often. Returns the exit code if that ends this rank's part, else the supervisor stays."""
        return None

    def _turn(self) -> int | None:
        event = self._supervisor.next_event(POLL_S)
        now = time.monotonic()
        if event is not None:
            if not event.child:
                return 0
            if event.dying:
                if event.child == SEAT and self.is_loss():
                    self._announce_death()
            elif event.code is None:
                self._hear(event, now)
            elif event.child != SEAT:
                self.on_end(event)
            elif (code := self._replace(event.code, now)) is not None:
                return code
        if self._respawn_at is not None and now >= self._respawn_at:
            self._start_process()
        self._watch(now)
        return None

    def _replace(self, code: int, now: float) -> int | None:
        """The process has ended with `code`. Returns the exit code if that is the end of this rank."""
        if (end := self.on_exit(code)) is not None:
            return end
        return None if self._plan_respawn(code, now) else self.on_given_up()

    def _hear(self, event: Event, now: float) -> None:
        match event.message:
            case Beat() as beat:
                if self._beat is None or not beat.working or beat.progress != self._beat.progress:
                    self._progress_at = now
                self._beat, self._beat_at = beat, now
            case ViewChanged(view=view):
                self._view = view
                self._mouth.know(m.signals for m in view.members if m.rank != self._launch.rank)
                self.on_view(view)
            case Refused(reason=reason):
                self._refused = reason
            case _:
                self.on_message(event)

    def _plan_respawn(self, code: int, now: float) -> bool:
        rank, limit = self._launch.rank, self._limits.max_quick_deaths
        self._beat = None
        self._quick_deaths = self._quick_deaths + 1 if now - self._started < QUICK_DEATH_S else 0
        if self._refused or self._quick_deaths > limit:
            reason = self._refused or f"it died {self._quick_deaths} times within {QUICK_DEATH_S:.0f} s of its start"
            complain(f"rank {rank}: given up ({reason}); the others go on without it", None)
            return False
        wait = max(RESPAWN_S, BACKOFF_S * 2 ** (self._quick_deaths - 2))
        self._respawn_at = now + wait
        complain(f"rank {rank}: the process ended with code {code}; respawn in {wait:g} s", None)
        return True

    def _announce_death(self) -> None:
        """Tell all members, in milliseconds, that this rank's process is gone."""
        members = self._view.members if self._view else ()
        for dead in [m for m in members if m.rank == self._launch.rank]:
            others = [m.signals for m in members if m is not dead]
            self._mouth.tell(others, PeerDied(dead.rank, dead.incarnation))

    def _watch(self, now: float) -> None:
        """Kill a process that is alive but gets nowhere: stopped, or stuck outside every call with a deadline."""
        limit = self._limits.hang_timeout_s
        process = self._supervisor.children.get(SEAT)
        if self._beat is None or process is None:
            return
        silent, idle = now - self._beat_at, now - self._progress_at
        if silent > limit or idle > limit:
            what = f"silent for {silent:.1f} s" if silent > limit else f"without progress for {idle:.1f} s"
            complain(f"rank {self._launch.rank}: the process (pid {process.pid}) is {what}; killing it", None)
            self._beat = None
            process.kill()

    def _start_process(self) -> None:
        self._respawn_at, self._beat, self._started = None, None, time.monotonic()
        self.start_process(SeatStart(self._launch, self._lighthouse, self._signals_port, self._view))

    def _start_lighthouse(self) -> None:
        bind = self._lighthouse.removeprefix("http://")
        self._supervisor.start(LIGHTHOUSE, [sys.executable, "-m", "elastic_moe.supervision.lighthouse", "--bind", bind])
