"""The supervisor of one rank: it keeps a process in the seat, tells the others when that dies, and starts it again."""

import math
import sys
import time

from elastic_moe.deadlines import Deadlines
from elastic_moe.group.view import View
from elastic_moe.membership.launch import Launch, SeatStart, host_of
from elastic_moe.membership.signals import PeerDied, SignalSender
from elastic_moe.supervision.channel import Beat, Refused, ViewChanged
from elastic_moe.supervision.ports import lasting_port
from elastic_moe.supervision.supervisor import Child, Event, EventKind, Supervisor, complain
from elastic_moe.supervision.watch import HangWatch, Respawns

POLL_S = 0.25
"""How often a supervisor looks whether a process hangs or is to be started, when nothing happens."""
SEAT, LIGHTHOUSE = "process", "lighthouse"


class RankSupervisor:
    """Owns the children of one rank. `run` returns the exit code when the launch is over for this rank."""

    def __init__(self, launch: Launch, deadlines: Deadlines, max_quick_deaths: int, *, keeps_lighthouse: bool) -> None:
        """`max_quick_deaths`: see `Respawns`; `keeps_lighthouse`: start one beside this rank, on this host."""
        self._launch = launch
        self._deadlines = deadlines
        self._supervisor = Supervisor()
        self._sender = SignalSender()
        host = host_of(launch)
        self._signals_port = lasting_port(host)
        self._lighthouse = f"http://{host}:{lasting_port(host)}" if keeps_lighthouse else ""
        self._view: View | None = None
        self._refused = ""
        self._started = 0.0
        self._respawn_at: float | None = None
        self._respawns = Respawns(max_quick_deaths)
        self._hang_watch = HangWatch(deadlines.hang_s or math.inf)

    def run(self) -> int:
        """Keep the children going until a signal comes, the rank cannot start, or its work is done."""
        self.start_services()
        self._start_process()
        try:
            while (code := self._turn()) is None:
                pass
        finally:
            self._supervisor.stop()
            self._sender.close()
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

    def on_service_exit(self, event: Event) -> None:
        """A service has exited: it is started again."""
        if event.child == LIGHTHOUSE:
            self._start_lighthouse()

    def is_loss(self) -> bool:
        """Whether the others lose a member when the process ends now."""
        return True

    def on_exit(self, code: int) -> int | None:
        """The process has exited. Returns the exit code if this rank does too, else it is started again."""
        if self._refused and self._view is None:
            return 2
        if self._view is None:
            complain(f"rank {self._launch.rank}: the process died with code {code} before it joined the group", None)
            return 1
        return None

    def on_given_up(self) -> int | None:
        """It died too often. Returns the exit code if the supervisor exits too, else it stays."""
        return None

    def _turn(self) -> int | None:
        event = self._supervisor.next_event(POLL_S)
        now = time.monotonic()
        if event is not None and (code := self._act(event, now)) is not None:
            return code
        if self._respawn_at is not None and now >= self._respawn_at:
            self._start_process()
        self._watch(now)
        return None

    def _act(self, event: Event, now: float) -> int | None:
        match event.kind:
            case EventKind.SIGNAL:
                return 0
            case EventKind.MESSAGE:
                self._hear(event, now)
            case EventKind.DYING:
                if event.child == SEAT and self.is_loss():
                    self._announce_death()
            case EventKind.EXIT:
                if event.child == SEAT:
                    return self._replace(event.code, now)
                self.on_service_exit(event)
        return None

    def _replace(self, code: int, now: float) -> int | None:
        """The process has exited with `code`. Returns the exit code if this rank does too."""
        if (end := self.on_exit(code)) is not None:
            return end
        return None if self._plan_respawn(code, now) else self.on_given_up()

    def _hear(self, event: Event, now: float) -> None:
        match event.message:
            case Beat() as beat:
                self._hang_watch.hear(beat, now)
            case ViewChanged(view=view):
                self._view = view
                self._sender.connect(m.signals for m in view.members if m.rank != self._launch.rank)
                self.on_view(view)
            case Refused(reason=reason):
                self._refused = reason
            case _:
                self.on_message(event)

    def _plan_respawn(self, code: int, now: float) -> bool:
        rank = self._launch.rank
        self._hang_watch.forget()
        wait_s = self._respawns.after_death(now - self._started)
        if self._refused or wait_s is None:
            reason = self._refused or self._respawns.reason
            complain(f"rank {rank}: given up ({reason}); the others go on without it", None)
            return False
        self._respawn_at = now + wait_s
        complain(f"rank {rank}: the process died with code {code}; respawn in {wait_s:g} s", None)
        return True

    def _announce_death(self) -> None:
        """Tell all members, in milliseconds, that this rank's process died."""
        members = self._view.members if self._view else ()
        for mine in [m for m in members if m.rank == self._launch.rank]:
            others = [m.signals for m in members if m is not mine]
            self._sender.tell(others, PeerDied(mine.rank, mine.incarnation))

    def _watch(self, now: float) -> None:
        """Kill a process that is alive but gets nowhere: stopped, or stuck outside every call with a deadline."""
        process = self._supervisor.children.get(SEAT)
        if process is not None and (how := self._hang_watch.verdict(now)):
            complain(f"rank {self._launch.rank}: the process (pid {process.pid}) is {how}; killing it", None)
            self._hang_watch.forget()
            process.kill()

    def _start_process(self) -> None:
        self._respawn_at, self._started = None, time.monotonic()
        self._hang_watch.forget()
        self.start_process(SeatStart(self._launch, self._lighthouse, self._signals_port, self._view))

    def _start_lighthouse(self) -> None:
        wait_ms, beat_ms = self._deadlines.lighthouse_wait_s * 1000, self._deadlines.heartbeat_timeout_s * 1000
        command = [sys.executable, "-m", "elastic_moe.supervision.lighthouse"]
        command += ["--bind", self._lighthouse.removeprefix("http://")]
        command += ["--join-timeout-ms", f"{wait_ms:.0f}", "--heartbeat-timeout-ms", f"{beat_ms:.0f}"]
        self._supervisor.start(LIGHTHOUSE, command)
